"""What is kept of jobs and their children: never older than what we wrote, and nothing that outlives its job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cache import Cache
from finetune_operator.children import is_newer
from finetune_operator.kept import SPEC_BYTES
from finetune_operator.names import (
    FINETUNE_PLURAL,
    KUEUE_PRIORITY_LABEL,
    KUEUE_QUEUE_LABEL,
    PODS_PLURAL,
    PYTORCH_PLURAL,
    child_name,
    pod_name,
)
from finetune_operator.queue import Key
from tests.operator.raw import CHILD, KEY, UID, child, controlled, finished, job, pod, pytorch_job


def test_another_job_of_the_same_name_is_another_job() -> None:
    cache = Cache()
    first = cache.job_read(job())
    first.attempt, first.pytorch_job_uid = 3, "w"
    cache.child_seen(PODS_PLURAL, pod(), deleted=False)
    assert cache.job_read(job()) is first
    assert cache.current_attempt("team", "guard", UID) == (3, "w")
    again = job(version="20")
    again["metadata"]["uid"] = "other"
    assert cache.job_read(again) is not first
    assert cache.current_attempt("team", "guard", UID) is None
    assert cache.current_attempt("team", "guard", "other") is None
    assert cache.children(KEY, "other").empty


@pytest.mark.parametrize(("read", "kept"), [("11", "12"), ("12", "12"), ("13", "13")])
def test_what_was_read_is_not_put_over_what_a_watch_told_of_meanwhile(read: str, kept: str) -> None:
    cache = Cache()
    cache.job_seen(job(version="10"))
    cache.job_seen(job(version="12"))
    cached = cache.job_read(job(version=read))
    assert cached.version == kept
    assert cached.raw is not None
    assert cached.raw["metadata"]["resourceVersion"] == kept


def test_asking_for_what_is_known_of_a_child_keeps_nothing() -> None:
    cache = Cache()
    for raw in (job(finished()), job()):
        cached = cache.job_read(raw)
        cached.done = True
        for kind, listed in ((PYTORCH_PLURAL, pytorch_job()), (PODS_PLURAL, pod())):
            assert cache.is_current(kind, listed)
    assert cache.size() == (1, 0)


def test_whatever_goes_is_told_once_by_its_uid() -> None:
    gone: list[str] = []
    cache, namesake = Cache(gone.append), job()
    cache.job_read(job())
    namesake["metadata"] |= {"uid": "another", "resourceVersion": "99"}
    cache.job_seen(namesake)
    assert gone == [UID]
    cache.forget(KEY)
    cache.forget(KEY)
    assert gone == [UID, "another"]


def test_the_first_worker_of_an_open_attempt_is_expected_and_no_other_pod() -> None:
    cache = Cache()
    cached = cache.job_read(job())
    worker = f"{CHILD}-worker-0"
    assert not cache.expects("team", worker)
    assert cache.open_namespaces() == set()
    cached.attempt = 1
    assert cache.expects("team", worker)
    assert cache.open_namespaces() == {"team"}
    others = (
        f"{CHILD}-worker-1",
        f"{CHILD}-worker-",
        CHILD,
        worker.replace("-1-", "-2-"),
        "",
        "-",
        f"{worker}-worker-0",
    )
    assert not any(cache.expects("team", other) for other in others)
    assert not cache.expects("other", worker)
    cached.attempt = 2
    assert not cache.expects("team", worker)
    cached.attempt = 1
    cache.forget(KEY)
    assert not cache.expects("team", worker)
    assert not cache._stems


def test_the_pod_of_a_job_with_a_long_name_is_expected_by_its_shortened_one() -> None:
    cache, name, uid = Cache(), "a" * 35 + "-" + "b" * 20, "0b5c1f6e-8d0f-4c55-a0f0-51a1b3f0c0de"
    raw = job()
    raw["metadata"].update(name=name, uid=uid)
    cache.job_read(raw).attempt = 12
    assert cache.expects("team", pod_name(child_name(name, uid, 12), 0))


@pytest.mark.parametrize(
    ("version", "than", "newer"),
    [("10", "9", True), ("9", "10", False), ("9", "9", False), ("9", "", True), ("b", "a", True), ("a", "a", False)],
)
def test_versions_are_numbers_where_they_can_be(version: str, than: str, newer: bool) -> None:
    assert is_newer(version, than) is newer


@given(st.permutations(range(1, 7)))
def test_in_whatever_order_versions_come_the_newest_is_kept(order: list[int]) -> None:
    cache = Cache()
    for version in order:
        cache.job_seen(job({"phase": "Running", "failures": version}, version=str(version)))
        cache.child_seen(
            PYTORCH_PLURAL, pytorch_job(str(version), startTime=f"2026-01-31T12:00:0{version}Z"), deleted=False
        )
        cache.child_seen(PODS_PLURAL, pod(str(version), "Running" if version == 6 else "Pending"), deleted=False)
    found = cache.find(KEY)
    assert found is not None
    assert found.raw is not None
    assert found.raw["status"]["failures"] == 6
    seen, pods = cache.children(KEY, UID).of_attempt(1)
    assert seen is not None
    assert seen.started_at is not None
    assert seen.started_at.second == 6
    assert [one.phase for one in pods] == ["Running"]


def test_a_pytorchjob_is_ours_only_if_the_job_controls_it() -> None:
    cache = Cache()
    cache.job_seen(job())
    foreign = pytorch_job()
    foreign["metadata"]["ownerReferences"] = [{"uid": "somebody", "controller": True}]
    assert cache.child_seen(PYTORCH_PLURAL, foreign, deleted=False) is None
    assert cache.children(KEY, UID).of_attempt(1) == (None, [])


def test_what_says_nothing_new_to_the_policies_is_no_news() -> None:
    cache = Cache()
    cache.job_seen(job())
    assert cache.child_seen(PYTORCH_PLURAL, pytorch_job("1"), deleted=False) == KEY
    same = pytorch_job("2", replicaStatuses={"Worker": {}})
    assert cache.child_seen(PYTORCH_PLURAL, same, deleted=False) is None
    running = pytorch_job("3", startTime="2026-01-31T12:00:00Z")
    assert cache.child_seen(PYTORCH_PLURAL, running, deleted=False) == KEY


def test_the_pod_of_a_verification_tells_of_its_own_container() -> None:
    cache = Cache()
    cache.job_seen(job())
    waiting = {"waiting": {"reason": "ErrImagePull"}}
    for version, state, news in (("1", {}, True), ("2", {}, False), ("3", waiting, True)):
        raw = child(
            "guard-verify", version, attempt="", status={"containerStatuses": [{"name": "verify", "state": state}]}
        )
        raw = controlled(raw, "guard-job-uid-verify", "Job")
        assert (cache.child_seen(PODS_PLURAL, raw, deleted=False) is not None) is news


NAMES = {"guard": UID, "other": "uid-of-other"}
"""Two jobs of one namespace."""


def real(name: str, kind: str, version: int) -> dict[str, Any]:
    """A PyTorchJob or pod of one of the jobs."""
    uid = NAMES[name]
    made = f"{name}-{uid[:8]}-1"
    phase = "Running" if version > 2 else "Pending"
    raw = pytorch_job(name=made) if kind == PYTORCH_PLURAL else child(f"{made}-worker-0", status={"phase": phase})
    raw = controlled(raw, made) if kind == PODS_PLURAL else raw
    raw["metadata"]["labels"] |= {"finetune.dev/job-name": name, "finetune.dev/job-uid": uid}
    raw["metadata"]["resourceVersion"] = str(version)
    if kind == PYTORCH_PLURAL:
        raw["metadata"]["ownerReferences"] = [{"uid": uid, "controller": True}]
    return raw


def forged(kind: str, named: str, uid: str, owner: str, version: int) -> dict[str, Any]:
    """An object of somebody else's that wears these labels, and says that it has that owner."""
    raw = child(f"forged-{kind}-{named}-{uid}-{owner}", str(version), status={"phase": "Running"})
    raw["metadata"]["labels"] |= {"finetune.dev/job-name": named, "finetune.dev/job-uid": uid}
    owners = [{"uid": owner, "controller": True, "kind": "ReplicaSet", "apiVersion": "apps/v1", "name": "web"}]
    raw["metadata"]["ownerReferences"] = owners if owner else []
    return raw


