"""Processes that start in no time: forked from one that has loaded what all of them need.

There is one such server per test session, so that what the test modules ask for is collected here.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_modules: list[str] = []


def fork_server(*modules: str) -> ForkServerContext:
    """The context to start processes with. Call it when a test module is imported, before any process has started.

    Args:
        modules: what the server is to have loaded.
    """
    context = multiprocessing.get_context("forkserver")
    _modules.extend(module for module in modules if module not in _modules)
    context.set_forkserver_preload(_modules)
    return context


def one_thread() -> None:
    """Let PyTorch compute in one thread. To be called first in a process that was forked from one that has it loaded.

    Such a process makes PyTorch's pool of threads anew when it is first asked for, and aborts where two threads are the
    first at the same time.
    """
    import torch

    torch.set_num_threads(1)
