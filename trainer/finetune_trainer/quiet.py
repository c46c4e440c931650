"""Libraries that say nothing of their own, in commands whose output is an answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, libraries draw no bars and do not warn of what is meant or of what only they can change."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Writers of adapters put keys of their own beside PEFT's.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments", category=UserWarning)
            # PEFT still uses names that transformers has changed.
            warnings.filterwarnings("ignore", message=".* is deprecated", category=FutureWarning)
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