REAL = st.builds(real, st.sampled_from(list(NAMES)), st.sampled_from([PYTORCH_PLURAL, PODS_PLURAL]), st.integers(1, 5))
FORGED = st.one_of(
    st.builds(
        lambda labels, owner, version: (PYTORCH_PLURAL, forged("train", labels[0], labels[1], owner, version)),
        st.sampled_from([(name, uid) for name in (*NAMES, "nobody") for uid in (*NAMES.values(), "invented")]),
        st.sampled_from(["", "web"]),
        st.integers(1, 5),
    ),
    st.builds(
        lambda labels, owner, version: (PODS_PLURAL, forged("pod", labels[0], labels[1], owner, version)),
        st.sampled_from([(name, uid) for name in (*NAMES, "nobody") for uid in (*NAMES.values(), "invented")]),
        st.sampled_from(["", *NAMES.values(), "web"]),
        st.integers(1, 5),
    ),
    # It does say that the job controls it, and names another.
    st.builds(
        lambda labels, version: (PYTORCH_PLURAL, forged("train", labels[0], labels[1], labels[1], version)),
        st.sampled_from([("nobody", UID), ("other", UID), ("guard", NAMES["other"]), ("nobody", "invented")]),
        st.integers(1, 5),
    ),
)


def kind_of(raw: dict[str, Any]) -> str:
    """Which kind a real one is of."""
    return PYTORCH_PLURAL if "spec" in raw else PODS_PLURAL


