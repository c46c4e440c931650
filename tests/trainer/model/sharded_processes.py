"""Trains tiny models in several processes that share the base, and the same in one: run by test_sharding.py.

Arguments: a folder for what is written, the number of processes, that of a node, and names of cases. Every process is a
fork of this one, which has imported everything. Writes results.json: of each process what came of each case, by name.
"""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from finetune_api.lora import LoraConfig
from finetune_trainer.model import load_shards
from finetune_trainer.model.adapter_state import adapter_tensors
from finetune_trainer.model.decoder import decoder_of
from finetune_trainer.model.load import load_config, load_model
from finetune_trainer.model.lora import add_lora
from finetune_trainer.model.reach import reached_by_text
from finetune_trainer.model.sharding import begin, gathered, mesh_for, mesh_shape, shard
from finetune_trainer.model.targets import candidates, resolve_targets
from tests.architectures.zoo import build, tiny_model
from tests.fork_server import one_thread
from tests.trainer.model.own_model import save_own_model
from tests.trainer.model.sharded_cases import LOADINGS, TRAININGS, Training

CPU = torch.device("cpu")
ROUNDS = 2
CHUNKS = 3
"""Of the hidden states that go through the head."""

load_shards.PIECE_BYTES = 1000
"""So that tiny tensors come in several pieces."""


def train(case: Training, mesh: DeviceMesh, rank: int, world: int) -> dict[str, Any]:
    """How far loss and gradient of the shared model are from the whole one's, relative; and what was gathered."""
    torch.manual_seed(0)
    base = tiny_model(case.family).requires_grad_(False)
    base.config.use_cache = False
    ids = torch.randint(5, 60, (world, 2, 17))
    config = LoraConfig(lora_dropout=case.dropout, experts=case.experts)
    whole = copy.deepcopy(base)
    shard(base, mesh)
    begin(base)
    reaches = [reached_by_text(model, candidates(model), ids[0, 0].tolist()) for model in (base, whole)]
    targets = resolve_targets(whole, config, reaches[1])
    models = []
    for model in (base, whole):
        torch.manual_seed(1)
        adapted = add_lora(model, config, targets).train()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        if case.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        models.append(adapted)
    rows = [(each, 1.0) for each in ids] if case.own_rows else [(ids[0], 1.0)]
    if case.own_rows:
        rows[-1] = (ids[-1][:1, :1], 0.0)
    found: dict[str, Any] = {}
    losses: list[float] = []
    gradients: list[torch.Tensor] = []
    gathers: Counter[str] = Counter()
    for model, shared in zip(models, (True, False), strict=True):
        mine = [rows[rank]] if shared and case.own_rows else rows
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert not any(isinstance(parameter, DTensor) for parameter in trained)
        optimizer = torch.optim.SGD(trained, lr=0.01)
        for number in range(ROUNDS):
            torch.manual_seed(number)
            optimizer.zero_grad()
            with _counting(gathers) if shared and number == ROUNDS - 1 else nullcontext():
                loss = torch.stack([_pass(model, *row, apart=case.apart) for row in mine]).sum()
            gradient = torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None])
            if shared and case.own_rows:
                dist.all_reduce(gradient)
                dist.all_reduce(loss)
                parts = torch.split(gradient, [parameter.numel() for parameter in trained])
                for parameter, part in zip(trained, parts, strict=True):
                    parameter.grad = part.view_as(parameter)
            losses.append(loss.item())
            gradients.append(gradient)
            optimizer.step()
            with torch.no_grad(), gathered(model.get_base_model()):
                model(input_ids=ids[0], use_cache=False)
    found["loss"] = max(abs(a - b) / abs(b) for a, b in zip(losses[:ROUNDS], losses[ROUNDS:], strict=True))
    found["gradient"] = max(
        float((a - b).norm() / b.norm()) for a, b in zip(gradients[:ROUNDS], gradients[ROUNDS:], strict=True)
    )
    found["reach"] = reaches[0] == reaches[1]
    saved, expected = (adapter_tensors(model) for model in models)
    found["adapter"] = max(float((saved[name] - tensor).abs().max()) for name, tensor in expected.items())
    found["layers"] = base.config.get_text_config().num_hidden_layers
    found["gathers"] = gathers
    shards = [parameter.to_local().numel() for parameter in base.parameters() if isinstance(parameter, DTensor)]
    found["held"] = sum(shards) / sum(parameter.numel() for parameter in whole.parameters())
    return found


