"""Which LoRA layers the text reaches: those of a vision tower, or of attention to an encoder, never get a gradient.

DDP waits for the gradient of every trained tensor, and an adapter with tensors that cannot learn is not what it seems.
No list of models tells it; a forward and a backward pass over real rows do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def unreached_layers(model: Any, run: Callable[[], None]) -> list[str]:
    """Full paths in the base model of the LoRA layers that got no gradient and would get none from other rows.

    An expert that these rows were not sent to is not among them. The gradients of `run` are dropped.

    Args:
        model: a PeftModel that nothing wraps yet.
        run: one forward and one backward pass, or several.
    """
    base: nn.Module = model.get_base_model()
    modules = dict(base.named_modules())
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in modules.values()]
    try:
        run()
        return [
            path
            for path, module in modules.items()
            if (learned := _learned(module))
            and all(parameter.grad is None for parameter in learned)
            and (module in called or not _was_passed_over(path, modules, called))
        ]
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()


def _learned(module: nn.Module) -> list[nn.Parameter]:
    """The B matrices of a LoRA layer: A gets a gradient of zero as long as B is zero, and B a true one."""
    holders = (getattr(module, name, None) for name in ("lora_B", "lora_embedding_B"))
    return [
        parameter
        for holder in holders
        if isinstance(holder, nn.Module)
        for parameter in holder.parameters()
        if parameter.requires_grad
    ]


def _was_passed_over(path: str, modules: dict[str, nn.Module], called: set[nn.Module]) -> bool:
    """Whether it belongs to one of several equals, of which others were chosen: an expert among experts.

    The layers of a list that differ in class are no equals: those that attend to images are left out for any text.
    """
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        owner = modules[".".join(parts[: end - 1])]
        if isinstance(owner, nn.ModuleList):
            own = modules[".".join(parts[:end])]
            if own in called:
                return False
            return any(other in called for other in owner if type(other) is type(own))
    return False