def two_jobs() -> Cache:
    """What is kept of the jobs, after all was listed."""
    cache = Cache()
    cache.synced = True
    for name, uid in NAMES.items():
        raw = job()
        raw["metadata"] |= {"name": name, "uid": uid}
        cache.job_seen(raw)
    return cache


@given(st.lists(st.tuples(st.one_of(REAL, FORGED), st.booleans()), max_size=30))
def test_what_is_told_of_a_jobs_children_is_the_same_whatever_labels_others_wear(
    events: list[tuple[Any, bool]],
) -> None:
    alone, among = two_jobs(), two_jobs()
    for event, deleted in events:
        if isinstance(event, tuple):
            kind, raw = event
            assert among.child_seen(kind, raw, deleted=deleted) is None
            assert among.is_current(kind, raw), "each resync would read it anew"
            continue
        told = alone.child_seen(kind_of(event), event, deleted=deleted)
        assert among.child_seen(kind_of(event), event, deleted=deleted) == told
        for name, uid in NAMES.items():
            key = Key("team", name)
            assert among.children(key, uid) == alone.children(key, uid)
    listed = {("team", event["metadata"]["name"]) for event, _ in events if not isinstance(event, tuple)}
    for kind in (PYTORCH_PLURAL, PODS_PLURAL):
        assert among.keep_only(kind, (None,), listed, "99") == alone.keep_only(kind, (None,), listed, "99")
    assert set(among._children) - {(*Key("team", name), uid) for name, uid in NAMES.items()} == set()


def test_nothing_is_kept_for_labels_that_somebody_invented() -> None:
    cache = two_jobs()
    for number in range(100):
        cache.child_seen(PODS_PLURAL, forged("pod", "nobody", f"uid-{number}", "", 1), deleted=False)
        cache.child_seen(PYTORCH_PLURAL, forged("train", "guard", f"uid-{number}", "", 1), deleted=False)
    assert cache.size() == (2, 0)


def test_a_job_hears_of_its_children_although_others_say_that_theirs_are_its_own() -> None:
    """One names another job and this one's uid, the next nobody's name and this one's uid."""
    cache = two_jobs()
    cache.child_seen(PYTORCH_PLURAL, pytorch_job(), deleted=False)
    for name in ("other", "nobody"):
        cache.child_seen(PODS_PLURAL, forged("pod", name, UID, "", 1), deleted=False)
    assert cache.children(KEY, UID).of_attempt(1)[0] is not None
    assert cache.child_seen(PODS_PLURAL, pod(), deleted=False) == KEY


def test_children_of_a_job_that_was_not_listed_are_kept_until_all_jobs_were() -> None:
    cache = Cache()
    cache.child_seen(PYTORCH_PLURAL, pytorch_job(), deleted=False)
    listed = {("team", CHILD)}
    for synced in (False, True):
        cache.synced = synced
        assert cache.keep_only(PYTORCH_PLURAL, ("team",), listed, "99") == set()
        assert cache.size() == (0, 0 if synced else 1)


def test_a_pod_of_another_pytorchjob_of_that_name_is_none_of_the_attempts() -> None:
    cache = two_jobs()
    other = pod()
    other["metadata"]["ownerReferences"][0]["uid"] = "another"
    cache.child_seen(PODS_PLURAL, other, deleted=False)
    cache.child_seen(PYTORCH_PLURAL, pytorch_job(), deleted=False)
    assert cache.children(KEY, UID).of_attempt(1)[1] == []
    cache.child_seen(PODS_PLURAL, pod("2"), deleted=False)
    assert len(cache.children(KEY, UID).of_attempt(1)[1]) == 1


