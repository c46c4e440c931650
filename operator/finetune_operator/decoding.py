"""JSON from the API server, read so that no object can keep others from being read.

Tenants write part of everything that is listed and watched. Nested a thousand levels deep, one object of theirs fails
every parser for a whole page: what lies deeper than Kubernetes' own kinds ever do is cut out, and the rest is read.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import orjson

DEPTH_LIMIT = 100
"""Levels that are kept of an object that cannot be read, or written, otherwise; Kubernetes' own kinds have about 30."""
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')

Json = Any


class Garbled(ValueError):  # noqa: N818  what the answer is
    """It cannot be read or written as JSON."""


async def decoded(content: bytes) -> Json:
    """What `content` says; null for everything below DEPTH_LIMIT where the parser cannot read all of it.

    Raises:
        Garbled: it is no JSON.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return await shallow(content)


async def shallow(content: bytes) -> Json:
    """What `content` says; null for everything below DEPTH_LIMIT.

    Raises:
        Garbled: it is no JSON.
    """
    try:
        return orjson.loads(await asyncio.to_thread(_shallow, content))
    except orjson.JSONDecodeError as error:
        raise Garbled(f"it is no JSON: {error}") from error


def encoded(value: Json) -> bytes:
    """`value` as JSON.

    Raises:
        Garbled: it is nested deeper than the writer goes (254 levels).
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise Garbled(f"it cannot be written: {error}") from error


def without_managed_fields(item: Json) -> Json:
    """`item`, an object of the API server's, without what nobody reads: managedFields make up half of it."""
    metadata = item.get("metadata") if isinstance(item, dict) else None
    if isinstance(metadata, dict):
        metadata.pop("managedFields", None)
    return item


def _shallow(content: bytes) -> bytes:
    kept, depth, start = [], 0, 0
    for token in _TOKENS.finditer(content):
        sign = content[token.start()]
        if sign in b"[{":
            depth += 1
            if depth == DEPTH_LIMIT + 1:
                kept += [content[start : token.start()], b"null"]
        elif sign in b"]}":
            if depth == DEPTH_LIMIT + 1:
                start = token.end()
            depth -= 1
    return b"".join([*kept, content[start:]]) if depth <= DEPTH_LIMIT else b""
