"""A trainer whose last rank has room for so many tokens: `python -m tests.trainer.run.short_of_memory JOB`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import TerminationMessage
from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.train.passes import Passes

TOKENS = "FINETUNE_TEST_TOKENS"


def limit(tokens: int) -> None:
    """Let steps with larger batches fail as torch does."""
    original = Passes.forward

    def forward(self: Passes, model: Any, batch: Any) -> Any:
        size = batch.tokens if isinstance(batch, Pack) else batch.input_ids.numel()
        if torch.is_grad_enabled() and size > tokens:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return original(self, model, batch)

    Passes.forward = forward  # type: ignore[method-assign]


def main(job_path: Path) -> TerminationMessage:
    """Run one rank."""
    from finetune_trainer import worker

    if int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
        limit(int(os.environ[TOKENS]))
    return worker.main(job_path)


if __name__ == "__main__":
    from finetune_trainer.launch import command

    sys.exit(command.main(worker_module=__spec__.name))
