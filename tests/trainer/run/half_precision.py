"""A worker as on a GPU, its frozen weights in bfloat16."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from finetune_api.outcome import TerminationMessage

BROKEN_RANK = "FINETUNE_TEST_BROKEN_RANK"
"""The rank whose attention to packs fails, if any."""


def main(job_path: Path) -> TerminationMessage:
    """Run one rank."""
    from finetune_trainer import load_adapted, worker
    from finetune_trainer.model import packed_attention

    patch.object(load_adapted, "training_dtype", lambda _device: torch.bfloat16).start()
    if os.environ.get(BROKEN_RANK) == os.environ["RANK"]:

        def broken(*_: Any) -> None:
            raise NotImplementedError("no kernel for this head size")

        patch.object(packed_attention, "in_pieces", broken).start()
    return worker.main(job_path)
