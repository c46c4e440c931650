"""What a watch tells while an attempt is read is not forgotten over what was read a moment before."""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from finetune_api.status import FineTuneJobStatus
from finetune_operator.attempts import Attempts
from finetune_operator.cache import Cache
from finetune_operator.names import PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.settings import OperatorSettings
from finetune_operator.verifications import MOST_PODS, Verifications
from tests.operator.policy.views import PATIENCE
from tests.operator.raw import CHILD, UID, child, controlled, job, pod, pytorch_job

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


class Filled(dict[str, Any]):
    """A pod of 1.4 MB, of which it can be told whether it is held."""

    def __hash__(self) -> int:  # type: ignore[override]  # only by which it is
        return id(self)


class Listed(Read):
    """An API server that lists these pods; the most of them that were held at a time."""

    def __init__(self, pods: Iterable[Raw]) -> None:
        super().__init__(lambda: None)
        self._pods = pods
        self.held = 0

    async def list_pods(self, namespace: str, *, job_uid: str, attempt: int) -> Any:
        """As Cluster's."""
        alive: weakref.WeakSet[Filled] = weakref.WeakSet()
        for raw in self._pods:
            filled = Filled(raw)
            alive.add(filled)
            yield filled
            del filled
            self.held = max(self.held, len(alive))

    def list_batch_job_pods(self, namespace: str, *, uid: str) -> Any:
        """As Cluster's."""
        return self.list_pods(namespace, job_uid="", attempt=0)

    async def get_batch_job(self, namespace: str, name: str) -> Raw:
        """As Cluster's."""
        return child("guard-verify")


def test_no_pod_of_an_attempt_is_held_whole_and_none_kept_that_has_no_workers_name() -> None:
    """Anybody can label pods as a job's, of 1.4 MB each."""
    names = [
        CHILD,
        *(f"{CHILD}-worker-{index}" for index in (*range(20), "", "x", "007", "²", 10**9)),
        "other-worker-1",
    ]
    labels = {"finetune.dev/job-uid": UID, "finetune.dev/attempt": "1"}
    foreign = {**pod(), "metadata": {**pod()["metadata"], "labels": {**labels, "finetune.dev/attempt": "2"}}}
    cluster, cache = Listed([*(controlled(child(name)) for name in names), foreign]), Cache()
    cached = cache.job_read(job({"phase": "Running", "attempt": 1}))
    _, pods = asyncio.run(Attempts(cluster, OperatorSettings(), cache).read(cached, 1))  # type: ignore[arg-type]
    assert sorted(pod.name for pod in pods) == sorted(f"{CHILD}-worker-{index}" for index in range(20))
    assert cluster.held <= 2


def test_no_pod_of_a_verification_is_held_whole_and_the_youngest_of_its_own_are_kept() -> None:
    owner = {"ownerReferences": [{"uid": "uid-of-guard-verify", "controller": True}]}
    raws = []
    for number in range(500):
        raw = child(f"verify-{number}", attempt="")
        raw["metadata"] |= {"creationTimestamp": f"2026-01-31T12:{number // 60:02}:{number % 60:02}Z"}
        raw["metadata"] |= owner if number % 2 else {}
        raws.append(raw)
    random.Random(1).shuffle(raws)
    cluster, cache, settings = Listed(raws), Cache(), OperatorSettings()
    cached = cache.job_read(job({"phase": "Succeeded", "attempt": 1}))
    attempts = Attempts(cluster, settings, cache)  # type: ignore[arg-type]
    reading = Verifications(cluster, settings, attempts, PATIENCE)  # type: ignore[arg-type]
    view = asyncio.run(reading.read(cached, FineTuneJobStatus()))
    assert view is not None
    assert [pod.name for pod in view.pods] == [f"verify-{number}" for number in range(501 - 2 * MOST_PODS, 500, 2)]
    assert cluster.held <= 2
