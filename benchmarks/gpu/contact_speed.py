"""Tokens per second of a LoRA step on a model as large as Llama-3-8B, packed, beside TRL's way on the same card.

TRL's own trainer is asked where it can be imported; else what its `training_step` comes to: transformers' forward pass
with PEFT's layers under autocast, padded rows of about the same length, the loss on all positions.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.contact_checks import Finding, Setting
from benchmarks.gpu.contact_models import LLAMA_3_8B, random_base, rows, with_adapter
from benchmarks.gpu.devices import device_name, give_back, peak_memory, peak_tflops, reset_peak, wait_for
from finetune_trainer.model.batch import TokenPair
from finetune_trainer.model.packing import packs_of
from tests.architectures.tokenizer import save_tokenizer

_MARK = 12_473
"""Tokens per second on one H100: Llama-3-8B, LoRA in bfloat16, as NeMo Automodel publishes it."""
_WANTED = 17_000
_STEPS = 5
_ROWS = 4


def speed(setting: Setting) -> Iterator[Finding]:
    """Ours, then the peer on the same base model and rows."""
    sizes = setting.model if setting.small else LLAMA_3_8B
    model = with_adapter(random_base(sizes, setting.device, torch.bfloat16), setting.device)
    model.peft.train()
    found = [row[0] for row in rows(_ROWS, shared=1, own=setting.tokens(1024), vocabulary=sizes[-1])]
    # Rows that share nothing, so that all their tokens are computed by both.
    (pack,) = packs_of(found, budget=1 << 20, share=False)
    pack = pack.to(setting.device)
    optimizer = torch.optim.AdamW(model.trained, lr=1e-4, fused=setting.device.type == "cuda")
    model.take_packs()
    model.fuse()

    def ours() -> None:
        model.backward([pack], 1 / max(int(pack.targets.numel()), 1))
        optimizer.step()
        optimizer.zero_grad()

    seconds, gib = _step(setting, ours)
    rate = pack.tokens / seconds
    yield Finding(
        f"ours, {pack.tokens:,} tokens in a pack",
        f"{rate:,.0f} tokens/s, {gib}{_utilization(setting, model, pack.tokens, seconds)}",
        None if setting.small else rate > _WANTED,
    )
    model.leave_packs()
    model.unfuse()
    give_back(setting.device)
    tokens = sum(len(ids) for ids, _ in found)
    name, peer = _peer(setting, model, found, optimizer)
    seconds, gib = _step(setting, peer)
    yield Finding(f"{name}, the same rows padded", f"{tokens / seconds:,.0f} tokens/s, {gib}", holds=None)
    yield Finding(
        "ours to that", f"{rate * seconds / tokens:.2f} times as fast (an H100's mark: {_MARK:,})", holds=None
    )


def _step(setting: Setting, step: Callable[[], None]) -> tuple[float, str]:
    """Median seconds of a step, and the most memory."""
    step()
    step()
    reset_peak(setting.device)
    found = []
    for _ in range(_STEPS):
        wait_for(setting.device)
        began = time.perf_counter()
        step()
        wait_for(setting.device)
        found.append(time.perf_counter() - began)
    peak = peak_memory(setting.device)
    return sorted(found)[_STEPS // 2], f"{peak.allocated / 2**30:.1f} GiB" if peak else "no peak"


def _utilization(setting: Setting, model: Any, tokens: int, seconds: float) -> str:
    peak = peak_tflops(device_name(setting.device))
    if peak is None:
        return ""
    frozen = sum(p.numel() for name, p in model.base.named_parameters() if not p.requires_grad and "embed" not in name)
    return f", MFU {4 * frozen * tokens / seconds / (peak * 1e12):.0%} (4N)"


def _peer(
    setting: Setting, model: Any, found: list[TokenPair], optimizer: torch.optim.Optimizer
) -> tuple[str, Callable[[], None]]:
    width = max(len(ids) for ids, _ in found)
    ids, labels, mask = (torch.zeros(len(found), width, dtype=torch.int64, device=setting.device) for _ in range(3))
    labels.fill_(-100)
    for number, (row, trained) in enumerate(found):
        tokens = torch.from_numpy(row).to(setting.device)
        ids[number, : len(row)], mask[number, : len(row)] = tokens, 1
        labels[number, : len(row)] = tokens.masked_fill(~torch.from_numpy(trained).to(setting.device), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    trainer = _trl(model.peft, on_cpu=setting.small) if importlib.util.find_spec("trl") else None

    def plain() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16):
            logits = model.peft(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    if trainer is None:
        return "transformers and PEFT", plain
    count = labels[:, 1:].ne(-100).sum()

    def trl() -> None:
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(model.peft, batch, count)
        optimizer.step()
        optimizer.zero_grad()

    return "TRL's training_step", trl


def _trl(peft: Any, *, on_cpu: bool) -> Any:
    """TRL's trainer of a model, on a dataset of which only the first row is ever looked at."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        save_tokenizer(Path(folder))
        with _datasets_or_less() as dataset:
            from trl.trainer.sft_config import SFTConfig
            from trl.trainer.sft_trainer import SFTTrainer

            return SFTTrainer(
                model=peft,
                args=SFTConfig(
                    output_dir=folder,
                    bf16=True,
                    gradient_checkpointing=False,
                    max_length=None,
                    dataset_kwargs={"skip_prepare_dataset": True},
                    report_to=[],
                    disable_tqdm=True,
                    use_cpu=on_cpu,
                ),
                train_dataset=dataset({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
                processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            )


@contextmanager
def _datasets_or_less() -> Iterator[Callable[[dict[str, list[Any]]], Any]]:
    """What makes a dataset of columns: the library's, or where that is missing (with Arrow it is larger than all else
    together) the little that TRL asks of one that is prepared already.
    """
    if importlib.util.find_spec("datasets") is not None:
        from datasets import Dataset  # type: ignore[import-untyped]

        yield Dataset.from_dict
        return
    sys.meta_path.append(finder := _Less())
    try:
        yield importlib.import_module("datasets").Dataset
    finally:
        sys.meta_path.remove(finder)


class _Less:
    """Finds what TRL imports for data that it is to prepare: modules whose every name is a class of its own."""

    _PACKAGES = ("datasets", "pandas", "pyarrow")

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in self._PACKAGES:
            return None
        return ModuleSpec(name, cast("Any", self), is_package=True)

    def create_module(self, _spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def make(name: str) -> Any:
            # Its dunder names are those that the import system asks for.
            if name.startswith("__"):
                raise AttributeError(name)
            setattr(module, name, type(name, (_Columns,), {}))
            return vars(module)[name]

        cast("Any", module).__getattr__ = make


class _Columns:
    """Rows in columns."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns = columns
        self.column_names = list(columns)
        self.cache_files: list[object] = []
        self.features = dict.fromkeys(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))
