"""Pods and PyTorchJobs as others write them: read where they make sense, never a reason to fall over."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.names import KUEUE_QUEUE_LABEL, REPLICA_INDEX_LABEL
from finetune_operator.policy.observed import TEXT_LIMIT, is_owned, read_pod, read_pytorch_job, read_verification
from finetune_operator.policy.times import after
from tests.api.extremes import nested
from tests.operator.policy.views import NOW, later, success
from tests.operator.steps import counted

WORDS = success().to_bytes().decode()


def raw_pod(status: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """A pod of worker 1."""
    labels = {REPLICA_INDEX_LABEL: "1"}
    return {"metadata": {"name": "p", "uid": "u", "labels": labels, **metadata}, "status": status}


def container(**state: Any) -> dict[str, Any]:
    """Status of the trainer's container, behind a sidecar's."""
    return {"containerStatuses": [{"name": "istio", "state": {"running": {}}}, {"name": "pytorch", "state": state}]}


def test_an_end_is_read_from_the_trainers_container() -> None:
    state = {"exitCode": 0, "reason": "Completed", "message": WORDS, "finishedAt": "2026-01-31T12:00:00Z"}
    found = read_pod(raw_pod({"phase": "Running", **container(terminated=state)}))
    assert (found.index, found.ended, found.succeeded, found.ended_at) == (1, True, True, later(0))
    assert found.last_words == success()


def test_a_foreign_message_is_quoted_and_not_believed() -> None:
    state = {"exitCode": 1, "message": "Traceback …"}
    found = read_pod(raw_pod({"phase": "Failed", **container(terminated=state)}))
    assert (found.last_words, found.ended_message, found.exit_code) == (None, "Traceback …", 1)


@pytest.mark.parametrize(
    ("status", "disruption"),
    [
        ({"phase": "Failed", "reason": "Evicted", "message": "no disk"}, "Evicted: no disk"),
        ({"phase": "Failed", "reason": "OutOfnvidia.com/gpu", "message": "no GPU"}, "OutOfnvidia.com/gpu: no GPU"),
        # A node refused it, for a reason that is not in any list.
        (
            {"phase": "Failed", "reason": "VolumeAttachmentLimitExceeded", "message": "Pod was rejected: too many"},
            "VolumeAttachmentLimitExceeded: Pod was rejected: too many",
        ),
        ({"phase": "Failed", "reason": "Error", "message": "It was not: Pod was rejected: x"}, None),
        ({"phase": "Failed", "message": "Pod was rejected: x"}, "Pod was rejected: x"),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "ByKubelet"}]}, "ByKubelet"),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True"}]}, "DisruptionTarget"),
        ({"phase": "Failed", "reason": "NodeShutdown"}, "NodeShutdown"),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True", "message": "preempting"}]}, "preempting"),
        ({"conditions": [{"type": "DisruptionTarget", "status": "False", "message": "no"}]}, None),
        ({"phase": "Failed", "reason": "Error"}, None),
        ({"phase": "Running", "reason": "Evicted"}, None),
    ],
)
def test_what_the_cluster_took_away_is_told_from_what_failed(status: dict[str, Any], disruption: str | None) -> None:
    assert read_pod(raw_pod(status)).disruption == disruption


def spec(**resources: Any) -> dict[str, Any]:
    """A pod's spec with those resources of the trainer's container, behind a sidecar's."""
    sidecar = {"name": "istio", "resources": {"limits": {"memory": "1Gi"}}}
    return {"nodeName": "node-7", "containers": [sidecar, {"name": "pytorch", "resources": resources}]}


@pytest.mark.parametrize(
    ("resources", "limit", "its_own"),
    [
        ({}, None, False),
        ({"requests": {"memory": "64Gi"}}, None, False),
        ({"limits": {"memory": "64Gi"}}, "64Gi", True),
        ({"limits": {"memory": "64Gi"}, "requests": {"memory": "64Gi"}}, "64Gi", True),
        ({"limits": {"memory": "64Gi"}, "requests": {"memory": "8Gi"}}, "64Gi", False),
        ({"limits": {"memory": 1024}, "requests": {"memory": "8"}}, "1024", False),
        ({"limits": {"memory": ["64Gi"]}}, None, False),
        ({"limits": {"memory": ""}}, None, False),
    ],
)
def test_whose_memory_it_is_is_read_from_the_spec(resources: dict[str, Any], limit: str | None, its_own: bool) -> None:
    found = read_pod({"spec": spec(**resources)})
    assert (found.node, found.memory_limit, found.memory_is_its_own) == ("node-7", limit, its_own)


