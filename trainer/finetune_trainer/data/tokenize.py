"""Rendered text -> token ids and loss mask, so that prompting the trained model equals training it.

A row's text is tokenized whole. Where the tokens of an inference prompt are not a prefix of that (a token straddles
the seam between prompt and answer, or the tokenizer decides otherwise without the rest), it is tokenized again, split
at the seam; one sequence cannot be split for two turns at once, so such a row becomes several, each training the turns
whose prompt it begins with. Text is tokenized apart between special tokens anyway: what rows share is tokenized once.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

from finetune_api.prompt_format import Rendering, Turn
from finetune_trainer.data.separators import separators

ID_BYTES = 4
"""Size of a token id in packed ids, uint32."""

_REMEMBERED_CHARACTERS = 1_000_000
"""Text after which what is remembered is forgotten; an encoding has about thirty bytes per character."""

# Put in front of a text that must be tokenized as if something came before it; see `_continuation`.
_SENTINELS = ("\n", "<", "0", "a")


Span = tuple[int, int]
"""(first token, token after the last) of a stretch of a sequence."""


class FastTokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is used here."""

    encode_special_tokens: bool

    def encode_batch(self, texts: list[str], /, *, add_special_tokens: bool) -> list[Any]:
        """A `tokenizers.Encoding` for each text."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`."""
        ...

    def get_added_tokens_decoder(self) -> Mapping[int, Any]:
        """A `tokenizers.AddedToken` for each id that has one."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizedSequence:
    """Token ids with the stretches of them that the model must produce."""

    packed: bytes
    """The token ids, uint32."""
    spans: tuple[Span, ...]
    """Each trained stretch, apart from each other."""
    prompt_length: int
    """Tokens of the inference prompt of the last turn that is trained here; `ids[:prompt_length]` is that prompt."""

    def __len__(self) -> int:
        return len(self.packed) // ID_BYTES

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return unpacked(self.packed)

    @property
    def trained(self) -> list[bool]:
        """The loss mask, as long as `ids`: True where the model must produce the token."""
        mask = [False] * len(self)
        for first, end in self.spans:
            mask[first:end] = [True] * (end - first)
        return mask

    def truncated(self, length: int) -> TokenizedSequence:
        """The first `length` tokens."""
        spans = tuple((first, min(end, length)) for first, end in self.spans if first < length)
        return TokenizedSequence(self.packed[: length * ID_BYTES], spans, min(self.prompt_length, length))


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One row: usually one sequence; more where one sequence could not begin with every turn's prompt."""

    sequences: tuple[TokenizedSequence, ...]
    """The sequence with the whole text comes first."""
    retokenized: bool
    """Whether any turn had to be tokenized again, split at its seam."""


def merge(parts: Sequence[TokenizedRow]) -> TokenizedRow:
    """One row of the sequences of several renderings."""
    if len(parts) == 1:
        return parts[0]
    sequences = tuple(sequence for part in parts for sequence in part.sequences)
    return TokenizedRow(sequences, any(part.retokenized for part in parts))


class Piece:
    """Tokens of a stretch of text, which can be asked where they stand in it."""

    __slots__ = ("_encoding", "_left_out", "_shift", "count", "packed", "text")

    def __init__(self, text: str, encoding: Any, left_out: int = 0, shift: int = 0) -> None:
        """`encoding` is of `shift` more characters, in front of `text`, which have its first `left_out` tokens."""
        self.text = text
        ids = encoding.ids[left_out:] if left_out else encoding.ids
        self.count = len(ids)
        self.packed = packed(ids)
        self._encoding, self._left_out, self._shift = encoding, left_out, shift

    def count_before(self, position: int) -> int:
        """Tokens that end at or before the character at `position`."""
        if position >= len(self.text):
            return self.count
        found: int | None = self._encoding.char_to_token(position + self._shift)
        if found is None:  # White space that some tokenizers leave out of the offsets.
            offsets = self._encoding.offsets
            found = bisect_right(offsets, position + self._shift, lo=self._left_out, key=lambda offset: offset[1])
        return found - self._left_out

    def start(self, index: int) -> int:
        """Where a token begins, with white space in front of it that the offsets leave out."""
        if index == 0:
            return 0
        own, before = (self._encoding.token_to_chars(index + self._left_out - back) for back in (0, 1))
        return int(min(own[0], before[1])) - self._shift

    def straddled(self, position: int, count: int) -> bool:
        """Whether a token reaches across `position`, which has `count` tokens before it."""
        return count < self.count and self.start(count) < position


