"""Rendered text -> token ids and loss mask, so that prompting the trained model equals training it.

A row's text is tokenized whole. Where the tokens of an inference prompt are not a prefix of that (a token straddles
the seam between prompt and answer, or the tokenizer decides otherwise without the rest), the text is tokenized again,
split at the seam. One sequence cannot be split for two turns at once, so such a row becomes several sequences, each
training the turns whose prompt it really begins with.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from finetune_api.prompt_format import Rendering, Turn

_CACHED_TAIL_CHARACTERS = 256
"""Longest text between a special token and a seam whose tokens are remembered; headers are far shorter."""

_CACHE_ENTRIES = 50_000

# Put in front of a text that must be tokenized as if something came before it; see `_continuation`.
_SENTINELS = ("\n", "<", "0", "a")


Span = tuple[int, int]
"""(first token, token after the last) of a stretch of a sequence."""


class FastTokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is used here."""

    def encode_batch(self, texts: list[str], /, *, add_special_tokens: bool) -> list[Any]:
        """A `tokenizers.Encoding` for each text."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizedSequence:
    """Token ids with the stretches of them that the model must produce."""

    ids: list[int]
    spans: tuple[Span, ...]
    """Each trained stretch, apart from each other."""
    prompt_length: int
    """Tokens of the inference prompt of the last turn that is trained here; `ids[:prompt_length]` is that prompt."""

    @property
    def trained(self) -> list[bool]:
        """The loss mask, as long as `ids`: True where the model must produce the token."""
        mask = [False] * len(self.ids)
        for first, end in self.spans:
            mask[first:end] = [True] * (end - first)
        return mask

    def truncated(self, length: int) -> TokenizedSequence:
        """The first `length` tokens."""
        spans = tuple((first, min(end, length)) for first, end in self.spans if first < length)
        return TokenizedSequence(self.ids[:length], spans, min(self.prompt_length, length))


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One row: usually one sequence; more where one sequence could not begin with every turn's prompt."""

    sequences: tuple[TokenizedSequence, ...]
    """The sequence with the whole text comes first."""
    retokenized: bool
    """Whether any turn had to be tokenized again, split at its seam."""


def merge(parts: list[TokenizedRow]) -> TokenizedRow:
    """One row of the sequences of several renderings."""
    if len(parts) == 1:
        return parts[0]
    sequences = tuple(sequence for part in parts for sequence in part.sequences)
    return TokenizedRow(sequences, any(part.retokenized for part in parts))