@pytest.mark.parametrize("kind", [PYTORCH_PLURAL, PODS_PLURAL])
def test_what_ends_has_to_be_read_and_what_is_not_listed_any_more_too(kind: str) -> None:
    raw = pytorch_job() if kind == PYTORCH_PLURAL else pod()
    cache = Cache()
    cache.job_seen(job())
    cache.child_seen(kind, raw, deleted=False)
    children = cache.children(KEY, UID)
    assert not children.must_be_read
    assert cache.keep_only(kind, ("other",), set(), "99") == set()
    assert cache.keep_only(kind, ("team",), {("team", raw["metadata"]["name"])}, "99") == set()
    assert not children.must_be_read
    assert cache.keep_only(kind, (None,), {("other", raw["metadata"]["name"])}, "99") == {KEY}
    assert children.must_be_read
    children.settled = children.doubts
    cache.child_seen(kind, raw, deleted=False)
    assert cache.child_seen(kind, raw, deleted=True) == KEY
    assert children.must_be_read
    assert children.empty


def test_the_late_end_of_an_earlier_object_of_that_name_is_not_that_of_the_present_one() -> None:
    cache = Cache()
    cache.job_seen(job())
    cache.child_seen(PYTORCH_PLURAL, pytorch_job(), deleted=False)
    earlier = pytorch_job()
    earlier["metadata"]["uid"] = "earlier"
    assert cache.child_seen(PYTORCH_PLURAL, earlier, deleted=True) is None
    assert cache.children(KEY, UID).of_attempt(1)[0] is not None


def test_what_is_listed_is_compared_by_version() -> None:
    cache = Cache()
    assert not cache.is_current(FINETUNE_PLURAL, job())
    assert cache.is_current(PODS_PLURAL, pod()), "a pod of no job that is known is nobody's yet"
    cache.job_seen(job(version="7"))
    assert cache.is_current(FINETUNE_PLURAL, job(version="7"))
    assert not cache.is_current(FINETUNE_PLURAL, job(version="8"))
    assert not cache.is_current(PODS_PLURAL, pod("3"))
    cache.child_seen(PODS_PLURAL, pod("3"), deleted=False)
    assert cache.is_current(PODS_PLURAL, pod("3"))
    assert not cache.is_current(PODS_PLURAL, pod("4"))


@given(
    st.lists(
        st.tuples(st.sampled_from(["job", "pod", "pytorchjob"]), st.booleans(), st.integers(1, 5)),
        max_size=20,
    )
)
def test_whatever_was_seen_nothing_is_left_of_a_job_that_is_gone_and_whose_children_are(
    events: list[tuple[str, bool, int]],
) -> None:
    cache = Cache()
    for what, deleted, version in events:
        if what == "job":
            if deleted:
                cache.forget(KEY)
            else:
                cache.job_seen(job(version=str(version)))
        else:
            raw = pod(str(version)) if what == "pod" else pytorch_job(str(version), name=f"{CHILD}-{version}")
            cache.child_seen(PODS_PLURAL if what == "pod" else PYTORCH_PLURAL, raw, deleted=deleted)
    cache.forget(KEY)
    for kind in (PODS_PLURAL, PYTORCH_PLURAL):
        cache.keep_only(kind, (None,), set(), "999999")
    assert cache.size() == (0, 0)


FILLED = {f"label-{number}": "x" for number in range(1000)}
"""What a tenant can write into an object, up to 1.4 MB of it."""


@pytest.mark.parametrize("keep", [Cache.job_seen, Cache.job_read])
@pytest.mark.parametrize("length", [0, 1_000, SPEC_BYTES, 1_000_000])
def test_of_a_job_only_what_is_decided_by_is_kept(keep: Callable[[Cache, Any], Any], length: int) -> None:
    raw = job({"phase": "Suspended", "attempt": 1}, base_model="x" * length)
    told = {"creationTimestamp": "2026-01-31T12:00:00Z", "deletionTimestamp": "2026-01-31T12:00:00Z"}
    kueue = {KUEUE_QUEUE_LABEL: "queue", KUEUE_PRIORITY_LABEL: "high"}
    expected = {**raw, "metadata": {**raw["metadata"], **told, "labels": kueue}}
    filled = {"annotations": FILLED, "finalizers": [*FILLED], "managedFields": [FILLED], "ownerReferences": [FILLED]}
    raw["metadata"] |= {**told, **filled, "labels": FILLED | kueue}
    if length >= SPEC_BYTES:
        del expected["spec"]
    cache = Cache()
    keep(cache, raw)
    found = cache.find(KEY)
    assert found is not None
    assert found.raw == expected


def test_a_spec_that_cannot_be_written_is_read_again() -> None:
    spec: dict[str, Any] = {}
    for _ in range(400):
        spec = {"deeper": spec}
    found = Cache().job_seen(job(deep=spec))
    assert found is not None
    assert found.raw is not None
    assert "spec" not in found.raw
