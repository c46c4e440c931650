"""From hidden states to the loss: the output head, run by the model's own code on a bounded number of them at a time.

The logits of a pack never exist all at once, and whatever a model does to its logits (scaling, caps) is done. The head
runs behind the decoder's forward pass, not inside it: where the decoder is sharded, a backward pass in its midst would
end what FSDP fetches ahead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from finetune_trainer.model.loss import Loss, correct_targets, summed_loss
from finetune_trainer.model.packed_attention import PackingRefusedError

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that exist at a time, by kind of device: 64 and 512 MiB in float32. Each chunk reads the head's weights."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class Head:
    """A causal language model but for its decoder: logits of hidden states.

    Args:
        base: the model.
        decoder: the part of it that makes hidden states.
    """

    def __init__(self, base: Any, decoder: Any) -> None:
        path = next(path for path, module in base.named_modules() if module is decoder)
        inner = {id(parameter) for parameter in decoder.parameters()}
        self.learns = any(parameter.requires_grad and id(parameter) not in inner for parameter in base.parameters())
        self._vocabulary = base.config.get_text_config().vocab_size
        # The same modules and weights in another tree, whose decoder hands on what it is given.
        self._given = _twin(decoder)
        for name in _HOOKS:
            setattr(self._given, name, OrderedDict())
        self._given.forward = self._answer
        self._model = _with(base, path.split(".") if path else [], self._given)
        self._found: Any = None

    def logits(self, found: Any, states: torch.Tensor) -> torch.Tensor:
        """Logits [n, V].

        Args:
            found: what the decoder returned.
            states: hidden states [n, H].

        Raises:
            PackingRefusedError: the head is not behind the decoder.
        """
        self._found = type(found)(last_hidden_state=states[None])
        token = torch.zeros((1, 1), dtype=torch.int64, device=states.device)
        logits: torch.Tensor = self._model.forward(input_ids=token, use_cache=False).logits[0]
        if self._found is not None or len(logits) != len(states):
            raise PackingRefusedError("its output head is not behind its decoder")
        return logits

    def loss(
        self,
        found: Any,
        sources: torch.Tensor,
        targets: torch.Tensor,
        gathered: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Loss:
        """Sum of the cross-entropies in nats, float32 [], and how many targets are ranked first, int64 [].

        Args:
            found: what the decoder returned.
            sources: int64 [N], the tokens whose hidden states predict.
            targets: int64 [N].
            gathered: makes the context in which the head's weights are whole.
        """
        hidden = found.last_hidden_state[0].index_select(0, sources)
        rows = max(1, CHUNK_LOGITS[hidden.device.type] // self._vocabulary)

        def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return summed_loss(self.logits(found, states), wanted)

        with gathered():
            if not torch.is_grad_enabled():
                return self._evaluated(found, hidden, targets, rows)
            if self.learns:
                parts = _chunks(hidden, targets, rows)
                loss = torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum()
            else:
                loss = _FrozenHead.apply(hidden, targets, part, rows)  # type: ignore[no-untyped-call]  # torch's
        return loss, torch.zeros((), dtype=torch.int64, device=loss.device)

    def _evaluated(self, found: Any, hidden: torch.Tensor, targets: torch.Tensor, rows: int) -> Loss:
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for states, wanted in _chunks(hidden, targets, rows):
            logits = self.logits(found, states)
            loss += summed_loss(logits, wanted)
            correct += correct_targets(logits, wanted)
        return loss, correct

    def _answer(self, *_: Any, **__: Any) -> Any:
        found, self._found = self._found, None
        return found


class _FrozenHead(torch.autograd.Function):
    """Where the head learns nothing, the gradient of its input is all that the backward pass needs: it is computed
    with the loss, and no logits are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, part: Callable[..., torch.Tensor], rows: int
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for number, (states, wanted) in enumerate(_chunks(hidden, targets, rows)):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                loss = part(leaf, wanted)
            (gradient[number * rows : number * rows + len(states)],) = torch.autograd.grad(loss, leaf)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        # The scale is one over a number of tokens, which half precision would round.
        precise = torch.promote_types(gradient.dtype, torch.float32)
        return (gradient * scale.to(precise)).to(gradient.dtype), None, None, None


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(0, len(targets), rows):
        yield hidden[first : first + rows], targets[first : first + rows]


def _twin(module: Any) -> Any:
    """Another module with the same weights and parts."""
    # Not by copy.copy: the classes that FSDP makes do not bear it.
    twin: Any = object.__new__(type(module))
    vars(twin).update(vars(module), _modules=dict(module._modules))  # noqa: SLF001  there is no public way
    return twin


def _with(module: Any, path: list[str], part: Any) -> Any:
    """A twin of `module` with `part` at `path`."""
    if not path:
        return part
    twin, (name, *rest) = _twin(module), path
    twin._modules[name] = _with(module._modules[name], rest, part)  # noqa: SLF001  as above
    return twin
