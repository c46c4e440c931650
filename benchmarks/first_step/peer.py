"""The same small job with TRL, as its documentation shows it: a process that trains one step and says so.

`python -m benchmarks.first_step.peer MODEL ROWS.jsonl`
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from datasets import load_dataset  # type: ignore[import-untyped]
from peft import LoraConfig
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from typing_extensions import override


class _Tells(TrainerCallback):
    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"step {state.global_step}/", flush=True)


def main(model: str, rows: str) -> None:
    """Train one step, and say so."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=1,
                per_device_train_batch_size=4,
                assistant_only_loss=False,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=load_dataset("json", data_files=rows, split="train", cache_dir=folder),
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[_Tells()],
        )
        trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
