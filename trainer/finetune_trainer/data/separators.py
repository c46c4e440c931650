"""Where a text may be cut before it is tokenized, so that the tokens of the parts are those of the whole."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


def separators(backend: Any, ids: Container[int]) -> list[str]:
    """Those of the tokens `ids` in front of which any text may be cut.

    They are found wherever they stand, before the tokenizer (a `tokenizers.Tokenizer`) normalizes or splits the text,
    and what is between two of them is tokenized apart.
    """
    if backend.encode_special_tokens:
        return []
    raw = {index: token for index, token in backend.get_added_tokens_decoder().items() if not token.normalized}
    # Whether one that must be a word by itself is found depends on what is behind the cut.
    if any(token.single_word for token in raw.values()):
        return []
    contents = [token.content for token in raw.values()]
    return [
        token.content
        for index, token in raw.items()
        if index in ids
        and not token.lstrip
        and not token.content[:1].isspace()
        and not any(_overlaps(token.content, other) for other in contents)
    ]


def _overlaps(content: str, other: str) -> bool:
    """Whether `content` may begin inside `other`, so that only one of the two is found."""
    inside = content in other and content != other
    return inside or any(content.startswith(other[cut:]) for cut in range(1, len(other)))
