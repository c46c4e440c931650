"""What an attempt does or waits for, while it has not ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.policy.conditions import ConditionWriter
from finetune_operator.policy.decide import decide
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.times import rfc3339
from finetune_operator.policy.waiting import Activity, activity, waits_for
from tests.operator.policy.views import NOW, PATIENCE, ended, later, observed, pod, pytorch_job, running


def doing(
    found: PyTorchJobView,
    pods: Sequence[PodView] = (),
    phase: Phase = Phase.RUNNING,
    ago: float = 3600,
) -> Activity:
    """What it does, having been active for so many seconds."""
    since = later(-ago)
    return activity(found, pods, now=NOW, since=since, pods_expected_seconds=30, phase=phase)


def waits(reason: str, message: str = "text of the kubelet", **more: Any) -> PodView:
    """A pod whose container waits."""
    return pod(0, waiting=reason, waiting_message=message, **more)


def mesh_waits(reason: str) -> PodView:
    """A pod with an init container of somebody else's that waits."""
    return waits(reason, init_container="mesh")


@pytest.mark.parametrize(
    ("found", "pods", "phase", "reason", "words"),
    [
        (
            pytorch_job(suspended=True, queue="team"),
            [],
            "Queued",
            "WaitingForQuota",
            "Attempt 1 waits in the queue team until Kueue admits it.",
        ),
        (
            pytorch_job(suspended=True, queue="team", has_run=True),
            [],
            "Queued",
            "WaitingForQuota",
            "was stopped by its queue team and waits there until Kueue admits it again",
        ),
        (pytorch_job(), [pod(unschedulable="0/3 nodes: 3 Insufficient gpu.")], "Pending", "Unschedulable", "0/3 nodes"),
        (pytorch_job(), [waits("ImagePullBackOff")], "Starting", "ImagePullFailed", "set workers.image"),
        (pytorch_job(), [waits("ErrImagePull")], "Starting", "ImagePullFailed", "text of the kubelet"),
        (pytorch_job(), [waits("InvalidImageName")], "Starting", "ImagePullFailed", "workers.image"),
        (pytorch_job(), [waits("CreateContainerConfigError")], "Starting", "ConfigurationMissing", "create it"),
        (pytorch_job(), [waits("CreateContainerError")], "Starting", "ContainerStartFailed", "text of the kubelet"),
        (
            pytorch_job(),
            [mesh_waits("ErrImagePull")],
            "Starting",
            "ImagePullFailed",
            "The image of the init container mesh of worker 0 cannot be pulled (ErrImagePull: text of the kubelet)",
        ),
        (
            pytorch_job(),
            [mesh_waits("CreateContainerConfigError")],
            "Starting",
            "ConfigurationMissing",
            "The init container mesh of worker 0 refers to a Secret",
        ),
        (
            pytorch_job(),
            [mesh_waits("CrashLoopBackOff")],
            "Starting",
            "ContainerStartFailed",
            "The init container mesh of worker 0 cannot be started (CrashLoopBackOff: text of the kubelet). It is not",
        ),
        (
            pytorch_job(),
            [waits("RunContainerError")],
            "Starting",
            "ContainerStartFailed",
            "The container of worker 0 cannot be started (RunContainerError: text of the kubelet).",
        ),
        (pytorch_job(), [waits("ContainerCreating", node="n")], "Starting", "PodsNotStarted", "that it mounts is miss"),
        (pytorch_job(), [waits("PodInitializing", node="n")], "Starting", "PodsNotStarted", "pod guard-1-worker-0` s"),
        (pytorch_job(), [pod(node="n")], "Starting", "PodsNotStarted", "the node does not answer"),
        (pytorch_job(), [pod()], "Starting", "PodsNotStarted", "Worker 0 has had no node for 10 minutes"),
        (pytorch_job(nodes=0), [], "Starting", "Starting", "the worker is being started"),
        (pytorch_job(), [], "Starting", "PodsNotCreated", "0 of 1 pods were created after 30 s"),
        (pytorch_job(nodes=2), [running(0)], "Starting", "PodsNotCreated", "1 of 2 pods"),
        (pytorch_job(nodes=2), [running(0), pod(1)], "Starting", "PodsNotStarted", "Worker 1 has had no node"),
        (pytorch_job(nodes=2), [running(0), running(1)], "Running", "Running", "all 2 workers run"),
        (pytorch_job(nodes=2), [running(0), ended(1)], "Running", "Running", "all 2 workers run"),
        (pytorch_job(edited=True), [running()], "Running", "Running", "was edited by hand"),
    ],
)
def test_phase_reason_and_sentence(
    found: PyTorchJobView, pods: Sequence[PodView], phase: str, reason: str, words: str
) -> None:
    made = doing(found, pods)
    assert (made.phase, made.reason) == (phase, reason)
    assert words in made.message
    assert made.again_at is None


