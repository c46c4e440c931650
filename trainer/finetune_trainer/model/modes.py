"""Whether modules train or not, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def modes_kept(model: Any) -> Iterator[None]:
    """Each module of `model` trains or not afterwards as it did before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
