"""Norms, rotary embeddings and gated units by Liger's kernels on GPUs, each in one pass over memory instead of five.

Which module of a model computes what one of them computes is not told by names: the candidates of a module are tried on
numbers, result and gradient, beside its own code, and the closest is used where it is as close as rounding makes it.
What the model trains is measured as a whole afterwards, by the gate. Liger's losses are not used: the head has its own.
https://github.com/linkedin/Liger-Kernel
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from finetune_trainer.model.decoder import code_of
from finetune_trainer.model.modes import modes_kept

_CLOSE = {torch.float32: 1e-5}
"""Relative difference of result and gradient up to which two ways to compute are one."""
_CLOSE_HALF = 1e-2
_ROTARY = "apply_rotary_pos_emb"
_TOKENS = 5
_SCALES = 1.0, 30.0, 1000.0
"""Of what a module is tried on: one that clamps is another only for large numbers."""


@dataclass
class FusedKernels:
    """What was replaced in one model, for as long as it is."""

    norms: list[nn.Module] = field(default_factory=list)
    gated: list[nn.Module] = field(default_factory=list)
    rotary: tuple[Any, Callable[..., Any]] | None = None
    """The code that the decoder's layers are in, and its own function."""

    def undo(self) -> None:
        """Leave the model as it was."""
        for module in (*self.norms, *self.gated):
            vars(module).pop("forward", None)
        if self.rotary is not None:
            setattr(self.rotary[0], _ROTARY, self.rotary[1])
        self.norms, self.gated, self.rotary = [], [], None


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels run there and are installed."""
    return device.type == "cuda" and find_spec("liger_kernel") is not None


def fuse_kernels(decoder: Any, device: torch.device, dtype: torch.dtype) -> FusedKernels:
    """Replace what a kernel computes as `decoder` does.

    Args:
        decoder: whole on `device`, not sharded.
        device: one that `can_fuse`.
        dtype: of the activations.
    """
    found = FusedKernels()
    kinds: dict[tuple[Any, ...], Callable[..., torch.Tensor] | None] = {}
    candidates: tuple[Callable[..., torch.Tensor], ...]
    for module in decoder.modules():
        if "forward" in vars(module) or not _takes_one_argument(module):
            continue
        size = _norm_size(module)
        if size is not None:
            candidates, replaced = _NORMS, found.norms
        elif _is_gated(module):
            size, candidates, replaced = module.gate_proj.in_features, (_gated,), found.gated
        else:
            continue
        kind = type(module), size, _settings(module)
        if kind not in kinds:
            kinds[kind] = _closest(module, candidates, (1, _TOKENS, size), device, dtype)
        if (forward := kinds[kind]) is not None:
            module.forward = partial(forward, module)
            replaced.append(module)
    found.rotary = _fuse_rotary(decoder, device, dtype)
    return found


def _takes_one_argument(module: nn.Module) -> bool:
    """Of others it cannot be known what their callers pass: norms of state-space layers may be given a gate."""
    return len(inspect.signature(type(module).forward).parameters) == len(("self", "x"))


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Numbers and names that a module keeps; layers of one class may differ in them."""
    found = ((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str))
    return tuple(sorted((name, value) for name, value in found if name != "training"))


def _norm_size(module: nn.Module) -> int | None:
    """Features of what looks like a norm by root mean squares: a weight for each, an epsilon, and nothing else."""
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    if weight is None or weight.ndim != 1 or parameters or _epsilon(module) is None or isinstance(module, nn.LayerNorm):
        return None
    return len(weight)


def _epsilon(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in found if isinstance(value, float)), None)


def _norm(offset: float, casting: str, module: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: what comes back for the result may be somebody else's too.
    out: torch.Tensor = LigerRMSNormFunction.apply(x, module.weight, _epsilon(module), offset, casting, False)
    return out


_NORMS: tuple[Callable[..., torch.Tensor], ...] = tuple(
    partial(_norm, *each) for each in ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"))
)
"""Llama rounds before it multiplies by the weight, Gemma afterwards, with weights around 0 or around 1."""


def _is_gated(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    return {"gate_proj", "up_proj", "down_proj"} <= names and hasattr(module.gate_proj, "in_features")


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    out: torch.Tensor = module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x), 1.0, 1.0))
    return out


def _fuse_rotary(decoder: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, Callable[..., Any]] | None:
    from liger_kernel.ops.rope import LigerRopeFunction

    code = code_of(decoder)
    own, embedding = getattr(code, _ROTARY, None), getattr(decoder, "rotary_emb", None)
    if own is None or embedding is None or hasattr(own, "fused"):
        return None

    def fused(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **others: Any) -> Any:
        if args or others or not can_fuse(q.device):
            return own(q, k, cos, sin, *args, **others)
        return LigerRopeFunction.apply(q, k, cos, sin)

    fused.fused = True  # type: ignore[attr-defined]  # so that it is not replaced once more
    config = decoder.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def outcome(rotate: Callable[..., Any]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        q, k = (_drawn((1, heads, _TOKENS, size), device, dtype) for heads in (4, 2))
        places = torch.arange(3, 3 + _TOKENS, device=device)[None]
        cos, sin = embedding(q[:, 0], position_ids=places)
        # What a layer hands over is no leaf, and may be computed in place.
        out = rotate(q.clone(), k.clone(), cos, sin)
        return [*out, *torch.autograd.grad(out, [q, k], [_drawn(each.shape, device, dtype) for each in out])]

    with _trial(device):
        try:
            apart = _apart(outcome(own), outcome(LigerRopeFunction.apply))
        except Exception:  # Signatures that nobody here has seen.
            return None
    if apart > _CLOSE.get(dtype, _CLOSE_HALF):
        return None
    setattr(code, _ROTARY, fused)
    return code, own


def _closest(
    module: Any,
    candidates: Iterable[Callable[..., torch.Tensor]],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[..., torch.Tensor] | None:
    """The candidate that computes what `module` does; None where none does."""

    def outcome(forward: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        found = []
        torch.manual_seed(0)
        for scale in _SCALES:
            x = (_drawn(shape, device, dtype) * scale).detach().requires_grad_()
            out = forward(x)
            # Not of its square, which no norm lets change.
            found += [out, *torch.autograd.grad(out, x, _drawn(out.shape, device, out.dtype))]
        return found

    # With dropout: where the module's own code drops something, that is another result.
    with _trial(device), modes_kept(module):
        module.train()
        try:
            own = outcome(module.forward)
            found = [(_apart(own, outcome(partial(each, module))), each) for each in candidates]
        except Exception:  # Model code that nobody here has seen, and kernels.
            return None
    apart, best = min(found, key=lambda each: each[0])
    return best if apart <= _CLOSE.get(dtype, _CLOSE_HALF) else None


@contextmanager
def _trial(device: torch.device) -> Iterator[None]:
    """Random numbers drawn in here are given back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        yield


def _drawn(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def _apart(own: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest relative difference; infinite where shapes or precisions are not the same."""
    if [(each.shape, each.dtype) for each in own] != [(each.shape, each.dtype) for each in other]:
        return float("inf")
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(own, other, strict=True)]
    return max(float((b - a).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)
