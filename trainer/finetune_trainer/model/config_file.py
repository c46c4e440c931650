"""A model's config.json as a foreign text, before transformers builds anything by it.

A number of layers of 10^9 is no error to transformers: it builds them one by one, until memory runs out. So what no
model has is refused by the numbers alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.model.support import unsupported

_MOST_LAYERS, _MOST_EXPERTS = 10_000, 1 << 16
"""The deepest models have some hundred layers, and there are some with 2^14 experts. Each may become an object."""

_MOST_SIZE = 1 << 26
"""Width of a layer, heads, or words of a vocabulary; most are below 2^18. Some become tables of numbers."""

_LAYERS = re.compile(r"layers?$|blocks?$|depths?$", re.I)
_SIZES = re.compile(r"(^|_)(dims?|heads?|embd|inner|size)$|^d_", re.I)
_BOUNDS = re.compile(r"window|chunk|block_size|max_|image|patch", re.I)
"""Keys of sizes that limit something, and may be as large as you please."""


def read_config_file(folder: Path) -> dict[str, Any] | None:
    """What `config.json` holds; None when it cannot be read, which transformers says in words of its own."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def refuse_by_numbers(content: dict[str, Any], name: str) -> None:
    """Refuse a configuration of which building the model would take all memory or never end.

    Args:
        content: of config.json.
        name: what the user calls the model.

    Raises:
        JobError: ModelUnsupported.
    """
    for key, value in _numbers(content):
        most = _most(key)
        if most is not None and value > most:
            shown = f"{value:,}" if value < 10**15 else f"{float(min(value, 10**300)):.0e}"
            raise unsupported(
                name,
                f"has a config.json with {key}: {shown}, which is no model's (at most {most:,}): fetch that file anew",
            )


def _most(key: str) -> int | None:
    if _BOUNDS.search(key):
        return None
    if _LAYERS.search(key):
        return _MOST_LAYERS
    if key.lower().endswith("experts"):
        return _MOST_EXPERTS
    return _MOST_SIZE if _SIZES.search(key) else None


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers with their keys, of mappings within it too (`text_config`)."""
    waiting = [content]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, int | float):
                yield key, value
