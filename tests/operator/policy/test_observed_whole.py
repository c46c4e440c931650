"""Whole objects, as a cluster has them, and empty ones: every field is read from its place, and from no other."""

from __future__ import annotations

from typing import Any

from finetune_operator.policy.evictions import exceeded_limit
from finetune_operator.policy.observed import (
    PodView,
    PyTorchJobView,
    VerificationView,
    read_pod,
    read_pytorch_job,
    read_verification,
)
from tests.operator.policy.views import later, success

AT = [f"2026-01-31T12:00:0{second}Z" for second in range(10)]
"""Times, one for each place."""
TOO_LARGE = 'Usage of EmptyDir volume "finetune-cache" exceeds the limit "1Gi". '


def raw_pod(**status: Any) -> dict[str, Any]:
    """A worker's pod with everything but the state of its container."""
    return {
        "metadata": {
            "name": "guard-1-worker-1",
            "uid": "pod-uid",
            "creationTimestamp": AT[0],
            "deletionTimestamp": AT[9],
            "deletionGracePeriodSeconds": 1,
            "labels": {"training.kubeflow.org/replica-index": "1"},
            "ownerReferences": [{"uid": "another"}, {"uid": "owner-uid", "controller": True}],
        },
        "spec": {
            "nodeName": "node-7",
            "containers": [
                {"name": "mesh", "resources": {"limits": {"memory": "1Mi"}, "requests": {"memory": "2Mi"}}},
                {"name": "pytorch", "resources": {"limits": {"memory": "64Gi"}, "requests": {"memory": "8Gi"}}},
            ],
        },
        "status": status,
    }


EVERYWHERE: dict[str, Any] = {
    "index": 1,
    "name": "guard-1-worker-1",
    "uid": "pod-uid",
    "owner_uid": "owner-uid",
    "created_at": later(0),
    "deleting": True,
    "deleted_at": later(8),
    "node": "node-7",
    "memory_limit": "64Gi",
    "memory_request": "8Gi",
}
READY = {"type": "Ready", "status": "False", "lastTransitionTime": AT[4]}
FULL = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: full"}
TARGET = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempted"}


def state(name: str = "pytorch", **what: Any) -> dict[str, Any]:
    """A container's status."""
    return {"name": name, "state": what}


def test_a_pod_that_waits() -> None:
    waiting = state(waiting={"reason": "ErrImagePull", "message": "no such image"})
    found = read_pod(
        raw_pod(phase="Pending", conditions=[FULL], containerStatuses=[state("mesh", running={}), waiting])
    )
    assert found == PodView(
        **EVERYWHERE,
        phase="Pending",
        unschedulable="0/3 nodes: full",
        waiting="ErrImagePull",
        waiting_message="no such image",
    )


def test_a_pod_that_runs() -> None:
    other = state("mesh", terminated={"exitCode": 3, "startedAt": AT[7]})
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": AT[1]}
    running = [other, state(running={"startedAt": AT[2]})]
    found = read_pod(raw_pod(phase="Running", conditions=[scheduled], containerStatuses=running))
    assert found == PodView(**EVERYWHERE, phase="Running", running=True, started_at=later(2), scheduled_at=later(1))


def test_a_pod_that_has_ended() -> None:
    words = success()
    ended = {
        "exitCode": 3,
        "reason": "Error",
        "message": words.to_bytes().decode(),
        "startedAt": AT[2],
        "finishedAt": AT[3],
    }
    found = read_pod(
        raw_pod(
            phase="Failed",
            reason="Odd",
            message="odd",
            conditions=[READY, TARGET],
            containerStatuses=[state(terminated=ended)],
        )
    )
    assert found == PodView(
        **EVERYWHERE,
        phase="Failed",
        disruption="preempted",
        started_at=later(2),
        ended=True,
        exit_code=3,
        ended_reason="Error",
        ended_message=words.to_bytes().decode(),
        last_words=words,
        ended_at=later(3),
    )


def test_a_pod_of_which_no_container_ran() -> None:
    found = read_pod(raw_pod(phase="Failed", reason="NodeLost", message="It is gone.", conditions=[READY]))
    assert found == PodView(
        **EVERYWHERE,
        phase="Failed",
        disruption="NodeLost: It is gone.",
        ended=True,
        ended_reason="NodeLost",
        ended_message="It is gone.",
        ended_at=later(4),
    )


def test_a_pod_that_was_evicted_for_its_own_limit() -> None:
    ended = {"exitCode": 137, "reason": "Error", "startedAt": AT[2], "finishedAt": AT[3]}
    found = read_pod(
        raw_pod(phase="Failed", reason="Evicted", message=TOO_LARGE, containerStatuses=[state(terminated=ended)])
    )
    assert found == PodView(
        **EVERYWHERE,
        phase="Failed",
        disk_limit=exceeded_limit(TOO_LARGE),
        started_at=later(2),
        ended=True,
        exit_code=137,
        ended_reason="Error",
        ended_message=TOO_LARGE,
        ended_at=later(3),
    )


def test_a_pod_whose_init_container_failed() -> None:
    failed = {"exitCode": 3, "reason": "Error", "message": "no route", "finishedAt": AT[3]}
    first = state("first", terminated={"exitCode": 0, "reason": "Completed", "finishedAt": AT[1]})
    found = read_pod(
        raw_pod(
            phase="Failed",
            initContainerStatuses=[first, state("mesh", terminated=failed)],
            containerStatuses=[state(waiting={"reason": "PodInitializing"})],
        )
    )
    assert found == PodView(
        **EVERYWHERE,
        phase="Failed",
        init_container="mesh",
        ended=True,
        ended_reason="Error",
        ended_message="no route",
        ended_at=later(3),
    )


