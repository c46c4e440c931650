"""Model folders that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import load_config


def test_a_file_that_may_not_be_read_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors calls such a file missing."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    weights = tmp_path / "model.safetensors"
    weights.touch(mode=0o600)
    allowed = os.access

    def access(path: Any, mode: int) -> bool:  # root may read anything
        return Path(path) != weights and allowed(path, mode)

    load_config(tmp_path, trust_remote_code=False)
    monkeypatch.setattr(os, "access", access)
    with pytest.raises(JobError, match=r"model\.safetensors may not be read by this user") as caught:
        load_config(tmp_path, trust_remote_code=False)
    assert caught.value.reason is Reason.STORAGE_ACCESS_DENIED
