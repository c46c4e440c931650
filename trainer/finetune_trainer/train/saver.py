"""Writes what a resume needs to a folder of this machine, and hands it over to be uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.train import state as saved
from finetune_trainer.train.checkpoint_files import ADAPTER, OPTIMIZER, RANDOM
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.plan import TrainingPlan
from finetune_trainer.train.steps import StepRunner


class Saver:
    """Saves one run. What is trained is whole on every rank, so rank 0 has all but the others' random states.

    Args:
        model: is trained.
        optimizer: trains it.
        runner: knows how rows become batches.
        plan: gives the epoch.
        writer: uploads; used on rank 0 only.
        ranks: this process among the others.
        scratch: a folder for files on their way out.
    """

    def __init__(
        self,
        model: AdaptedModel,
        optimizer: torch.optim.Optimizer,
        runner: StepRunner,
        plan: TrainingPlan,
        writer: CheckpointWriter | None,
        ranks: Ranks,
        scratch: Path,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._runner = runner
        self._plan = plan
        self._writer = writer
        self._ranks = ranks
        self._scratch = scratch

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Save the state after `step` optimizer steps; called on all ranks.

        Args:
            step: counted from 1.
            metrics: of an evaluation after this step; empty where there was none.

        Raises:
            JobError: LossDiverged, the adapter has values that are no numbers; or as the store does.
        """
        random_states = self._ranks.gather(saved.random_state())
        if self._writer is None:
            return
        adapter = saved.adapter_state(self._model.peft, step)
        folder = self._scratch / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(adapter, folder / ADAPTER, metadata={"format": "pt"})
        torch.save(saved.optimizer_state(self._model.peft, self._optimizer), folder / OPTIMIZER)
        torch.save(random_states, folder / RANDOM)
        details: dict[str, Any] = {
            "metrics": metrics,
            "epoch": self._plan.epoch_after(step),
            "batching": self._runner.choice.figures(),
        }
        self._writer.save(folder, step=step, eval_loss=metrics.get("eval_loss"), details=details)
