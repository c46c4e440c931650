"""The loss of a pack, computed inside the base model's own forward.

PEFT and DDP hand keyword arguments through to it, so their hooks see one ordinary forward. The output head runs through
the model's code after the decoder, whatever that does to its logits, on the hidden states that predict something and on
a bounded number of them at a time: the logits of a pack never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from finetune_trainer.model.decoder import decoder_of
from finetune_trainer.model.loss import correct_targets, summed_loss
from finetune_trainer.model.packed_attention import PackingRefusedError, attending, attention_calls, follow
from finetune_trainer.model.places import position_ids, takes
from finetune_trainer.model.prefix_tree import Pack

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that exist at a time, by kind of device: 64 and 512 MiB in float32. Each chunk reads the head's weights."""

Head = Callable[[torch.Tensor], Any]
"""Hidden states [n, H] -> logits [n, V]."""


def take_packs(base: Any) -> None:
    """Make `base`, a causal language model, answer `base(pack=pack)` with (loss, correct); see `pack_loss`."""
    original = base.forward

    def forward(*args: Any, pack: Pack | None = None, **others: Any) -> Any:
        return original(*args, **others) if pack is None else pack_loss(base, original, pack)

    base.forward = forward


def pack_loss(base: Any, original: Callable[..., Any], pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropies of a pack, and how many targets the model ranks first.

    Args:
        base: the causal language model.
        original: its forward.
        pack: N predictions; `attending(pack)` has to be in force.

    Returns:
        loss float32 [], in nats, and correct int64 [] (0 while gradients are recorded, when nobody asks for it).

    Raises:
        PackingRefusedError: the model is not built as this needs it.
    """
    decoder = decoder_of(base)
    follow(decoder, pack)
    # With a mask of ones transformers does not look for packs of its own in the position ids.
    others: dict[str, Any] = {"attention_mask": torch.ones_like(pack.input_ids)}
    if takes(decoder, "position_ids"):
        others["position_ids"] = position_ids(decoder, pack)
    found = decoder(input_ids=pack.input_ids, use_cache=False, **others)
    if not attention_calls():
        raise PackingRefusedError("it asks transformers for neither attention nor masks")
    hidden = found.last_hidden_state[0].index_select(0, pack.sources)

    def head(states: torch.Tensor) -> Any:
        return _after_decoder(original, decoder, found, states, pack)

    inner = {id(parameter) for parameter in decoder.parameters()}
    learns = any(parameter.requires_grad and id(parameter) not in inner for parameter in base.parameters())
    rows = max(1, CHUNK_LOGITS[hidden.device.type] // base.config.get_text_config().vocab_size)
    if not torch.is_grad_enabled():
        return _evaluated(hidden, pack.targets, head, rows)
    if learns:
        parts = _chunks(hidden, pack.targets, rows)
        loss = torch.stack([checkpoint(_head_loss, head, *part, use_reentrant=False) for part in parts]).sum()
    else:
        loss = _FrozenHead.apply(hidden, pack.targets, head, rows)  # type: ignore[no-untyped-call]  # torch's
    return loss, torch.zeros((), dtype=torch.int64, device=loss.device)


def _after_decoder(original: Callable[..., Any], decoder: Any, found: Any, states: torch.Tensor, pack: Pack) -> Any:
    """Logits [n, V] of hidden states [n, H], by the model's own forward with the decoder's work done already."""
    stood_in = False

    def answer(*_: Any, **__: Any) -> Any:
        nonlocal stood_in
        stood_in = True
        return type(found)(last_hidden_state=states[None])

    before = vars(decoder).get("forward")
    decoder.forward = answer
    try:
        # What else it makes is of one token, and of no pack.
        with attending(None):
            logits = original(input_ids=pack.input_ids[:, :1], use_cache=False).logits[0]
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before
    if not stood_in or len(logits) != len(states):
        raise PackingRefusedError("its output head is not behind its decoder")
    return logits


class _FrozenHead(torch.autograd.Function):
    """Where the head learns nothing, the gradient of its input is all that the backward pass needs: it is computed
    with the loss, and no logits are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for number, (states, wanted) in enumerate(_chunks(hidden, targets, rows)):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                loss = _head_loss(head, leaf, wanted)
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


def _head_loss(head: Head, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return summed_loss(head(states), targets)


def _evaluated(hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    loss = torch.zeros((), device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for states, wanted in _chunks(hidden, targets, rows):
        logits = head(states)
        loss += summed_loss(logits, wanted)
        correct += correct_targets(logits, wanted)
    return loss, correct
