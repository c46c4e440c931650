"""Memory that is freed while a model is loaded goes back to the system at once.

Experts are converted one by one and then stacked. glibc keeps such blocks for later, in a heap full of holes: twice the
model's size was measured where its size would do, and a pod is killed for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3
_WHILE_LOADING_BYTES = 64 * 1024
_OTHERWISE_BYTES = 32 * 1024 * 1024
"""Where glibc's own rule ends up by itself in a process that frees large blocks."""


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Give blocks of tensor size a mapping of their own until the block ends, where the C library can."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _WHILE_LOADING_BYTES)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _OTHERWISE_BYTES)
        library.malloc_trim(0)
