"""What a watch tells while an attempt is read is not forgotten over what was read a moment before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from finetune_operator.attempts import Attempts
from finetune_operator.cache import Cache
from finetune_operator.names import PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.settings import OperatorSettings
from tests.operator.raw import job, pod, pytorch_job

Raw = dict[str, Any]
Happens = Callable[[Cache], object]


class Read:
    """An API server with one attempt; something happens after its pods were read, before the PyTorchJob is."""

    def __init__(self, meanwhile: Callable[[], object], found: Raw | None = None) -> None:
        self._meanwhile = meanwhile
        self._found = found or pytorch_job("3")

    async def list_pods(self, namespace: str, *, job_uid: str, attempt: int) -> Any:
        """As Cluster's."""
        yield pod("4")

    async def get_pytorch_job(self, namespace: str, name: str) -> Raw:
        """As Cluster's."""
        self._meanwhile()
        return self._found


def read(happens: Happens) -> Cache:
    """The cache after an attempt was read while that happened."""
    cache = Cache()
    cached = cache.job_read(job({"phase": "Running", "attempt": 1}))
    cache.child_seen(PYTORCH_PLURAL, pytorch_job("3"), deleted=False)
    cache.child_seen(PODS_PLURAL, pod("4"), deleted=False)
    cluster = Read(lambda: happens(cache))
    attempts = Attempts(cluster, OperatorSettings(), cache)  # type: ignore[arg-type]
    asyncio.run(attempts.read(cached, 1))
    return cache


def must_be_read(cache: Cache) -> bool:
    """Whether the next reconcile reads the attempt again."""
    (key,) = cache.all_keys()
    cached = cache.find(key)
    assert cached is not None
    return cache.children(key, cached.uid).must_be_read


def _pod_ends(cache: Cache) -> None:
    cache.child_seen(PODS_PLURAL, pod("5", "Succeeded"), deleted=True)


def _pytorch_job_goes(cache: Cache) -> None:
    cache.child_seen(PYTORCH_PLURAL, pytorch_job("5"), deleted=True)


def _resync_misses_the_pod(cache: Cache) -> None:
    cache.keep_only(PODS_PLURAL, (None,), set(), "999999")


@pytest.mark.parametrize("happens", [_pod_ends, _pytorch_job_goes, _resync_misses_the_pod])
def test_an_end_that_is_told_while_the_attempt_is_read_is_read_next_time(happens: Happens) -> None:
    assert must_be_read(read(happens))


def test_an_attempt_that_goes_on_calmly_need_not_be_read_again() -> None:
    assert not must_be_read(read(lambda cache: None))


def test_what_was_read_is_known_as_it_is_listed_calm_or_not() -> None:
    """Else each resync would wait for its event, read it again, and take the watch for silent."""
    cache = Cache()
    cached = cache.job_read(job({"phase": "Queued", "attempt": 1}))
    suspended = pytorch_job("3", conditions=[{"type": "Suspended", "status": "True"}])
    cluster = Read(lambda: None, suspended)
    asyncio.run(Attempts(cluster, OperatorSettings(), cache).read(cached, 1))  # type: ignore[arg-type]
    assert must_be_read(cache)
    assert cache.is_current(PYTORCH_PLURAL, suspended)
    assert cache.is_current(PODS_PLURAL, pod("4"))
