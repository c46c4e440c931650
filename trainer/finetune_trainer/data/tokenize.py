"""Rendered text -> token ids and loss mask, so that prompting the trained model equals training it.

A row's text is tokenized whole. Where the tokens of an inference prompt are not a prefix of that (a token straddles
the seam between prompt and answer, or the tokenizer decides otherwise without the rest), the text is tokenized again,
split at the seam. One sequence cannot be split for two turns at once, so such a row becomes several sequences, each
training the turns whose prompt it really begins with.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from finetune_api.prompt_format import Rendering, Turn

_CACHED_TAIL_CHARACTERS = 256
"""Longest text between a special token and a seam whose tokens are remembered; headers are far shorter."""

_CACHE_ENTRIES = 50_000

# Put in front of a text that must be tokenized as if something came before it; see `_continuation`.
_SENTINELS = ("\n", "<", "0", "a")


class FastTokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is used here."""

    def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> list[Any]:
        """Encodings with `ids` and `offsets` for each text."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizedSequence:
    """Token ids with the loss mask of the same length: True where the model must produce the token."""

    ids: list[int]
    trained: list[bool]
    prompt_length: int
    """Tokens of the inference prompt of the last turn that is trained here; `ids[:prompt_length]` is that prompt."""

    def truncated(self, length: int) -> TokenizedSequence:
        """The first `length` tokens."""
        return TokenizedSequence(self.ids[:length], self.trained[:length], min(self.prompt_length, length))


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One row: usually one sequence; more where one sequence could not begin with every turn's prompt."""

    sequences: tuple[TokenizedSequence, ...]
    """The sequence with the whole text comes first."""
    retokenized: bool
    """Whether any turn had to be tokenized again, split at its seam."""


