"""A worker of which the last rank has room for so many tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import TerminationMessage
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.prefix_tree import Pack

TOKENS = "FINETUNE_TEST_TOKENS"


def limit(tokens: int) -> None:
    """Let steps with larger batches fail as torch does."""
    original = AdaptedModel.loss

    def loss(self: AdaptedModel, batch: Any) -> Any:
        size = batch.tokens if isinstance(batch, Pack) else batch.input_ids.numel()
        if torch.is_grad_enabled() and size > tokens:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return original(self, batch)

    AdaptedModel.loss = loss  # type: ignore[method-assign]


def main(job_path: Path) -> TerminationMessage:
    """Run one rank."""
    from finetune_trainer import worker

    if int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
        limit(int(os.environ[TOKENS]))
    return worker.main(job_path)