class Tokens:
    """Tokens of a text that can be asked where they stand in it."""

    def __init__(self, length: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        self.length = length
        """Characters of the text."""
        self.ids = ids
        self.offsets = offsets
        """(start, end) of each token in characters."""

    def count_before(self, position: int) -> int:
        """Tokens that end at or before `position`."""
        return bisect_right(self.offsets, position, key=lambda offset: offset[1])

    def span(self, index: int) -> tuple[int, int]:
        """(start, end) of one token, white space in front of it included where the tokenizer's offsets omit it."""
        start, end = self._offset(index)
        return (min(start, self._offset(index - 1)[1]) if index else 0), end

    def _offset(self, index: int) -> tuple[int, int]:
        return self.offsets[index]


class _EncodedTokens(Tokens):
    """The same on an encoding, which answers by itself: all offsets as Python objects would cost more than the rest."""

    def __init__(self, length: int, encoding: Any) -> None:
        self.length = length
        self.ids = encoding.ids
        self._encoding = encoding

    @cached_property
    def offsets(self) -> list[tuple[int, int]]:  # type: ignore[override]  # mypy: only assigned attributes are writable
        return list(self._encoding.offsets)

    def count_before(self, position: int) -> int:
        if position >= self.length:
            return len(self.ids)
        found: int | None = self._encoding.char_to_token(position)
        # A character without a token: white space that some tokenizers leave out of the offsets.
        return super().count_before(position) if found is None else found

    def _offset(self, index: int) -> tuple[int, int]:
        found: tuple[int, int] | None = self._encoding.token_to_chars(index)
        return self.offsets[index] if found is None else found


def _joined(pieces: Sequence[Tokens]) -> Tokens:
    """Tokens of pieces of a text, one piece after the other."""
    whole = Tokens(0, [], [])
    for piece in pieces:
        whole.offsets += [(start + whole.length, end + whole.length) for start, end in piece.offsets]
        whole.ids += piece.ids
        whole.length += piece.length
    return whole


@dataclass
class RowTokenizer:
    """Tokenizes rendered rows with one tokenizer."""

    backend: FastTokenizer
    special: Mapping[int, str]
    """Tokens that the tokenizer cuts out of the text before anything else, so that no other reaches across them."""
    _tails: dict[str, list[int]] = field(default_factory=dict)

    def fresh(self) -> RowTokenizer:
        """The same with nothing remembered, for another thread."""
        return RowTokenizer(self.backend, self.special)

    def tokenize(self, renderings: Sequence[Rendering], *, train_all: bool = False) -> list[TokenizedRow]:
        """Tokenize a batch of rows.

        Args:
            renderings: the rows' texts with a leading BOS where one is due.
            train_all: causal language modelling: every token but the first is trained.
        """
        return self.finish(self.encode(renderings), renderings, train_all=train_all)

    def encode(self, renderings: Sequence[Rendering]) -> Sequence[Tokens]:
        """The first half of `tokenize`: the tokenizer's work, which other threads of Python do not wait for."""
        return self._encode([rendering.text for rendering in renderings])

    def finish(
        self, encoded: Sequence[Tokens], renderings: Sequence[Rendering], *, train_all: bool = False
    ) -> list[TokenizedRow]:
        """The second half of `tokenize`: what is trained of which tokens."""
        pairs = list(zip(encoded, renderings, strict=True))
        if train_all:
            return [TokenizedRow((_all_trained(tokens, rendering),), False) for tokens, rendering in pairs]
        self._remember_tails(pairs)
        return [self._row(tokens, rendering) for tokens, rendering in pairs]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of an inference prompt, as a server makes them from the same text."""
        return self._encode([prompt])[0].ids

    def _encode(self, texts: list[str]) -> Sequence[Tokens]:
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [_EncodedTokens(len(text), encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _row(self, tokens: Tokens, rendering: Rendering) -> TokenizedRow:
        """All turns into as few sequences as possible, the last turn first: it is the one with the whole text."""
        waiting = list(rendering.turns)
        sequences: list[TokenizedSequence] = []
        text, retokenized = rendering.text, False
        while waiting:
            last = waiting.pop()
            if sequences:
                text = rendering.text[: last.end]
                tokens = self._encode([text])[0]
            span = self._span(tokens, text, last)
            if span is None:
                retokenized = True
                tokens, span = self._split(text, last)
            spans, left = [span], []
            for turn in reversed(waiting):
                earlier = self._span(tokens, text, turn)
                if earlier is None:
                    left.append(turn)
                else:
                    spans.append(earlier)
            waiting = left[::-1]
            sequences.append(TokenizedSequence(tokens.ids, trainable(spans), span[0]))
        return TokenizedRow(tuple(sequences), retokenized or len(sequences) > 1)

    def _span(self, tokens: Tokens, text: str, turn: Turn) -> tuple[int, int] | None:
        """(tokens of the turn's prompt, tokens to its end), or None if `tokens` do not begin with that prompt.

        None also where the turn's last token is shared with what follows, unless a special token stops the model
        earlier: it would learn to produce a part of the next message.
        """
        first = tokens.count_before(turn.prompt_end)
        if first < len(tokens.ids) and tokens.span(first)[0] < turn.prompt_end:
            return None
        begin, tail = self._tail(tokens, text, first, turn.prompt_end)
        if self._tail_ids(tail) != tokens.ids[begin:first]:
            return None
        end = tokens.count_before(turn.end)
        if end < len(tokens.ids) and tokens.span(end)[0] < turn.end:
            stopped = any(token in self.special for token in tokens.ids[first:end])
            return (first, end) if stopped else None
        # Tokens without a character of their own (the space SentencePiece puts first) belong to what follows.
        while end > first and tokens.span(end - 1)[0] >= turn.end:
            end -= 1
        return first, end

    def _tail(self, tokens: Tokens, text: str, first: int, prompt_end: int) -> tuple[int, str]:
        """(index of the first token, text) of the prompt's end that alone decides how the prompt is tokenized."""
        for index in range(first - 1, -1, -1):
            special = self.special.get(tokens.ids[index])
            if special is not None:
                start, end = tokens.span(index)
                # Otherwise the model's own vocabulary made it (an unknown character, say), from its surroundings.
                if special in text[start:end]:
                    return index, text[start:prompt_end]
        return 0, text[:prompt_end]

    def _tail_ids(self, tail: str) -> list[int]:
        known = self._tails.get(tail)
        return self._encode([tail])[0].ids if known is None else known

    def _remember_tails(self, pairs: Sequence[tuple[Tokens, Rendering]]) -> None:
        """Tokenize the unknown tails of a whole batch in one call, which uses all cores."""
        if len(self._tails) > _CACHE_ENTRIES:
            self._tails = {}
        self._tails = {tail: ids for tail, ids in self._tails.items() if len(tail) <= _CACHED_TAIL_CHARACTERS}
        unknown: dict[str, None] = {}
        for tokens, rendering in pairs:
            for turn in rendering.turns:
                first = tokens.count_before(turn.prompt_end)
                _, tail = self._tail(tokens, rendering.text, first, turn.prompt_end)
                if tail not in self._tails:
                    unknown[tail] = None
        for tail, found in zip(unknown, self._encode(list(unknown)), strict=True):
            self._tails[tail] = found.ids

    def _split(self, text: str, turn: Turn) -> tuple[Tokens, tuple[int, int]]:
        """`text` tokenized as the turn's prompt, the turn and the rest, and the turn's span."""
        prompt = self._encode([text[: turn.prompt_end]])[0]
        answer = self._continuation(text[turn.prompt_end : turn.end])
        pieces = [prompt, answer]
        if turn.end < len(text):
            pieces.append(self._continuation(text[turn.end :]))
        return _joined(pieces), (len(prompt.ids), len(prompt.ids) + len(answer.ids))

    def _continuation(self, text: str) -> Tokens:
        """Tokens of `text` as the continuation of another.

        Some tokenizers put a space in front of whatever they are given. There a sentinel is tokenized with the text
        and taken off again.
        """
        plain = self._encode([text])[0]
        if not self._prepends_space and self.backend.decode(plain.ids, skip_special_tokens=False) == text:
            return plain
        for sentinel in _SENTINELS:
            alone, both = self._encode([sentinel, sentinel + text])
            count = len(alone.ids)
            if both.ids[:count] == alone.ids and both.count_before(len(sentinel)) == count:
                shift = len(sentinel)
                offsets = [(start - shift, end - shift) for start, end in both.offsets[count:]]
                return Tokens(len(text), both.ids[count:], offsets)
        return plain

    @cached_property
    def _prepends_space(self) -> bool:
        alone, after = self._encode(["a", "\na"])
        return after.ids[-len(alone.ids) :] != alone.ids


def trainable(spans: Sequence[Span]) -> tuple[Span, ...]:
    """`spans` in order, without the very first token of the sequence: nothing predicts it."""
    return tuple((max(first, 1), end) for first, end in sorted(spans) if end > max(first, 1))


def _all_trained(tokens: Tokens, rendering: Rendering) -> TokenizedSequence:
    prompt_end = rendering.turns[-1].prompt_end if rendering.turns else 0
    return TokenizedSequence(tokens.ids, trainable([(0, len(tokens.ids))]), tokens.count_before(prompt_end))
