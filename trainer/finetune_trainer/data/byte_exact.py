"""Which tokenizers make tokens that are stretches of the text's bytes, and where they allow a text to be cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_PLAIN_SPLITTERS = {"Sequence", "Split", "Digits", "Punctuation", "ByteLevel"}
"""Pre-tokenizers that cut text or drop some of it, and add none."""


def byte_exact(backend: Any) -> bool:
    """Whether each token of this `tokenizers.Tokenizer` is a stretch of the text's bytes, as its ids tell."""
    model, normalizer, splitter = backend.model, backend.normalizer, backend.pre_tokenizer
    kinds = list(_components(splitter))
    return (
        type(model).__name__ == "BPE"
        and not (model.unk_token or model.dropout or model.byte_fallback)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        # NFC changes no ASCII; rows with more are left to others.
        and (normalizer is None or _state(normalizer) in ({"type": "NFC"}, {"type": "Sequence", "normalizers": []}))
        and any(kind["type"] == "ByteLevel" for kind in kinds)
        and all(kind["type"] in _PLAIN_SPLITTERS and not kind.get("add_prefix_space") for kind in kinds)
        # Offsets that leave white space out decide elsewhere, and the answer must be the same here.
        and not any(kind.get("trim_offsets") for kind in _components(backend.post_processor))
        and not backend.encode_special_tokens
    )


def separators(backend: Any) -> list[str]:
    """Special tokens that are found wherever they stand, so that text may be cut in front of them."""
    tokens = backend.get_added_tokens_decoder().values()
    raw = [token for token in tokens if not token.normalized]
    # Whether one that must be a word by itself is found depends on what is behind the cut.
    if any(token.single_word for token in raw):
        return []
    contents = [token.content for token in raw]
    endings = {content[cut:] for content in contents for cut in range(1, len(content))}
    together = "\0".join(contents)

    def overlaps(content: str) -> bool:
        inside_another = together.count(content) > 1
        return inside_another or any(content[:cut] in endings for cut in range(1, len(content)))

    return [
        token.content
        for token in raw
        if not token.lstrip and not token.content[:1].isspace() and not overlaps(token.content)
    ]


def _components(component: Any) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer or post-processor, as tokenizer.json writes them."""
    if component is not None:
        yield from _steps(_state(component))


def _steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield state
    for step in [*state.get("pretokenizers", []), *state.get("processors", [])]:
        yield from _steps(step)


def _state(component: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state