@pytest.mark.parametrize(("name", "node"), [(None, None), ("", None), ("n" * 300, "n" * 253)])
def test_a_node_has_a_name_that_status_can_hold(name: str | None, node: str | None) -> None:
    assert read_pod({"spec": {"nodeName": name}}).node == node


def init(name: str, **state: Any) -> dict[str, Any]:
    """Status of an init container."""
    return {"name": name, "state": state}


def test_what_an_init_container_waits_for_is_what_the_pod_waits_for() -> None:
    done = init("first", terminated={"exitCode": 0, "reason": "Completed"})
    stuck = init("mesh", waiting={"reason": "ErrImagePull", "message": "no such image"})
    its_turn = init("last", waiting={"reason": "PodInitializing"})
    status = {"initContainerStatuses": [done, stuck, its_turn], **container(waiting={"reason": "PodInitializing"})}
    found = read_pod(raw_pod(status))
    assert (found.init_container, found.waiting, found.waiting_message) == ("mesh", "ErrImagePull", "no such image")
    status["initContainerStatuses"] = [done, its_turn]
    found = read_pod(raw_pod(status))
    assert (found.init_container, found.waiting) == (None, "PodInitializing")


@pytest.mark.parametrize(("message", "text"), [("no route", "no route"), ("", "exit code 137")])
def test_an_init_container_that_failed_is_the_end_of_its_pod(message: str, text: str) -> None:
    ended = {"exitCode": 137, "reason": "OOMKilled", "message": message, "finishedAt": "2026-01-31T12:00:00Z"}
    waits = container(waiting={"reason": "PodInitializing"})
    found = read_pod(raw_pod({"phase": "Failed", "initContainerStatuses": [init("mesh", terminated=ended)], **waits}))
    assert (found.init_container, found.ended, found.exit_code) == ("mesh", True, None)
    assert (found.ended_reason, found.ended_message, found.ended_at) == ("OOMKilled", text, later(0))


def test_an_init_container_that_waits_for_nothing_known_has_no_end() -> None:
    stuck = init("mesh", waiting={"reason": "CrashLoopBackOff"})
    found = read_pod(raw_pod({"phase": "Pending", "initContainerStatuses": [stuck]}))
    assert (found.init_container, found.waiting, found.ended_reason, found.ended_message) == (
        "mesh",
        "CrashLoopBackOff",
        "",
        "",
    )
    del stuck["name"]
    assert read_pod(raw_pod({"phase": "Pending", "initContainerStatuses": [stuck]})).init_container == ""


def test_a_sidecar_that_is_stopped_behind_the_trainer_tells_nothing() -> None:
    sidecar = init("mesh", terminated={"exitCode": 143, "reason": "Error"})
    states: list[dict[str, Any]] = [{"running": {}}, {"terminated": {"exitCode": 0, "reason": "Completed"}}]
    for state in states:
        found = read_pod(raw_pod({"phase": "Running", "initContainerStatuses": [sidecar], **container(**state)}))
        assert found.init_container is None


def test_when_the_container_began_is_its_own_word() -> None:
    for state in ("running", "terminated"):
        found = read_pod(raw_pod(container(**{state: {"startedAt": "2026-01-31T12:00:00Z"}})))
        assert found.started_at == later(0)
    assert read_pod(raw_pod(container(waiting={}))).started_at is None


@pytest.mark.parametrize(
    ("value", "code"), [(0, 0), (255, 255), (-1, -1), (True, None), ("3", None), (3.0, None), (None, None)]
)
def test_an_exit_code_is_a_whole_number(value: Any, code: int | None) -> None:
    assert read_pod(raw_pod(container(terminated={"exitCode": value, "reason": "Error"}))).exit_code == code


