"""What a model answers when it always takes the most probable token, with how sure it was of each.

Tokens are those of a plain pass over the whole text, as in training. Generation with a cache proposes them, which is
many times faster; where it proposes otherwise, or a model cannot do it, the plain pass decides alone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_PATIENCE = 3
"""Wrong proposals after which a model's cache is not trusted any more."""

_LARGEST_MARGIN = 1e4
"""In nats; models that rule tokens out give them minus infinity."""


@dataclass(frozen=True)
class Continuation:
    """A greedy answer."""

    ids: list[int]
    logprobs: list[float]
    """Of each token, in nats."""
    margins: list[float]
    """Nats between each token and the best other one; 0 in a tie."""
    scale: float
    """The largest logit of a token, in absolute value: what rounding is relative to."""


class Greedy:
    """Answers of one model, one prompt at a time.

    Args:
        model: a causal language model, possibly a PeftModel, in evaluation mode.
        stop_ids: tokens that end an answer.
        ended: whether an answer is at its end, for stops that are no token.
        deadline: `clock` value after which answers are cut off.
        clock: seconds.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        ended: Callable[[list[int]], bool],
        deadline: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._stop_ids = frozenset(stop_ids)
        self._text_ended = ended
        self._deadline = deadline
        self._clock = clock
        self._wrong_proposals = 0
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # The class's own: a training model's forward is wrapped.
        self._keep = "logits_to_keep" in inspect.signature(type(base).forward).parameters
        self._base = base

    def ended(self, ids: list[int]) -> bool:
        """Whether `ids` ends with a stop."""
        return bool(ids) and (ids[-1] in self._stop_ids or self._text_ended(ids))

    def answer(self, prompt: Sequence[int], limit: int) -> Continuation:
        """The answer to the token ids `prompt`, the stop included, at most `limit` >= 1 tokens.

        Raises:
            Exception: whatever the model raises in a plain pass.
        """
        ids: list[int] = []
        while True:
            proposed = [*ids, *self._proposal([*prompt, *ids], limit - len(ids))]
            proposed = self._up_to_end(proposed)
            logits = self._logits(prompt, proposed)  # [len(proposed) + 1, V]
            best = logits.argmax(dim=-1).tolist()
            agreed = len(ids)
            while agreed < len(proposed) and proposed[agreed] == best[agreed]:
                agreed += 1
            ids = proposed[:agreed]
            if not self.ended(ids) and len(ids) < limit:
                ids = [*ids, best[agreed]]
            if agreed < len(proposed):
                self._wrong_proposals += 1
            if self.ended(ids) or len(ids) >= limit or self._clock() > self._deadline:
                return _measured(ids, logits[: len(ids)])

    def _up_to_end(self, ids: list[int]) -> list[int]:
        return next((ids[:length] for length in range(1, len(ids) + 1) if self.ended(ids[:length])), ids)

    def _logits(self, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        """Logits float32 [len(ids) + 1, V] that predict each of `ids` and the token after them."""
        count = len(ids) + 1
        tokens = self._tensor([*prompt, *ids])
        extra = {"logits_to_keep": count} if self._keep else {}
        with torch.inference_mode():
            found = self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **extra)
        return found.logits[0, -count:].float()  # type: ignore[no-any-return]  # the model's

    def _proposal(self, tokens: Sequence[int], limit: int) -> list[int]:
        """What generation with a cache goes on with; empty where the model cannot, or was wrong before."""
        from transformers import GenerationConfig

        if self._wrong_proposals >= _PATIENCE or not hasattr(self._base, "generate"):
            return []
        ends = sorted(self._stop_ids)
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        given = self._tensor(tokens)
        try:
            with torch.inference_mode(), _plain_generation(self._base):
                found = self._model.generate(
                    input_ids=given, attention_mask=torch.ones_like(given), generation_config=config
                )
        except Exception:  # The plain pass tells whether the model works at all.
            self._wrong_proposals = _PATIENCE
            return []
        proposed: list[int] = found[0, len(tokens) :].tolist()
        return proposed

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        """int64 [1, L] on the model's device."""
        return torch.tensor([list(ids)], device=next(self._model.parameters()).device)


@contextmanager
def _plain_generation(base: Any) -> Iterator[None]:
    """Within the block neither the model's defaults (penalties, sampling) nor a wrapped forward have a part."""
    from transformers import GenerationConfig

    known, wrapped = getattr(base, "generation_config", None), vars(base).pop("forward", None)
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = known
        if wrapped is not None:
            base.forward = wrapped


def _measured(ids: list[int], logits: torch.Tensor) -> Continuation:
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    logprobs = logits.log_softmax(dim=-1).gather(1, chosen).flatten()
    of_chosen = logits.gather(1, chosen).flatten()
    others = logits.scatter(1, chosen, -torch.inf).amax(dim=-1)
    margins = (of_chosen - others).clamp(min=0.0, max=_LARGEST_MARGIN)
    return Continuation(ids, logprobs.tolist(), margins.tolist(), float(of_chosen.abs().max()))
