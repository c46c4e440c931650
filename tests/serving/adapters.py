"""Adapters for a real server, by the trainer itself, and what PEFT alone answers with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune_api.defaults import effective_job
from finetune_api.load import load_job
from tests.cli.command import finetune_json
from tests.serving.cases import Case
from tests.serving.conversations import answered, rows
from tests.trainer.run.tiny_job import write_rows

MAX_TOKENS = 16
"""Longest answer; the longest trained one has 8."""


@dataclass(frozen=True)
class Adapter:
    """A published adapter and the job that it is of."""

    case: Case
    base: Path
    folder: Path
    """The job's; the adapter is in `path`."""

    @property
    def path(self) -> Path:
        """The adapter's folder, as it was published."""
        return self.folder / "out" / "adapter"

    @property
    def template_file(self) -> Path:
        """Its chat template, as a server is given it."""
        return self.path / "chat_template.jinja"

    @cached_property
    def stops(self) -> dict[str, Any]:
        """What generation_config.json says of the end of an answer: `eos_token_id`, and `stop_strings` if any."""
        content = json.loads((self.path / "generation_config.json").read_text())
        return {key: content[key] for key in ("eos_token_id", "stop_strings") if content.get(key)}

    @cached_property
    def previewed(self) -> list[dict[str, Any]]:
        """What `finetune preview` shows of each of `questions`: `inference_prompt` and `inference_ids` among others."""
        shown = write_rows(self.folder / "questions.jsonl", answered())
        file = _job_file(self, "preview.yaml", train_path=str(shown))
        found: list[dict[str, Any]] = finetune_json("preview", str(file), "-n", "100")
        return found

    def peft_answers(self, prompts: Sequence[Sequence[int]], *, without: str | None = None) -> list[list[int]]:
        """What PEFT generates greedily from each prompt, with the adapter's own stop tokens.

        Args:
            prompts: token ids.
            without: the adapter's part in modules with this in their names is left out.
        """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, GenerationConfig

        base: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        base.generation_config = GenerationConfig()
        model: Any = PeftModel.from_pretrained(base, str(self.path)).eval()
        for name, weight in model.named_parameters():
            if without is not None and without in name and "lora_B" in name:
                weight.data.zero_()
        config = GenerationConfig(
            do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=self.stops["eos_token_id"], pad_token_id=0
        )
        found = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            with torch.inference_mode():
                whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            found.append(whole[0, len(prompt) :].tolist())
        return found


def train(case: Case, base: Path, folder: Path) -> Adapter:
    """Run the case's job in `folder`, in this process.

    Raises:
        JobError: it failed.
    """
    from finetune_trainer.run import run_job
    from finetune_trainer.train.collective import Ranks

    folder.mkdir(parents=True)
    adapter = Adapter(case, base, folder)
    write_rows(folder / "train.jsonl", rows())
    loaded = load_job(_job_file(adapter, "job.yaml").read_text(), source="job.yaml")
    assert loaded.job is not None, loaded.errors
    with torch.random.fork_rng():
        assert run_job(effective_job(loaded.job), [], torch.device("cpu"), Ranks()).succeeded
    return adapter


def _job_file(adapter: Adapter, name: str, **changes: Any) -> Path:
    case = adapter.case
    spec = {
        "model_id": str(adapter.base),
        "train_path": str(adapter.folder / "train.jsonl"),
        "task": "instruction_tuning",
        "generation_config": case.generation,
        "num_epochs": case.epochs,
        "train_batch_size_per_device": 4,
        "learning_rate": case.learning_rate,
        "num_warmup_steps": 0,
        "lora_config": {"r": case.rank, "lora_alpha": 2 * case.rank, "lora_dropout": 0.0, **case.lora},
        "output": {"uri": str(adapter.folder / "out")},
        **changes,
    }
    path = adapter.folder / name
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": case.name}}
    path.write_text(yaml.safe_dump(manifest | {"spec": spec}, sort_keys=False))
    return path
