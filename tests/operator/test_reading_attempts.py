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
from tests.operator.raw import CHILD, controlled, job, pod, pytorch_job

Raw = dict[str, Any]
Happens = Callable[[Cache], object]


class Read:
    """An API server with one attempt; something happens after its pods were read, before the PyTorchJob is."""

    def __init__(self, meanwhile: Callable[[], object], found: Raw | None = None) -> None:
        self._meanwhile = meanwhile
        self._found: Raw | None = found or pytorch_job("3")

    async def list_pods(self, namespace: str, *, job_uid: str, attempt: int) -> Any:
        """As Cluster's."""
        yield pod("4")

    async def get_pytorch_job(self, namespace: str, name: str) -> Raw | None:
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


class Left(Read):
    """An API server with one pod of an attempt, with or without its PyTorchJob."""

    def __init__(self, left: Raw, found: Raw | None) -> None:
        super().__init__(lambda: None)
        self._left, self._found = left, found

    async def list_pods(self, namespace: str, *, job_uid: str, attempt: int) -> Any:
        """As Cluster's."""
        yield self._left


def named(name: str, raw: Raw) -> Raw:
    """The same under another name."""
    raw["metadata"]["name"] = name
    return raw


def without_owner() -> Raw:
    """A pod that nothing controls, although somebody says to own it."""
    raw = pod()
    raw["metadata"]["ownerReferences"] = [{"uid": f"uid-of-{CHILD}"}]
    return raw


def recreated() -> Raw:
    """A pod of another PyTorchJob of the name."""
    raw = pod()
    raw["metadata"]["ownerReferences"][0]["uid"] = "another"
    return raw


def with_the_next_version() -> Raw:
    """A pod of another kind of that name."""
    raw = pod()
    raw["metadata"]["ownerReferences"][0]["apiVersion"] = "trainer.kubeflow.org/v2"
    return raw


OURS = f"uid-of-{CHILD}"


@pytest.mark.parametrize(
    ("left", "there", "seen", "gone"),
    [
        (pod(), True, True, True),
        (recreated(), False, False, True),
        (with_the_next_version(), True, True, False),
        (controlled(pod(), "somebodys"), False, False, False),
        (controlled(pod(), CHILD, "Job"), True, True, False),
        (without_owner(), False, True, True),
        (named("innocent", without_owner()), False, False, False),
        (named(f"{CHILD}-worker-x", without_owner()), False, False, False),
        (named(f"{CHILD}-worker-", without_owner()), False, False, False),
        (named(f"{CHILD}0-worker-0", without_owner()), False, False, False),
    ],
    ids=[
        "its own",
        "of another PyTorchJob of that name",
        "of another kind's version",
        "of another PyTorchJob",
        "of a Job",
        "its own that was orphaned",
        "labels alone",
        "no number",
        "no number at all",
        "of another attempt's name",
    ],
)
def test_a_pod_is_an_attempts_if_its_pytorchjob_made_it(left: Raw, there: bool, seen: bool, gone: bool) -> None:
    """While the PyTorchJob is there, when it has gone, and when it went before this operator was there."""
    for found, workers, counts in (
        (pytorch_job(), None, there),
        (None, (1, OURS), seen),
        (None, None, gone),
        (None, (2, "of another attempt"), gone),
    ):
        cache = Cache()
        cached = cache.job_read(job({"phase": "Running", "attempt": 1}))
        cached.workers = workers
        attempts = Attempts(Left(left, found), OperatorSettings(), cache)  # type: ignore[arg-type]
        _, pods = asyncio.run(attempts.read(cached, 1))
        assert bool(pods) is counts, (found, workers)
        assert all(
            bool(one.owner_uid) is (left["metadata"]["ownerReferences"][0].get("controller", False)) for one in pods
        )