@pytest.mark.parametrize("replicas", [None, "many", float("inf"), float("nan"), [], "9" * 5000])
def test_a_number_that_is_none_counts_as_nothing(replicas: Any) -> None:
    raw = {"spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": replicas}}}}
    assert read_pytorch_job(raw, 1).nodes == 0


def test_waiting_and_scheduling() -> None:
    waiting = read_pod(raw_pod(container(waiting={"reason": "ErrImagePull", "message": "no such image"})))
    assert (waiting.waiting, waiting.waiting_message, waiting.ended) == ("ErrImagePull", "no such image", False)
    conditions = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "full"}]
    assert read_pod(raw_pod({"conditions": conditions})).unschedulable == "full"
    gated = [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]
    assert read_pod(raw_pod({"conditions": gated})).unschedulable is None


def test_a_pytorchjob() -> None:
    raw = {
        "metadata": {"name": "w", "uid": "u", "creationTimestamp": "2026-01-31T11:00:00Z"},
        "spec": {"runPolicy": {"suspend": False}, "pytorchReplicaSpecs": {"Worker": {"replicas": 3}}},
        "status": {
            "startTime": "2026-01-31T12:00:00Z",
            "conditions": [
                {"type": "Suspended", "status": "False", "lastTransitionTime": "2026-01-31T12:00:00Z"},
                {"type": "Failed", "status": "True", "message": "why", "lastTransitionTime": "2026-01-31T12:00:00Z"},
            ],
        },
    }
    found = read_pytorch_job(raw, 2)
    assert (found.attempt, found.nodes, found.created_at) == (2, 3, later(-3600))
    assert (found.resumed_at, found.end, found.end_message, found.ended_at) == (later(0), "Failed", "why", later(0))


@pytest.mark.parametrize(
    ("asked", "done", "suspended"),
    [(None, None, False), (True, None, True), (True, "True", True), (False, "True", True), (False, "False", False)],
)
def test_a_suspension_lasts_until_the_training_operator_knows_that_it_is_over(
    asked: bool | None, done: str | None, suspended: bool
) -> None:
    """Before that nobody can say since when the job is active again, and the old pods look like failures."""
    since = "2026-01-31T12:00:00Z"
    conditions = [{"type": "Suspended", "status": done, "lastTransitionTime": since}] if done else []
    found = read_pytorch_job({"spec": {"runPolicy": {"suspend": asked}}, "status": {"conditions": conditions}}, 1)
    assert (found.suspended, found.resumed_at) == (suspended, later(0) if done == "False" else None)


@pytest.mark.parametrize(("conditions", "has_run"), [([], False), (["Suspended"], False), (["Running"], True)])
def test_workers_that_have_run_are_told_from_those_that_never_did(conditions: list[str], has_run: bool) -> None:
    """When it suspends a PyTorchJob that runs, the training operator leaves the condition Running, as False."""
    found = [{"type": condition, "status": "False"} for condition in conditions]
    assert read_pytorch_job({"status": {"conditions": found}}, 1).has_run is has_run


@pytest.mark.parametrize(("label", "queue"), [("team", "team"), ("", None), (None, None), (7, "7")])
def test_the_queue_is_the_pytorchjobs_own(label: Any, queue: str | None) -> None:
    assert read_pytorch_job({"metadata": {"labels": {KUEUE_QUEUE_LABEL: label}}}, 1).queue == queue


@pytest.mark.parametrize(
    ("status", "ended"),
    [
        ({"conditions": [{"type": "Running", "status": "True"}]}, False),
        ({"conditions": [{"type": "Running", "status": "True"}, {"type": "Failed", "status": "True"}]}, True),
        ({"conditions": [{"type": "Succeeded", "status": "True"}]}, True),
        # Left by an end that was taken back.
        ({"conditions": [{"type": "Failed", "status": "False"}]}, False),
        ({"conditions": [{"type": "Succeeded"}]}, False),
        ({"conditions": "Failed"}, False),
        (None, False),
    ],
)
def test_the_end_of_a_pytorchjob_is_told_from_its_conditions(status: Any, ended: bool) -> None:
    assert read_pytorch_job({"status": status}, 1).ended is ended


