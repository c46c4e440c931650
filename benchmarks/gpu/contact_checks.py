"""The checks of a first contact but for speed: exactness, memory and compilation on a GPU that nobody has tried yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.gpu.contact_models import random_base, rows, with_adapter
from benchmarks.gpu.devices import peak_memory, reset_peak, wait_for
from benchmarks.gpu.kernels import TOLERANCES
from finetune_api.outcome import BatchLayout
from finetune_trainer.launch import failures
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import pad
from finetune_trainer.model.flex_tree import flex
from finetune_trainer.model.fused_kernels import can_fuse, fuse_kernels
from finetune_trainer.model.fused_lora import fuse_lora
from finetune_trainer.model.packing import behind_one_prefix, packs_of
from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.model.quantized import values_of
from finetune_trainer.model.tree_attention import Scores, Sight, dense, tree_mask
from finetune_trainer.model.varlen_rows import side_by_side
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import choose
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.memory import KeptBytes
from finetune_trainer.train.steps import free_memory

_VOCABULARY = 32000


@dataclass(frozen=True)
class Setting:
    """Where the checks run."""

    device: torch.device
    small: bool
    """On a CPU, to try the checks themselves."""

    @property
    def model(self) -> tuple[int, int, int, int, int, int]:
        """Sizes of the model that exactness and memory are looked at with."""
        return (2, 64, 128, 4, 2, 512) if self.small else (8, 2048, 5632, 16, 4, _VOCABULARY)

    @property
    def vocabulary(self) -> int:
        """Of that model."""
        return self.model[-1]

    def tokens(self, many: int) -> int:
        """`many`, or few on a CPU."""
        return max(16, many // 32) if self.small else many


@dataclass(frozen=True)
class Finding:
    """An answer."""

    question: str
    found: str
    holds: bool | None
    """None where there is nothing that it would have to be."""


def _adapted(setting: Setting) -> AdaptedModel:
    return with_adapter(random_base(setting.model, setting.device, torch.bfloat16), setting.device)


def _one_pack(setting: Setting, count: int, *, shared: int, own: int, seed: int = 0) -> Pack:
    """All rows in one pack."""
    found = rows(
        count, shared=setting.tokens(shared), own=setting.tokens(own), vocabulary=setting.vocabulary, seed=seed
    )
    (pack,) = packs_of([sequence for row in found for sequence in row], budget=1 << 20, share=True)
    return pack.to(setting.device)


def precision(setting: Setting) -> Iterator[Finding]:
    """In which precision numbers flow."""
    model = _adapted(setting)
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in model.base.named_modules():
        kind = name.rpartition(".")[2] if "layers." in name else ""
        if kind in ("q_proj", "down_proj", "input_layernorm"):
            module.register_forward_hook(lambda _m, _i, out, kind=kind: seen.setdefault(kind, set()).add(out.dtype))
    fuse_lora(model.peft)
    ((row,),) = rows(1, shared=1, own=setting.tokens(512), vocabulary=setting.vocabulary)
    loss, _ = model.loss(pad([row], 0))
    torch.autograd.backward(loss)
    for kind, dtypes in seen.items():
        shown = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        yield Finding(f"what {kind} gives is bfloat16", shown, dtypes == {torch.bfloat16})
    gradients = {parameter.grad.dtype for parameter in model.trained if parameter.grad is not None}
    yield Finding(
        "loss and gradients are float32", f"{loss.dtype}, {gradients}", {loss.dtype} | gradients == {torch.float32}
    )


def attention(setting: Setting) -> Iterator[Finding]:
    """Every kernel beside a dense mask, on what it is used for; backwards on a GPU only."""
    shared = partial(_one_pack, setting)
    window = setting.tokens(512)
    seen = Sight(lambda _b, _h, q, kv: q - kv < window, window)
    heads = torch.linspace(-1, 1, 8, device=setting.device)
    cases: dict[str, tuple[Pack, Sight | None, Scores]] = {
        "rows that share a beginning": (shared(6, shared=1024, own=256), None, Scores(0.125)),
        "rows that share nothing": (shared(6, shared=1, own=512), None, Scores(0.125)),
        "a sliding window": (shared(3, shared=1024, own=512), seen, Scores(0.125)),
        "capped scores": (shared(3, shared=512, own=256), None, Scores(0.125, cap=20.0)),
        "sinks": (shared(3, shared=512, own=256), None, Scores(0.125, sinks=heads)),
    }
    for name, (pack, sight, scores) in cases.items():
        yield _kernel_is_dense(f"{name}: flex", setting, flex, pack, sight, scores)
    found = rows(2, shared=setting.tokens(1024), own=setting.tokens(256), vocabulary=setting.vocabulary)
    prefixed = behind_one_prefix([sequence for row in found for sequence in row])
    if prefixed is not None:
        behind = prefixed.packs[0].to(setting.device)
        yield _kernel_is_dense("a pack behind a prefix: flex", setting, flex, behind, None, Scores(0.125))
    if not setting.small:  # FlashAttention is for GPUs only.
        alone = shared(6, shared=0, own=512)
        yield _kernel_is_dense("rows side by side: FlashAttention", setting, side_by_side, alone, None, Scores(0.125))


def _kernel_is_dense(
    name: str, setting: Setting, kernel: Callable[..., Any], pack: Pack, sight: Sight | None, scores: Scores
) -> Finding:
    worst = _against_dense(setting, kernel, pack, sight, scores)
    return Finding(f"{name} is dense", f"{worst:.1e} apart", worst <= TOLERANCES[torch.bfloat16])


def _against_dense(
    setting: Setting, kernel: Callable[..., Any], pack: Pack, sight: Sight | None, scores: Scores
) -> float:
    """Largest relative difference of result and gradients."""
    learns = not setting.small
    generator = torch.Generator(setting.device).manual_seed(0)

    def drawn(count: int, before: int = 0) -> torch.Tensor:
        shape = (1, count, before + pack.tokens, 64)
        made = torch.randn(shape, generator=generator, device=setting.device, dtype=torch.bfloat16)
        return made.requires_grad_(learns)

    inputs = drawn(8), drawn(2, pack.before), drawn(2, pack.before)
    upstream = torch.randn_like(inputs[0])
    outcomes = [
        [out, *(torch.autograd.grad(out, inputs, upstream) if learns else ())]
        for out in (kernel(*inputs, pack, sight, scores), dense(*inputs, tree_mask(pack, sight), scores))
    ]
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*outcomes, strict=True))


def fused_lora(setting: Setting) -> Iterator[Finding]:
    """A fused layer beside PEFT's, both against float64, and their times forwards and backwards."""
    size, tokens = (64, 128) if setting.small else (4096, 4096)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(size, size, bias=False)).to(setting.device, torch.bfloat16)
    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=False, lora_dropout=0.0)
    layer = get_peft_model(base.requires_grad_(False), config).to(setting.device)
    x = torch.randn(tokens, size, device=setting.device, dtype=torch.bfloat16)
    exact = [each.double() for each in _layer_outcome(layer.double(), x.double(), half=False)]
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    errors, seconds = {}, {}
    for name in ("PEFT", "fused"):
        if name == "fused":
            fuse_lora(layer)
        found = _layer_outcome(layer, x, half=True)
        errors[name] = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        seconds[name] = _timed(setting, lambda: _layer_outcome(layer, x, half=True))
    shown = f"{errors['fused']:.1e}, PEFT {errors['PEFT']:.1e}"
    yield Finding("a fused layer is as exact as PEFT's", shown, errors["fused"] <= 1.5 * errors["PEFT"])
    yield Finding(
        "and faster",
        f"{seconds['PEFT'] / seconds['fused']:.2f} times as fast",
        None if setting.small else seconds["fused"] < seconds["PEFT"],
    )


