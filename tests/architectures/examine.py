"""One case through the trainer's own entry, and what becomes of the adapter in PEFT and transformers alone.

Meant for a process of its own: it sets variables, and notes every model that PEFT makes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune_api.load import load_job_file
from finetune_api.training import Quantization
from finetune_trainer.data.dataset import TokenizedData, prepare
from finetune_trainer.errors import JobError
from finetune_trainer.inputs import data_source, load_model_inputs
from finetune_trainer.model.quantized import settings
from finetune_trainer.model.support import build_skeleton
from finetune_trainer.worker import main
from tests.architectures.cases import Case
from tests.architectures.record import Record

_MIDDLE = 4
"""Optimizer steps after which the resumed run goes on."""

_SETTINGS: dict[str, Any] = {
    "task": "instruction_tuning",
    "generation_config": {"prompt_format": {"use_hugging_face_chat_template": True}},
    "num_epochs": 2,
    "train_batch_size_per_device": 4,
    # Models this small learn from steps this large only.
    "learning_rate": 1e-2,
    "num_warmup_steps": 1,
    "eval_first": True,
    "checkpoint_and_evaluation_frequency": {"strategy": "steps", "value": _MIDDLE},
    "num_checkpoints_to_keep": 3,
}
"""How long and how fast, and nothing about the adapter: no lora_config."""


def examine(case: Case, folder: Path, *, launched: bool = False) -> Record:
    """Train `case` in `folder`, which is used up.

    Args:
        case: what to train.
        folder: an empty one.
        launched: also as a user would, by `finetune run` in a process of its own.
    """
    began = time.monotonic()
    record = Record(case.name, case.model_type, why_not=case.why_not, quantization=case.quantization)
    os.environ |= {"FINETUNE_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    base = folder / "base"
    case.build(base)
    try:
        _ask_upstream(record, base)
    except Exception as error:  # Model code that nobody here has seen.
        record.upstream = _one_line(error)
    _train(record, _job(folder, base, case.quantization), launched)
    record.seconds = round(time.monotonic() - began, 1)
    return record


def _ask_upstream(record: Record, base: Path) -> None:
    """Whether transformers alone loads the folder, computes gradients, and is causal."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    model.eval()
    missing = sorted(info["missing_keys"])
    if missing:
        record.upstream = f"leaves {len(missing)} weights random without an error, first {missing[0]}"
    ids = torch.arange(4, 44)[None] * 7 % 390
    changed = ids.clone()
    changed[0, -1] = 5
    with torch.no_grad():
        logits, other = (model(input_ids=part, use_cache=False).logits[0, :-1] for part in (ids, changed))
    record.causal = _difference(logits, other) < 1e-3
    model.train()
    model(input_ids=ids, use_cache=False).logits.sum().backward()


def _train(record: Record, job: Path, launched: bool) -> None:
    spec = yaml.safe_load(job.read_text())["spec"]
    base, output = Path(spec["model_id"]), Path(spec["output"]["uri"])
    models: list[Any] = []
    reads: list[str] = []
    console = io.StringIO()
    try:
        with _watched(models, reads), contextlib.redirect_stdout(console):
            _run(job)
    except JobError as error:
        record.outcome, record.sentence, record.reason = "refused", error.message, error.reason.value
    except Exception as error:  # What the launcher calls an internal error.
        record.outcome, record.sentence, record.reason = "failed", _one_line(error), "InternalError"
    else:
        record.outcome = "trained"
    lines = console.getvalue().splitlines()
    record.warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    record.weights_were_read = bool(reads)
    if record.outcome != "trained":
        return
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    record.losses = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    record.layout = next((line["batching"] for line in metrics if "batching" in line), "")
    _describe(record, models[0])
    with _noted(record, "opened by PEFT alone"):
        _open_again(record, job, base, output / "adapter", models[0])
    with _noted(record, "resumed"):
        record.resumed_difference = _resumed(job, output)
    if launched:
        with _noted(record, "launched"):
            record.launched_difference = _launched(job, output)


@contextlib.contextmanager
def _noted(record: Record, what: str) -> Iterator[None]:
    """Whatever is raised is a result."""
    try:
        yield
    except Exception as error:  # Model code that nobody here has seen.
        record.errors.append(f"{what}: {_one_line(error)}")