def test_without_a_queue_somebody_suspended_it() -> None:
    for has_run in (False, True):
        assert "suspended by somebody else" in doing(pytorch_job(suspended=True, has_run=has_run)).message


def test_pods_have_time_to_be_made() -> None:
    made = doing(pytorch_job(), ago=10)
    assert (made.reason, made.again_at) == ("Starting", later(20))
    assert made.message == doing(pytorch_job(), [pod()], ago=10).message
    assert doing(pytorch_job(), ago=29).reason == "Starting"
    assert doing(pytorch_job(), ago=30).reason == "PodsNotCreated"


@pytest.mark.parametrize(
    ("times", "due"),
    [
        ({"scheduled_at": later(-100)}, 500),
        ({"scheduled_at": later(-3600)}, 0),
        ({"created_at": later(-100)}, 500),
        # Clocks that cannot be right: since the attempt is active.
        ({"scheduled_at": later(100)}, 0),
        ({"scheduled_at": later(-7200)}, 0),
    ],
)
def test_pods_have_time_to_start(times: dict[str, Any], due: float) -> None:
    slow = [pod(1, created_at=later(-3599), node="n"), pod(0, **{"created_at": later(-7200), **times})]
    made = doing(pytorch_job(), slow[1:])
    if not due:
        assert (made.reason, made.again_at) == ("PodsNotStarted", None)
    else:
        assert (made.reason, made.again_at) == ("Starting", later(due))
        assert made.message == doing(pytorch_job(), [pod()], ago=10).message
        # The slowest counts.
        assert "Worker 1 was given a node" in doing(pytorch_job(nodes=2), slow).message
    assert doing(pytorch_job(), [replace(slow[1], running=True)]).reason == "Running"


def test_what_has_ended_waits_for_no_queue() -> None:
    """Kueue suspends what it takes the quota from, and may be too late."""
    for end in ("Failed", "Succeeded"):
        made = doing(pytorch_job(suspended=True, end=end, queue="team"), [running()])
        assert made.reason != "WaitingForQuota"


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.RUNNING, Phase.PUBLISHING])
def test_the_trainers_own_phase_counts_once_all_run(phase: Phase) -> None:
    assert doing(pytorch_job(), [running()], phase=phase).phase is phase
    assert doing(pytorch_job(), [pod()], phase=phase).phase is Phase.STARTING


def test_a_worker_that_waits_says_more_than_one_that_runs() -> None:
    pods = [running(0), pod(1, waiting="ImagePullBackOff")]
    assert doing(pytorch_job(nodes=2), pods).reason == "ImagePullFailed"


@pytest.mark.parametrize(
    ("phase", "waits"),
    [
        (Phase.PENDING, True),
        (Phase.QUEUED, True),
        (Phase.STARTING, True),
        (Phase.RETRYING, True),
        (Phase.PREPARING, False),
        (Phase.RUNNING, False),
        (Phase.PUBLISHING, False),
        (Phase.SUSPENDED, False),
    ],
)
def test_a_job_waits_for_the_reason_in_its_status_until_it_trains(phase: Phase, waits: bool) -> None:
    status = FineTuneJobStatus()
    assert waits_for(status) is None
    ConditionWriter(status, NOW, 1).progressing(phase, "Unschedulable", "No room.")
    assert waits_for(status) == ("Unschedulable" if waits else None)


@pytest.mark.parametrize("skew", [1, 61, 3600])
@pytest.mark.parametrize("pods", [[], [pod(created_at=later(-599))]])
def test_two_operators_whose_clocks_differ_say_the_same_in_the_end(pods: list[PodView], skew: float) -> None:
    since = later(-29 if not pods else -599)
    status = FineTuneJobStatus(attempt=1, active_since=rfc3339(since), attempt_start_time=rfc3339(since))
    told = []
    for turn in range(6):
        now = later(skew if turn % 2 == 0 else 0)
        status = decide(observed(status, pytorch_job(), pods), now, PATIENCE).status
        told.append(waits_for(status))
    assert len(set(told)) == 1
    # Pods that come or begin to run end it.
    gone_on = decide(observed(status, pytorch_job(), [running()]), NOW, PATIENCE).status
    assert waits_for(gone_on) is None