class Tokens:
    """The tokens of a text: those of its pieces, one after the other."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.packed = b"".join([piece.packed for piece in pieces])
        self._pieces = pieces
        self._starts = [0, *accumulate(len(piece.text) for piece in pieces)]
        self._counts = [0, *accumulate(piece.count for piece in pieces)]

    def at(self, position: int) -> tuple[Piece, int, int]:
        """(piece that `position` is in or at the end of, position in it, tokens before it)."""
        index = max(bisect_left(self._starts, position) - 1, 0)
        return self._pieces[index], position - self._starts[index], self._counts[index]

    def count_before(self, position: int) -> int:
        """Tokens that end at or before the character at `position`."""
        piece, place, before = self.at(position)
        return before + piece.count_before(place)


@dataclass
class RowTokenizer:
    """Tokenizes rendered rows with one tokenizer."""

    backend: FastTokenizer
    special: Mapping[int, str]
    """Tokens that the tokenizer cuts out of the text before anything else, so that no other reaches across them."""
    _known: dict[str, Piece] = field(default_factory=dict, repr=False)
    _known_characters: int = 0
    _cut_at: re.Pattern[str] | None = None

    def fresh(self) -> RowTokenizer:
        """The same with nothing remembered, for another thread."""
        return RowTokenizer(self.backend, self.special)

    def tokenize(self, renderings: Sequence[Rendering], *, train_all: bool = False) -> list[TokenizedRow]:
        """Tokenize a batch of rows.

        Args:
            renderings: the rows' texts with a leading BOS where one is due.
            train_all: causal language modelling: every token but the first is trained.
        """
        rows = self._tokens(renderings)
        if train_all:
            return [_all_trained(tokens, rendering) for tokens, rendering in zip(rows, renderings, strict=True)]
        return [self._row(tokens, rendering) for tokens, rendering in zip(rows, renderings, strict=True)]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of an inference prompt, as a server makes them from the same text."""
        return unpacked(self._whole(prompt).packed)

    def _tokens(self, renderings: Sequence[Rendering]) -> list[Tokens]:
        """Of each text, tokenizing all that is new in one call, which uses all cores."""
        rows = [self._cut(rendering.text) for rendering in renderings]
        texts = [text for row in rows for text in row]
        for row, rendering in zip(rows, renderings, strict=True):
            starts = [0, *accumulate(map(len, row))]
            for turn in rendering.turns:
                index = max(bisect_left(starts, turn.prompt_end) - 1, 0)
                texts.append(row[index][: turn.prompt_end - starts[index]])
        pieces = self._pieces(texts)
        return [Tokens([pieces[text] for text in row]) for row in rows]

    def _whole(self, text: str) -> Tokens:
        return Tokens(list(map(self._pieces(parts := self._cut(text)).__getitem__, parts)))

    def _cut(self, text: str) -> list[str]:
        """`text` cut in front of special tokens. Any will do; a format's are all in its first row."""
        if self._cut_at is None:
            found = separators(self.backend, set(self._encode([text])[0].ids))
            self._cut_at = re.compile("|".join(map(re.escape, found)) or "(?!)")
        starts = [match.start() for match in self._cut_at.finditer(text)]
        return [text[start:end] for start, end in pairwise([0, *starts, len(text)]) if start < end] or [text]

    def _pieces(self, texts: Iterable[str]) -> Mapping[str, Piece]:
        """At least those of `texts`."""
        if self._known_characters > _REMEMBERED_CHARACTERS:
            self._known, self._known_characters = {}, 0
        known = self._known
        unknown = [text for text in dict.fromkeys(texts) if text not in known]
        if unknown:
            encoded = zip(unknown, self._encode(unknown), strict=True)
            known.update((text, Piece(text, encoding)) for text, encoding in encoded)
            self._known_characters += sum(map(len, unknown))
        return known

    def _encode(self, texts: list[str]) -> list[Any]:
        return self.backend.encode_batch(texts, add_special_tokens=False)

    def _row(self, tokens: Tokens, rendering: Rendering) -> TokenizedRow:
        """All turns into as few sequences as possible, the last turn first: it is the one with the whole text."""
        waiting = list(rendering.turns)
        sequences: list[TokenizedSequence] = []
        text, retokenized = rendering.text, False
        while waiting:
            last = waiting.pop()
            if sequences:
                text = rendering.text[: last.end]
                tokens = self._whole(text)
            span = self._span(tokens, last)
            if span is None:
                retokenized = True
                tokens, span = self._split(text, last)
            spans, left = [span], []
            for turn in reversed(waiting):
                earlier = self._span(tokens, turn)
                if earlier is None:
                    left.append(turn)
                else:
                    spans.append(earlier)
            waiting = left[::-1]
            sequences.append(TokenizedSequence(tokens.packed, _trainable(spans), span[0]))
        return TokenizedRow(tuple(sequences), retokenized or len(sequences) > 1)

    def _span(self, tokens: Tokens, turn: Turn) -> Span | None:
        """(tokens of the turn's prompt, tokens to its end), or None if `tokens` do not begin with that prompt.

        None also where the turn's last token is shared with what follows, unless a special token stops the model
        earlier: it would learn to produce a part of the next message.
        """
        piece, seam, before = tokens.at(turn.prompt_end)
        count = piece.count_before(seam)
        if piece.straddled(seam, count):
            return None
        tail = piece.text[:seam]
        # The pieces before it are the same without what follows.
        if seam < len(piece.text) and self._pieces([tail])[tail].packed != piece.packed[: count * ID_BYTES]:
            return None
        first = before + count
        piece, seam, before = tokens.at(turn.end)
        count = piece.count_before(seam)
        if piece.straddled(seam, count):
            answer = unpacked(tokens.packed[first * ID_BYTES : (before + count) * ID_BYTES])
            return (first, before + count) if any(token in self.special for token in answer) else None
        # Tokens without a character of their own (the space SentencePiece puts first) belong to what follows.
        while count and before + count > first and piece.start(count - 1) >= seam:
            count -= 1
        return first, before + count

    def _split(self, text: str, turn: Turn) -> tuple[Tokens, Span]:
        """`text` tokenized as the turn's prompt, the turn and the rest, and the turn's span."""
        parts = self._cut(text[: turn.prompt_end])
        known = self._pieces(parts)
        prompt = [known[part] for part in parts]
        answer = self._continuation(text[turn.prompt_end : turn.end])
        rest = [self._continuation(text[turn.end :])] if turn.end < len(text) else []
        first = sum(piece.count for piece in prompt)
        return Tokens([*prompt, answer, *rest]), (first, first + answer.count)

    def _continuation(self, text: str) -> Piece:
        """Tokens of `text` as the continuation of another.

        Some tokenizers put a space in front of whatever they are given. There a sentinel is tokenized with the text
        and taken off again.
        """
        (plain,) = self._encode([text])
        if not self._prepends_space and self.backend.decode(plain.ids, skip_special_tokens=False) == text:
            return Piece(text, plain)
        for sentinel in _SENTINELS:
            alone, both = self._encode([sentinel, sentinel + text])
            count, shift = len(alone.ids), len(sentinel)
            if both.ids[:count] == alone.ids and Piece(sentinel + text, both).count_before(shift) == count:
                return Piece(text, both, count, shift)
        return Piece(text, plain)

    @cached_property
    def _prepends_space(self) -> bool:
        alone, after = self._encode(["a", "\na"])
        return bool(after.ids[-len(alone.ids) :] != alone.ids)


def packed(ids: Iterable[int]) -> bytes:
    """`ids` as uint32."""
    return array("I", ids).tobytes()


def unpacked(ids: bytes) -> list[int]:
    """What was `packed`."""
    return memoryview(ids).cast("I").tolist()


def _trainable(spans: Sequence[Span]) -> tuple[Span, ...]:
    """`spans` in order, without the very first token of the sequence: nothing predicts it."""
    return tuple((max(first, 1), end) for first, end in sorted(spans) if end > max(first, 1))


def _all_trained(tokens: Tokens, rendering: Rendering) -> TokenizedRow:
    prompt_length = tokens.count_before(rendering.turns[-1].prompt_end) if rendering.turns else 0
    spans = _trainable([(0, len(tokens.packed) // ID_BYTES)])
    return TokenizedRow((TokenizedSequence(tokens.packed, spans, prompt_length),), False)
