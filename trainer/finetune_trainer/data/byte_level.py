"""The short way for byte-level BPE: there the ids alone say where each token stands, so no offsets are needed.

Its tokens are the bytes of the text, cut at some places: where the bytes of all tokens add up to those of the text,
none is lost and each stands where the bytes before it end. And text is tokenized apart between special tokens, so what
repeats from row to row (a system prompt) is tokenized once. A row for which either does not hold is left to others.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from finetune_api.prompt_format import Rendering
from finetune_trainer.data.byte_exact import separators
from finetune_trainer.data.tokenize import Span, trainable

ID_BYTES = 4
"""Size of a token id in a row's bytes, uint32."""

_REMEMBERED_CHARACTERS = 1_000_000
"""Text after which the older half of what is remembered is forgotten."""

_REMEMBERED_TAIL_CHARACTERS = 256
"""Longest text between a special token and a seam whose tokens are remembered; headers are far shorter."""

_REMEMBERED_TAILS = 10_000

_JOINED_CHARACTERS = 600
"""Text that is given to the tokenizer at once at least: longer texts cost more per token again."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Token ids of a batch of renderings."""

    tokenizer: ByteLevelTokenizer
    ids: list[bytes]
    """Of each rendering, uint32."""
    separator: str | None
    """The special token in front of which the texts were cut."""

    def spans(self, renderings: Sequence[Rendering]) -> list[tuple[Span, ...] | None]:
        """The trained stretches of each rendering; None where it must be tokenized with offsets to know them."""
        return self.tokenizer.spans(self, renderings)