@dataclass(slots=True)
class _Encoded:
    """Tokens of a text with their character positions."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass
class RowTokenizer:
    """Tokenizes rendered rows with one tokenizer."""

    backend: FastTokenizer
    special_ids: frozenset[int]
    """Ids that the tokenizer cuts out of the text before anything else, so tokens never reach across them."""
    _tails: dict[str, list[int]] = field(default_factory=dict)

    def tokenize(self, renderings: Sequence[Rendering], *, train_all: bool = False) -> list[TokenizedRow]:
        """Tokenize a batch of rows.

        Args:
            renderings: the rows' texts with a leading BOS where one is due.
            train_all: causal language modelling: every token but the first is trained.
        """
        encoded = self._encode([rendering.text for rendering in renderings])
        if train_all:
            return [
                TokenizedRow((_all_trained(tokens, rendering),), False)
                for tokens, rendering in zip(encoded, renderings, strict=True)
            ]
        self._remember_tails(encoded, renderings)
        return [self._row(tokens, rendering) for tokens, rendering in zip(encoded, renderings, strict=True)]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of an inference prompt, as a server makes them from the same text."""
        return self._encode([prompt])[0].ids

    def _encode(self, texts: list[str]) -> list[_Encoded]:
        found = []
        for encoding in self.backend.encode_batch(texts, add_special_tokens=False):
            offsets = encoding.offsets
            found.append(_Encoded(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets]))
        return found

    def _row(self, tokens: _Encoded, rendering: Rendering) -> TokenizedRow:
        """All turns into as few sequences as possible, the last turn first: it is the one with the whole text."""
        waiting = list(rendering.turns)
        sequences: list[TokenizedSequence] = []
        text, retokenized = rendering.text, False
        while waiting:
            last = waiting.pop()
            if sequences:
                text = rendering.text[: last.end]
                tokens = self._encode([text])[0]
            prompt_length = self._clean_prompt_length(tokens, text, last)
            if prompt_length is None:
                retokenized = True
                tokens, prompt_length = self._split(text, last.prompt_end)
            trained = [False] * len(tokens.ids)
            _mark(trained, tokens, prompt_length, last)
            left = []
            for turn in waiting:
                length = self._clean_prompt_length(tokens, text, turn)
                if length is None:
                    left.append(turn)
                else:
                    _mark(trained, tokens, length, turn)
            waiting = left
            sequences.append(TokenizedSequence(tokens.ids, trained, prompt_length))
        return TokenizedRow(tuple(sequences), retokenized or len(sequences) > 1)

    def _clean_prompt_length(self, tokens: _Encoded, text: str, turn: Turn) -> int | None:
        """Tokens of this turn's prompt if they begin `tokens`, else None."""
        length = bisect_right(tokens.ends, turn.prompt_end)
        if length < len(tokens.ids) and tokens.starts[length] < turn.prompt_end:
            return None
        first, tail = self._tail(tokens, text, length, turn.prompt_end)
        return length if self._tail_ids(tail) == tokens.ids[first:length] else None

    def _tail(self, tokens: _Encoded, text: str, length: int, prompt_end: int) -> tuple[int, str]:
        """(index of the first token, text) of the prompt's end that alone decides how the prompt is tokenized."""
        for index in range(length - 1, -1, -1):
            if tokens.ids[index] in self.special_ids:
                return index, text[tokens.starts[index] : prompt_end]
        return 0, text[:prompt_end]

    def _tail_ids(self, tail: str) -> list[int]:
        known = self._tails.get(tail)
        if known is None:
            known = self._encode([tail])[0].ids
            self._keep(tail, known)
        return known

    def _keep(self, tail: str, ids: list[int]) -> None:
        if len(tail) <= _CACHED_TAIL_CHARACTERS and len(self._tails) < _CACHE_ENTRIES:
            self._tails[tail] = ids

    def _remember_tails(self, encoded: Sequence[_Encoded], renderings: Sequence[Rendering]) -> None:
        """Tokenize the unknown tails of a whole batch in one call, which uses all cores."""
        self._tails = {tail: ids for tail, ids in self._tails.items() if len(tail) <= _CACHED_TAIL_CHARACTERS}
        unknown: dict[str, None] = {}
        for tokens, rendering in zip(encoded, renderings, strict=True):
            for turn in rendering.turns:
                length = bisect_right(tokens.ends, turn.prompt_end)
                _, tail = self._tail(tokens, rendering.text, length, turn.prompt_end)
                if tail not in self._tails:
                    unknown[tail] = None
        for tail, found in zip(unknown, self._encode(list(unknown)), strict=True):
            self._tails[tail] = found.ids

    def _split(self, text: str, seam: int) -> tuple[_Encoded, int]:
        """`text` tokenized as its part before `seam` and its part after it, and the number of tokens before."""
        before = self._encode([text[:seam]])[0]
        after = self._continuation(text[seam:])
        return (
            _Encoded(
                before.ids + after.ids,
                before.starts + [start + seam for start in after.starts],
                before.ends + [end + seam for end in after.ends],
            ),
            len(before.ids),
        )

    def _continuation(self, text: str) -> _Encoded:
        """Tokens of `text` as the continuation of another.

        Some tokenizers put a space in front of whatever they are given. There a sentinel is tokenized with the text
        and taken off again.
        """
        plain = self._encode([text])[0]
        if self.backend.decode(plain.ids, skip_special_tokens=False) == text and not self._prepends_space():
            return plain
        for sentinel in _SENTINELS:
            alone, both = self._encode([sentinel, sentinel + text])
            count = len(alone.ids)
            if both.ids[:count] == alone.ids and (count == len(both.ids) or both.starts[count] >= len(sentinel)):
                shift = len(sentinel)
                return _Encoded(
                    both.ids[count:],
                    [start - shift for start in both.starts[count:]],
                    [end - shift for end in both.ends[count:]],
                )
        return plain

    def _prepends_space(self) -> bool:
        alone, after = self._encode(["a", "\na"])
        return after.ids[-len(alone.ids) :] != alone.ids


def _mark(trained: list[bool], tokens: _Encoded, prompt_length: int, turn: Turn) -> None:
    """Mark the tokens after the prompt that begin before the turn's end.

    The very first token of a sequence is never trained: nothing predicts it.
    """
    end = bisect_left(tokens.starts, turn.end)
    for index in range(max(prompt_length, 1), end):
        trained[index] = True


def _all_trained(tokens: _Encoded, rendering: Rendering) -> TokenizedSequence:
    trained = [True] * len(tokens.ids)
    trained[:1] = [False]
    prompt_end = rendering.turns[-1].prompt_end if rendering.turns else 0
    return TokenizedSequence(tokens.ids, trained[: len(tokens.ids)], bisect_right(tokens.ends, prompt_end))