def _run(job: Path) -> None:
    """One rank of one, with the variables that the launcher would give it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # What an earlier run in this process left behind.
    PartialState._reset_state()
    AcceleratorState._reset_state()
    try:
        main(job)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in (*ranks, "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


@contextlib.contextmanager
def _watched(models: list[Any], reads: list[str]) -> Iterator[None]:
    """Note the models that PEFT makes and the weights that transformers reads."""
    make, read = PeftModel.__init__, PreTrainedModel._load_pretrained_model

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        models.append(self)

    def noted_read(model: Any, *args: Any, **kwargs: Any) -> Any:
        reads.append(type(model).__name__)
        return read(model, *args, **kwargs)

    PeftModel.__init__ = noted  # type: ignore[method-assign]
    PreTrainedModel._load_pretrained_model = staticmethod(noted_read)  # type: ignore[method-assign]
    try:
        yield
    finally:
        PeftModel.__init__ = make  # type: ignore[method-assign]
        PreTrainedModel._load_pretrained_model = staticmethod(read)  # type: ignore[method-assign]


def _describe(record: Record, model: Any) -> None:
    """Which layers have an adapter, and how much of the model that is."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    record.layers = dict(Counter(name.rsplit(".", 1)[-1] for name in adapted))
    layers: list[Any] = list(adapted.values())
    weights = {id(weight): weight for weight in (layer.get_base_layer().weight for layer in layers)}
    everything = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name)
    record.share = sum(weight.numel() for weight in weights.values()) / everything
    record.parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _open_again(record: Record, job: Path, base: Path, adapter: Path, trained: Any) -> None:
    """The published adapter in PEFT alone."""
    rows = validation_rows(job)
    ids = torch.from_numpy(rows[0][0])[None]
    plain = _plain_model(base, yaml.safe_load(job.read_text())["spec"].get("quantization"))
    record.first_loss_difference = abs(loss_of(plain, rows) / record.losses[0] - 1)
    with torch.no_grad():
        before = plain(input_ids=ids, use_cache=False).logits
    with contextlib.redirect_stderr(io.StringIO()):
        opened = PeftModel.from_pretrained(plain, str(adapter)).eval()
    record.last_loss_difference = abs(loss_of(opened, rows) / min(record.losses[1:]) - 1)
    wanted = {name: weight for name, weight in trained.named_parameters() if "lora_" in name}
    found = dict(opened.named_parameters())
    last_is_best = min(record.losses[1:]) == record.losses[-1]
    record.lost_tensors = [
        name
        for name, weight in wanted.items()
        if name not in found or (last_is_best and not torch.allclose(weight, found[name], atol=1e-6))
    ]
    trained.eval()
    with torch.no_grad():
        after = opened(input_ids=ids, use_cache=False).logits
        if last_is_best:
            record.reload_difference = _difference(trained(input_ids=ids, use_cache=False).logits, after)
        record.effect = _difference(before, after)
        if record.quantization:
            return
        merged = opened.merge_and_unload()
        record.merged_difference = _difference(after, merged(input_ids=ids, use_cache=False).logits)


def _resumed(job: Path, output: Path) -> float:
    """Go on from the checkpoint in the middle, elsewhere; the adapter's difference to that of the whole run."""
    elsewhere = output.with_name("resumed")
    name = f"checkpoints/step-{_MIDDLE:08d}"
    shutil.copytree(output / name, elsewhere / name)
    with contextlib.redirect_stdout(io.StringIO()) as console:
        _run(_with_output(job, elsewhere))
    assert "Resuming from" in console.getvalue()
    return _adapter_difference(output, elsewhere)


def _launched(job: Path, output: Path) -> float:
    """Run it as a user would; the adapter's difference."""
    import subprocess
    import sys

    elsewhere = output.with_name("launched")
    command = [sys.executable, "-m", "finetune_cli", "run", str(_with_output(job, elsewhere))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=job.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return _adapter_difference(output, elsewhere)


def _adapter_difference(one: Path, other: Path) -> float:
    first, second = (load_file(output / "adapter" / "adapter_model.safetensors") for output in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def _job(folder: Path, base: Path, quantization: Quantization | None) -> Path:
    spec = {
        "model_id": str(base),
        "train_path": str(_rows(folder / "train.jsonl", range(16))),
        "valid_path": str(_rows(folder / "valid.jsonl", range(16, 20))),
        **_SETTINGS,
        **({"quantization": quantization} if quantization else {}),
    }
    path = folder / "job.yaml"
    _write_job(path, spec | {"output": {"uri": str(folder / "output")}})
    return path


def _with_output(job: Path, output: Path) -> Path:
    spec = yaml.safe_load(job.read_text())["spec"]
    path = job.with_name(f"{output.name}.yaml")
    # The first run's golden prompts are enough.
    _write_job(path, spec | {"output": {"uri": str(output), "golden": False}})
    return path


def _write_job(path: Path, spec: dict[str, Any]) -> None:
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "model"}}
    path.write_text(yaml.safe_dump(manifest | {"spec": spec}))


def _rows(path: Path, numbers: range) -> Path:
    """Conversations of several lengths that begin alike."""
    rows = []
    for number in numbers:
        asked = f"What is {number} plus {number % 7}?" + " Please." * (number % 4)
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": f"It is {number + number % 7}."},
        ]
        rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows) + "\n")
    return path


def validation_rows(job: Path) -> list[tuple[Any, Any]]:
    """(token ids, whether each is trained) of each row, as the trainer sees them."""
    loaded = load_job_file(job).job
    assert loaded is not None
    spec = loaded.spec
    assert spec.valid_path is not None
    source = data_source(spec, load_model_inputs(spec), spec.valid_path)
    data = TokenizedData(prepare(source, job.parent / "rows").folder)
    # Ids are unsigned there, which embeddings do not take.
    return [(np.asarray(ids, np.int64), trained) for row in range(len(data)) for ids, trained in data.sequences(row)]


def loss_of(model: Any, rows: list[tuple[Any, Any]]) -> float:
    """Mean over trained tokens, one row at a time."""
    total, count = 0.0, 0
    for ids, trained in rows:
        tokens, wanted = torch.from_numpy(ids), torch.from_numpy(np.asarray(trained, bool))[1:]
        with torch.no_grad():
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        total += functional.cross_entropy(logits[wanted].double(), tokens[1:][wanted], reduction="sum").item()
        count += int(wanted.sum())
    return total / count


def _plain_model(base: Path, quantization: Quantization | None) -> Any:
    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    skeleton = build_skeleton(AutoConfig.from_pretrained(base), str(base), trust_remote_code=False)
    config = settings(quantization, torch.float32, skeleton)
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    ).eval()


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