def _pass(model: Any, ids: torch.Tensor, weight: float, *, apart: bool) -> torch.Tensor:
    """Forward and backward pass; the loss times its weight."""
    targets = torch.cat([ids[:, 1:], ids[:, :1]], dim=1).flatten()
    base = model.get_base_model()
    mask = torch.ones_like(ids)
    if not apart:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") * weight
        torch.autograd.backward(loss)
        return loss.detach()
    hidden = decoder_of(base)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)
    total, gradient = torch.zeros(()), torch.empty_like(hidden)
    with gathered(base):
        for places in torch.arange(len(hidden)).chunk(CHUNKS):
            leaf = hidden[places].detach().requires_grad_()
            loss = functional.cross_entropy(base.lm_head(leaf), targets[places], reduction="sum") * weight
            (gradient[places],) = torch.autograd.grad(loss, leaf)
            total += loss.detach()
    torch.autograd.backward(hidden, gradient)
    return total


@contextmanager
def _counting(found: Counter[str]) -> Iterator[None]:
    """Adds the names of units that are gathered, as FSDP marks it for profilers; what it calls roots have none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    for event in profile.events():
        if match := re.fullmatch(r"FSDP::all_gather(?: \((.*)\))?", event.name):
            found[match.group(1) or ""] += 1


def load(family: str, folder: Path, mesh: DeviceMesh, rank: int) -> dict[str, Any]:
    """Which tensors differ from those of a model that was loaded whole, and how far what it says differs."""
    own = family == "own"
    arguments: dict[str, Any] = {"trust_remote_code": own, "dtype": torch.bfloat16}
    expected = dict(_tensors(load_model(folder, **arguments)))
    source = load_model(folder, **arguments) if rank == 0 else None
    base = load_shards.load_shards(
        source,
        load_config(folder, trust_remote_code=own),
        mesh=mesh,
        device=CPU,
        name=family,
        from_first=_from_first,
        **arguments,
    )
    found = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in _tensors(base)}
    assert found.keys() == expected.keys()
    wrong = [
        name
        for name, tensor in found.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        logits = base(input_ids=ids, use_cache=False).logits
        wanted = load_model(folder, **arguments)(input_ids=ids, use_cache=False).logits
    left = 0 if source is None else sum(parameter.numel() for parameter in source.parameters())
    return {"wrong": wrong, "same": torch.equal(logits, wanted), "left": left, "training": base.training}


def _tensors(model: Any) -> Any:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _from_first(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def measure(folder: Path, mesh: DeviceMesh, rank: int) -> dict[str, Any]:
    """Bytes of anonymous memory that loading took at most, and those of the whole model."""
    source = load_model(folder, dtype=torch.bfloat16, trust_remote_code=False) if rank == 0 else None
    config = load_config(folder, trust_remote_code=False)
    load_shards.PIECE_BYTES = 2**22
    gc.collect()
    before, most, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        base = load_shards.load_shards(
            source, config, mesh=mesh, device=CPU, dtype=torch.bfloat16, trust_remote_code=False, name="large",
            from_first=_from_first,
        )  # fmt: skip
    finally:
        done.set()
        watcher.join()
    size = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    return {"taken": most - before, "model": size}


def _anonymous() -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("RssAnon"))


def save_large(folder: Path) -> None:
    """A Llama model of 140 MB."""
    config = LlamaConfig(vocab_size=16_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.bfloat16().to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.zero_()
    model.save_pretrained(folder)


def run(rank: int, world: int, local: int, folder: Path, names: list[str]) -> None:
    """One process: the cases, one after the other."""
    one_thread()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    mesh = mesh_for(mesh_shape(world, local, base_bytes=0, memory_bytes=None), CPU)
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, case in TRAININGS.items():
        cases[f"train {name}"] = partial(train, case, mesh, rank, world)
    for name, family in LOADINGS.items():
        cases[f"load {name}"] = partial(load, family, folder / family, mesh, rank)
    cases["measure"] = partial(measure, folder / "large", mesh, rank)
    # A process that fails ends: were it to go on with the next case, the others would take what it sends for another's.
    results = {name: cases[name]() for name in names}
    of_all: list[Any] = [None] * world
    dist.all_gather_object(of_all, results)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(of_all))
    dist.destroy_process_group()


def main() -> None:
    folder, world, local, names = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for family in {family for name, family in LOADINGS.items() if f"load {name}" in names}:
        if family == "own":
            save_own_model(folder / family)
        else:
            build(family, folder / family)
    if "measure" in names:
        save_large(folder / "large")
    processes = [
        multiprocessing.get_context("fork").Process(target=run, args=(rank, world, local, folder, names))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