def fused_kernels(setting: Setting) -> Iterator[Finding]:
    """What Liger's kernels stand for in a model, how far it is then from what it was, and the time of both."""
    model = _adapted(setting)
    if not can_fuse(setting.device):
        yield Finding("Liger's kernels", "not installed, or no GPU", None)
        return
    found = rows(1, shared=1, own=setting.tokens(2048), vocabulary=setting.vocabulary)
    batches = [pad(row, 0) for row in found]
    own, apart, seconds = _model_outcome(model, batches), 0.0, {}
    for name in ("own", "fused"):
        if name == "fused":
            kernels = fuse_kernels(model.base.get_decoder(), setting.device, torch.bfloat16)
            replaced = (
                f"{len(kernels.norms)} norms, {len(kernels.gated)} gated units, rotary {kernels.rotary is not None}"
            )
            expected = bool(kernels.norms and kernels.gated and kernels.rotary)
            yield Finding("Liger's kernels stand for norms, units and rotary embeddings", replaced, expected)
            fused = _model_outcome(model, batches)
            apart = float((fused - own).norm() / own.norm())
        seconds[name] = _timed(setting, lambda: _model_outcome(model, batches))
    yield Finding("gradients stay within bfloat16's noise", f"{apart:.1e} apart", apart < 0.1)
    yield Finding("and it is faster", f"{seconds['own'] / seconds['fused']:.2f} times as fast", None)


