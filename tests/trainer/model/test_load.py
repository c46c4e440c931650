"""Model folders that cannot be read."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import load_config, load_model
from tests.models import random_llama


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


class _Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_is_run(tmp_path: Path, zipped: bool) -> None:
    """Weights in PyTorch's format, in the present container and in the old one."""
    folder, trace = random_llama(tmp_path / "model"), tmp_path / "trace"
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    load_model(folder, dtype=torch.float32, trust_remote_code=False)
    weights["model.norm.weight"] = _Malicious(trace)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(JobError) as caught:
        load_model(folder, dtype=torch.float32, trust_remote_code=True)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists(), "the pickle would have run"


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModelForCausalLM"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()], ids=["volume", "memory"])
def test_a_model_is_not_refused_for_what_the_machine_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto: str, error: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    folder = random_llama(tmp_path / "model")
    monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", fails)
    with pytest.raises(type(error)) as caught:
        load_model(folder, dtype=torch.float32, trust_remote_code=False)
    assert caught.value is error