def test_a_pod_of_which_nothing_is_known() -> None:
    assert read_pod({}) == PodView(index=0, name="", uid="", phase="Pending")
    unknown = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}
    assert read_pod({"status": unknown}).unschedulable == "No node can take the pod."


def test_a_pod_of_another_container() -> None:
    ended = state("verify", terminated={"exitCode": 2})
    raw = {"spec": {"containers": [{"name": "verify", "resources": {"limits": {"memory": "1Gi"}}}]}}
    found = read_pod({**raw, "status": {"containerStatuses": [ended]}}, "verify")
    assert (found.exit_code, found.memory_limit) == (2, "1Gi")


def raw_pytorch_job(**status: Any) -> dict[str, Any]:
    """With everything but its state."""
    return {
        "metadata": {
            "name": "guard-2",
            "uid": "job-uid",
            "creationTimestamp": AT[0],
            "deletionTimestamp": AT[9],
            "labels": {"kueue.x-k8s.io/queue-name": "team"},
        },
        "spec": {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Worker": {"replicas": 3}}},
        "status": status,
    }


WHOLE: dict[str, Any] = {
    "name": "guard-2",
    "uid": "job-uid",
    "attempt": 2,
    "nodes": 3,
    "created_at": later(0),
    "deleting": True,
    "suspended": True,
    "queue": "team",
}


COUNTS = {"Master": {"failed": 8}, "Worker": {"active": 1, "succeeded": 2, "failed": 4}}


def test_a_pytorchjob_that_has_ended() -> None:
    conditions = [
        {"type": "Suspended", "status": "False", "lastTransitionTime": AT[2]},
        {"type": "Running", "status": "False", "lastTransitionTime": AT[7]},
        {"type": "Failed", "status": "True", "message": "It was asked to.", "lastTransitionTime": AT[3]},
    ]
    found = read_pytorch_job(
        raw_pytorch_job(startTime=AT[1], completionTime=AT[4], conditions=conditions, replicaStatuses=COUNTS),
        2,
        edited=True,
    )
    assert found == PyTorchJobView(
        **WHOLE,
        has_run=True,
        pods_ended=6,
        started_at=later(1),
        resumed_at=later(2),
        end="Failed",
        end_message="It was asked to.",
        ended_at=later(4),
        edited=True,
    )
    stopped = [{"type": "Suspended", "status": "True", "lastTransitionTime": AT[2]}]
    assert read_pytorch_job(raw_pytorch_job(conditions=stopped), 2) == PyTorchJobView(**WHOLE, suspended_at=later(2))
    late = read_pytorch_job(raw_pytorch_job(conditions=conditions), 2)
    assert (late.ended_at, late.edited) == (later(3), False)


def test_a_pytorchjob_of_which_nothing_is_known() -> None:
    assert read_pytorch_job({}, 7) == PyTorchJobView(name="", uid="", attempt=7, nodes=0)
    succeeded = read_pytorch_job({"status": {"conditions": [{"type": "Succeeded", "status": "True"}]}}, 7)
    assert succeeded == PyTorchJobView(name="", uid="", attempt=7, nodes=0, end="Succeeded")


def verifying(name: str, owner: str, created: str | None) -> dict[str, Any]:
    """A pod of a verification."""
    metadata = {"name": name, "ownerReferences": [{"uid": owner, "controller": True}], "creationTimestamp": created}
    return {"metadata": metadata, "status": {"containerStatuses": [state("verify", running={})]}}


def test_a_verification() -> None:
    raw = {
        "metadata": {
            "name": "guard-verify",
            "uid": "verify-uid",
            "creationTimestamp": AT[0],
            "deletionTimestamp": AT[9],
            "labels": {"kueue.x-k8s.io/queue-name": "team"},
        },
        "spec": {"suspend": True},
        "status": {
            "startTime": AT[1],
            "conditions": [
                {"type": "Suspended", "status": "True", "reason": "no", "message": "no"},
                {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "It took too long."},
            ],
        },
    }
    pods = [
        verifying("new", "verify-uid", AT[5]),
        verifying("undated", "verify-uid", None),
        verifying("b", "verify-uid", AT[4]),
        verifying("a", "verify-uid", AT[4]),
        verifying("foreign", "other", AT[3]),
    ]
    found = read_verification(raw, pods)
    assert [pod.name for pod in found.pods] == ["a", "b", "new", "undated"]
    assert all(pod.running for pod in found.pods)
    assert found == VerificationView(
        name="guard-verify",
        uid="verify-uid",
        created_at=later(0),
        started_at=later(1),
        deleting=True,
        suspended=True,
        queue="team",
        ended=True,
        end_reason="DeadlineExceeded",
        end_message="It took too long.",
        pods=found.pods,
    )


def test_a_verification_of_which_nothing_is_known() -> None:
    assert read_verification({}, []) == VerificationView(name="", uid="", pods=[])
    complete = {"conditions": [{"type": "Complete", "status": "True"}]}
    assert read_verification({"status": complete}, []) == VerificationView(name="", uid="", pods=[], ended=True)
    half = {"conditions": [{"type": "Complete", "status": "False"}, {"type": "Failed", "status": "True"}]}
    assert read_verification({"status": half}, []) == VerificationView(name="", uid="", pods=[], ended=True)