def _model_outcome(model: AdaptedModel, batches: list[Any]) -> torch.Tensor:
    """The whole gradient."""
    model.peft.zero_grad()
    model.backward(batches)
    return torch.cat([each.grad.flatten() for each in model.trained if each.grad is not None])


def _layer_outcome(layer: Any, x: torch.Tensor, *, half: bool) -> list[torch.Tensor]:
    taken = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        out = layer(taken)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [taken, *trained], torch.ones_like(out))]


def _timed(setting: Setting, run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds, after one more."""
    found = []
    for _ in range(repeats + 1):
        wait_for(setting.device)
        began = time.perf_counter()
        run()
        wait_for(setting.device)
        found.append(time.perf_counter() - began)
    return sorted(found[1:])[repeats // 2]


def gate(setting: Setting) -> Iterator[Finding]:
    """What the gate says of packs in bfloat16."""
    model = _adapted(setting)
    found = rows(8, shared=setting.tokens(512), own=setting.tokens(256), vocabulary=setting.vocabulary)
    batching = Batching(BatchLayout.SHARED_PREFIX, tokens_per_pack=0, rows_per_batch=2, pad_id=0)
    choice = choose(model, Ranks(), found, batching, checkpointing=None, longest=max(len(row[0][0]) for row in found))
    verdict = choice.verdict
    yield Finding(
        "packs are let pass",
        f"{verdict.layout}, loss {verdict.loss_difference:.1e} and gradients {verdict.gradient_difference:.1e} apart"
        + (f"; {verdict.refused}" if verdict.refused else ""),
        verdict.layout is BatchLayout.SHARED_PREFIX,
    )
    yield Finding("time of the gate", f"{verdict.seconds:.1f} s, compilation in it", holds=None)


def memory(setting: Setting) -> Iterator[Finding]:
    """What the backward pass keeps of a token, as counted, beside what the allocator says."""
    model = _adapted(setting)
    model.take_packs()
    fuse_lora(model.peft)
    packs = [_one_pack(setting, count, shared=1, own=512) for count in (4, 12)]
    counted, taken = [], []
    for pack in packs:
        model.backward([pack])
        model.peft.zero_grad()
        counter = KeptBytes(model.peft)
        reset_peak(setting.device)
        before = torch.cuda.memory_allocated(setting.device) if not setting.small else 0
        with counter.counting():
            model.backward([pack])
        peak = peak_memory(setting.device)
        counted.append(counter.total)
        taken.append(peak.allocated - before if peak else 0)
        model.peft.zero_grad()
    tokens = packs[1].tokens - packs[0].tokens
    estimate, allocator = ((found[1] - found[0]) / tokens for found in (counted, taken))
    share = allocator / estimate
    yield Finding(
        "what is kept of a token, as counted and as allocated",
        f"{estimate / 1024:.0f} KiB counted, {allocator / 1024:.0f} KiB more at the peak ({share:.2f})",
        None if setting.small else share < 1 / 0.6,
    )


def out_of_memory(setting: Setting) -> Iterator[Finding]:
    """A pack that does not fit is told from other errors, and half of it runs afterwards."""
    if setting.small:
        yield Finding("a step goes on in halves", "on a GPU only", holds=None)
        return
    model = _adapted(setting)
    model.take_packs()
    count, halvings = 256, 0
    total = torch.cuda.get_device_properties(setting.device).total_memory
    wanted = torch.cuda.memory_allocated(setting.device) + 3 * 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / total), setting.device)
    try:
        while count > 1:
            try:
                model.backward([_one_pack(setting, count, shared=1, own=512)])
                break
            except RuntimeError as error:
                if failures.out_of_memory(error, 0) is None:
                    raise
            # Outside of the handler, whose traceback keeps what was computed.
            model.peft.zero_grad()
            free_memory(setting.device)
            count, halvings = count // 2, halvings + 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    yield Finding("a step goes on in halves", f"{halvings} halvings, to {count} rows", halvings > 0 and count > 1)


def compilation(setting: Setting) -> Iterator[Finding]:
    """Graphs that packs of many sizes have made."""
    from torch._dynamo.utils import counters

    model = _adapted(setting)
    model.take_packs()
    fuse_lora(model.peft)
    made = []
    for number in range(12):
        before = counters["stats"]["unique_graphs"]
        model.backward([_one_pack(setting, 2 + number, shared=64 * number + 1, own=200 + 30 * number, seed=number)])
        made.append(counters["stats"]["unique_graphs"] - before)
    late = sum(made[6:])
    yield Finding("no graph is made after six packs", f"{made} graphs by pack", late == 0)


def _with_values(x: torch.Tensor, layer: Any) -> torch.Tensor:
    return x @ values_of(layer, torch.bfloat16).T


def quantization(setting: Setting) -> Iterator[Finding]:
    """nf4 and int8: a layer with its codes' values beside bitsandbytes' own, and the time of both."""
    import bitsandbytes

    library: Any = bitsandbytes.nn

    inner, outer, tokens = (64, 128, 32) if setting.small else (4096, 14336, 4096)
    weight = torch.randn(outer, inner) / inner**0.5
    x = torch.randn(tokens, inner, device=setting.device, dtype=torch.bfloat16)
    made: dict[str, Any] = {
        "nf4": library.Linear4bit(inner, outer, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"),
        "int8": library.Linear8bitLt(inner, outer, bias=False, has_fp16_weights=False, threshold=6.0),
    }
    for kind, layer in made.items():
        layer.weight.data = weight.clone()
        layer.requires_grad_(requires_grad=False)
        layer.to(setting.device)
        values = values_of(layer, torch.bfloat16)
        lost = float((values.float() - weight.to(setting.device)).norm() / weight.norm())
        yield Finding(
            f"{kind}: what quantization loses",
            f"{lost:.3f} of the weight's norm",
            lost < (0.02 if kind == "int8" else 0.15),
        )
        with torch.no_grad():
            apart = float(
                (layer(x).float() - x.float() @ values.float().T).norm() / (x.float() @ values.float().T).norm()
            )
            ours = _timed(setting, partial(_with_values, x, layer))
            theirs = _timed(setting, partial(layer, x))
        # LLM.int8() rounds the input as well.
        yield Finding(
            f"{kind}: bitsandbytes' own product", f"{apart:.1e} apart", apart < (2e-2 if kind == "nf4" else 0.1)
        )
        yield Finding(f"{kind}: time of ours to theirs", f"{ours / theirs:.2f}", holds=None)