class ByteLevelTokenizer:
    """Tokenizes rendered rows by `backend`, a `tokenizers.Tokenizer` that is `byte_exact`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._separators = separators(backend)
        self._ascii_only = backend.normalizer is not None
        self._bytes_of_id: Array = np.zeros(0, dtype=np.int64)
        """0 where it is not known yet."""
        self._recent: dict[str, bytes] = {}
        self._older: dict[str, bytes] = {}
        self._recent_characters = 0
        self._tails: dict[str, bytes] = {}

    def encode(self, renderings: Sequence[Rendering]) -> EncodedRows:
        """The tokenizer's work, which other threads of Python do not wait for. One thread at a time."""
        separator = self._nearest_separator(renderings)
        if self._recent_characters > _REMEMBERED_CHARACTERS:
            self._older, self._recent, self._recent_characters = self._recent, {}, 0
        rows = [_cut(rendering.text, separator) for rendering in renderings]
        recent, older = self._recent, self._older
        unknown: dict[str, None] = {}
        for segment in (segment for segments in rows for segment in segments):
            if segment not in recent:
                known = older.get(segment)
                if known is None:
                    unknown[segment] = None
                else:
                    recent[segment] = known
                    self._recent_characters += len(segment)
        for segment, new in zip(unknown, self._encode_segments(list(unknown), separator), strict=True):
            recent[segment] = new
            self._recent_characters += len(segment)
        ids = [b"".join([recent[segment] for segment in segments]) for segments in rows]
        return EncodedRows(self, ids, separator)

    def spans(self, encoded: EncodedRows, renderings: Sequence[Rendering]) -> list[tuple[Span, ...] | None]:
        """As `EncodedRows.spans`.

        They are known where every turn begins and ends between two tokens, and its prompt alone has the same tokens.
        """
        if not renderings:
            return []
        ids = np.frombuffer(b"".join(encoded.ids), dtype=np.uint32)
        last = np.cumsum([len(row) // ID_BYTES for row in encoded.ids])
        first = np.concatenate(([0], last[:-1]))
        # Bytes of the first tokens of the batch, int64 [T + 1].
        before = np.concatenate(([0], np.cumsum(self._sizes(ids))))
        sizes = np.array([_size(rendering.text) for rendering in renderings])
        whole = before[last] - before[first] == sizes
        if self._ascii_only:
            whole &= [rendering.text.isascii() for rendering in renderings]
        places = np.array(list(_places(renderings, before[first].tolist())), dtype=np.int64)
        # Tokens that end at or before each place, and whether the last of them ends there.
        counts = np.searchsorted(before, places, side="right") - 1
        between = before[counts] == places
        seams = iter(zip(counts.tolist(), between.tolist(), strict=True))
        tails = iter(self._known_tails(renderings, encoded.separator))
        found: list[tuple[Span, ...] | None] = []
        for row, rendering, begin, is_whole in zip(
            encoded.ids, renderings, first.tolist(), whole.tolist(), strict=True
        ):
            spans, good = [], is_whole
            for _ in rendering.turns:
                (prompt_end, prompt_apart), (end, end_apart) = next(seams), next(seams)
                tail = next(tails)
                seam = ID_BYTES * (prompt_end - begin)
                good = good and prompt_apart and end_apart and row[max(seam - len(tail), 0) : seam] == tail
                spans.append((prompt_end - begin, end - begin))
            found.append(trainable(spans) if good else None)
        return found

    def _encode(self, texts: list[str]) -> list[bytes]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [array("I", encoding.ids).tobytes() for encoding in encodings]

    def _encode_segments(self, segments: list[str], separator: str | None) -> list[bytes]:
        """Ids of each; some are joined, since a call has its price, and parted at the separators they begin with."""
        if separator is None or not all(segment.startswith(separator) for segment in segments):
            return self._encode(segments)
        joined = b"".join(self._encode(_joined(segments)))
        begins = ID_BYTES * np.flatnonzero(np.frombuffer(joined, np.uint32) == self._backend.token_to_id(separator))
        if len(begins) != len(segments):
            return self._encode(segments)
        return [joined[begin:end] for begin, end in pairwise([*begins.tolist(), len(joined)])]

    def _nearest_separator(self, renderings: Sequence[Rendering]) -> str | None:
        """The special token that stands last before a seam: what is between them is the shortest."""
        rendering = next((rendering for rendering in renderings if rendering.turns), None)
        if rendering is None:
            return None
        prompt_end = rendering.turns[-1].prompt_end
        places = {token: rendering.text.rfind(token, 0, prompt_end) for token in self._separators}
        nearest = max(places, key=places.__getitem__, default="")
        return nearest if places.get(nearest, -1) >= 0 else None

    def _known_tails(self, renderings: Sequence[Rendering], separator: str | None) -> list[bytes]:
        """Ids of the part of each turn's prompt that alone decides how its end is tokenized."""
        texts = [
            _tail(rendering.text, turn.prompt_end, separator) for rendering in renderings for turn in rendering.turns
        ]
        unknown = list(dict.fromkeys(text for text in texts if text not in self._tails))
        self._tails.update(zip(unknown, self._encode(unknown), strict=True))
        found = [self._tails[text] for text in texts]
        for text in unknown:
            if len(text) > _REMEMBERED_TAIL_CHARACTERS or len(self._tails) > _REMEMBERED_TAILS:
                del self._tails[text]
        return found

    def _sizes(self, ids: Array) -> Array:
        """Bytes of each token."""
        # Ids may have gaps, so that the largest is more than their number tells.
        missing = int(ids.max()) + 1 - len(self._bytes_of_id) if len(ids) else 0
        if missing > 0:
            self._bytes_of_id = np.concatenate((self._bytes_of_id, np.zeros(missing, dtype=np.int64)))
        sizes = self._bytes_of_id[ids]
        if sizes.all():
            return sizes
        added: Mapping[int, Any] = self._backend.get_added_tokens_decoder()
        for token in np.unique(ids[sizes == 0]).tolist():
            # A character of the vocabulary stands for a byte each; added tokens are written as they are.
            self._bytes_of_id[token] = (
                _size(added[token].content) if token in added else len(self._backend.id_to_token(token))
            )
        return self._bytes_of_id[ids]


def _cut(text: str, separator: str | None) -> list[str]:
    """`text` cut in front of each `separator`."""
    if separator is None:
        return [text]
    first, *others = text.split(separator)
    segments = [separator + other for other in others]
    return [first, *segments] if first else segments


def _joined(segments: list[str]) -> list[str]:
    texts, waiting, characters = [], [], 0
    for segment in segments:
        waiting.append(segment)
        characters += len(segment)
        if characters > _JOINED_CHARACTERS:
            texts.append("".join(waiting))
            waiting, characters = [], 0
    return [*texts, "".join(waiting)] if waiting else texts


def _tail(text: str, prompt_end: int, separator: str | None) -> str:
    start = -1 if separator is None else text.rfind(separator, 0, prompt_end)
    return text[max(start, 0) : prompt_end]


def _places(renderings: Sequence[Rendering], bases: Sequence[int]) -> Iterator[int]:
    """Where each turn's prompt and where the turn ends, in bytes; `bases` are the bytes before each rendering."""
    for rendering, base in zip(renderings, bases, strict=True):
        text = rendering.text
        ascii_only = text.isascii()
        for turn in rendering.turns:
            yield base + (turn.prompt_end if ascii_only else _size(text[: turn.prompt_end]))
            yield base + (turn.end if ascii_only else _size(text[: turn.end]))


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