@pytest.mark.parametrize(
    ("owners", "owned"),
    [
        ([{"uid": "u", "controller": True}], True),
        ([{"uid": "other"}, {"uid": "u", "controller": True}], True),
        ([{"uid": "u"}, {"uid": "other", "controller": True}], False),
        ([{"uid": "u", "controller": False}], False),
        ([], False),
        ("u", False),
    ],
)
def test_an_object_is_its_controllers(owners: Any, owned: bool) -> None:
    assert is_owned({"metadata": {"ownerReferences": owners}}, "u") is owned


LISTS = ("ownerReferences", "containers", "conditions", "containerStatuses", "initContainerStatuses")
FILLED: dict[str, Any] = {
    "empty maps": [{} for _ in range(450_000)],
    "numbers": [1] * 700_000,
    "typed": [{"type": f"T{number}", "status": "True", "name": "a"} for number in range(30_000)],
    "entries": {f"{number:x}": "" for number in range(100_000)},
    "deep": nested(700),
}


@pytest.mark.parametrize("filled", FILLED.values(), ids=list(FILLED))
@pytest.mark.parametrize("read", [read_pod, lambda raw: read_pytorch_job(raw, 1), lambda raw: is_owned(raw, "u")])
def test_what_somebody_has_filled_is_read_in_bounded_work(filled: Any, read: Callable[[Any], object]) -> None:
    """Whoever may write to an object can make it as large as the API server takes it, about 1.4 MB."""
    parts = ("metadata", "spec", "status")
    _, steps = counted(lambda: read({part: {**dict.fromkeys(LISTS, filled), "labels": filled} for part in parts}))
    assert steps < 45_000


def test_no_more_of_a_text_is_kept_than_a_condition_may_say() -> None:
    long = "x" * 1_400_000
    state = {"reason": long, "message": long, "finishedAt": long, "startedAt": long}
    status = {"phase": long, "reason": long, "message": long, **container(terminated=state)}
    pod = read_pod({"spec": spec(limits={"memory": long}), **raw_pod(status, name=long, creationTimestamp=long)})
    condition = {"type": "Failed", "status": "True", "message": long}
    pytorch_job = read_pytorch_job({"metadata": {"name": long}, "status": {"conditions": [condition]}}, 1)
    kept = [value for view in (pod, pytorch_job) for value in vars(view).values() if isinstance(value, str)]
    assert max(map(len, kept)) == TEXT_LIMIT


KEYS = [
    *("metadata", "spec", "status", "phase", "conditions", "containerStatuses", "state", "terminated", "waiting"),
    *("name", "reason", "exitCode", "message", "finishedAt", "labels", "ownerReferences", "runPolicy", "type"),
    *("pytorchReplicaSpecs", "Worker", "replicas", "initContainerStatuses", "containers", "resources", "limits"),
    *("memory", "nodeName", "running", "startedAt"),
]

nonsense = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), nonsense))
def test_anything_may_stand_anywhere(raw: dict[str, Any]) -> None:
    read_pod(raw)
    read_pytorch_job(raw, 1)
    read_verification(raw, [raw])
    is_owned(raw, "u")


@pytest.mark.parametrize(
    ("metadata", "deleted"),
    [
        ({"deletionTimestamp": "2026-01-31T12:00:30Z", "deletionGracePeriodSeconds": 30}, later(0)),
        ({"deletionTimestamp": "2026-01-31T12:00:30Z"}, later(30)),
        ({"deletionTimestamp": "2026-01-31T12:00:30Z", "deletionGracePeriodSeconds": "many"}, later(30)),
        ({"deletionTimestamp": "soon", "deletionGracePeriodSeconds": 30}, None),
        ({"deletionGracePeriodSeconds": 30}, None),
        ({"deletionTimestamp": "2026-01-31T12:00:30Z", "deletionGracePeriodSeconds": 10**30}, after(NOW, -(10**30))),
    ],
)
def test_a_pod_was_deleted_before_the_time_that_it_was_given(
    metadata: dict[str, Any], deleted: datetime | None
) -> None:
    found = read_pod({"metadata": metadata})
    assert (found.deleted_at, found.deleting) == (deleted, "deletionTimestamp" in metadata)
