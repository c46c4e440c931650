"""Which end of which pod was the cause, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from finetune_api.outcome import EXIT_CODES, Reason, is_retryable
from finetune_operator.policy.evictions import exceeded_limit
from finetune_operator.policy.failure_reason import Verdict, judge
from finetune_operator.policy.observed import PodView, PyTorchJobView
from tests.operator.policy.views import (
    NOW,
    checkpoint,
    ended,
    failure,
    later,
    pod,
    pytorch_job,
    running,
    success,
)


def verdict(pods: Sequence[PodView], found: PyTorchJobView | None = None) -> Verdict:
    """The judgement, which must have been made: the end was noticed long ago."""
    found = found or pytorch_job(nodes=max(1, len(pods)))
    made = judge(found, pods, now=NOW, group_end_seconds=30, noticed=later(-30))
    assert isinstance(made, Verdict), made
    return made


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.TERMINATED])
def test_a_trainers_sentence_is_the_jobs(reason: Reason) -> None:
    code = EXIT_CODES[reason]
    made = verdict([ended(0, code, failure(reason, "The rows are bad: mend them."))])
    assert (made.reason, made.message, made.exit_code) == (reason, "The rows are bad: mend them.", code)
    assert made.retryable is is_retryable(code)
    assert made.counted


PEER = failure(Reason.PEER_FAILED, collateral=True)
CRASH = failure(Reason.INTERNAL_ERROR)
BAD_DATA = failure(Reason.DATA_INVALID)
HUB = failure(Reason.HUB_UNAVAILABLE)
STOPPED = failure(Reason.TERMINATED)
NO_PROGRAM = 'exec: "python": executable file not found in $PATH'
TOO_LARGE = exceeded_limit('Usage of EmptyDir volume "finetune-cache" exceeds the limit "100Gi". ')
FULL = ended(1, 137, phase="Failed", disk_limit=TOO_LARGE)
EVICTED = ended(1, None, phase="Failed", disruption="Evicted: the node was low on memory")


@pytest.mark.parametrize(
    ("first", "second", "reason", "retryable", "counted"),
    [
        # The cause beside its echo, whoever was first.
        (ended(0, 203, PEER, ago=9), ended(1, 11, BAD_DATA), "DataInvalid", False, True),
        (ended(0, 203, PEER, ago=9), ended(1, 201, HUB), "HubUnavailable", True, True),
        (ended(0, 203, PEER), ended(1, 203, PEER), "PeerFailed", True, True),
        (ended(0, 204, CRASH, ago=9), ended(1, 201, HUB), "HubUnavailable", True, True),
        # An echo by either mark, unless its pod was taken away.
        (ended(0, 203, failure(Reason.PEER_FAILED), ago=9), ended(1, 139), "TrainerCrashed", True, True),
        (ended(0, 201, failure(Reason.HUB_UNAVAILABLE, collateral=True)), ended(1, 139), "TrainerCrashed", True, True),
        (ended(0, 203, PEER, deleting=True), ended(1, 139), "Disrupted", True, False),
        # What the cluster says of a pod.
        (ended(0, 203, PEER, ago=9), ended(1, 137, ended_reason="OOMKilled"), "OutOfMemory", False, True),
        (ended(0, 204, CRASH), ended(1, 137, CRASH, ended_reason="OOMKilled"), "OutOfMemory", False, True),
        (ended(0, 11, BAD_DATA), ended(1, 137, ended_reason="OOMKilled"), "DataInvalid", False, True),
        (ended(0, 203, PEER, ago=9), EVICTED, "Disrupted", True, False),
        # Evicted for what it did itself, whatever it managed to say when it was told to stop.
        (ended(0, 203, PEER, ago=9), FULL, "DiskFull", False, True),
        (ended(0, 203, PEER, ago=9), replace(FULL, last_words=STOPPED), "DiskFull", False, True),
        (ended(0, 203, PEER, ago=9), replace(FULL, last_words=PEER, deleting=True), "DiskFull", False, True),
        (ended(0, 201, HUB, ago=9), FULL, "DiskFull", False, True),
        (ended(0, 143, STOPPED, deleting=True), FULL, "DiskFull", False, True),
        (ended(0, 11, BAD_DATA), FULL, "DataInvalid", False, True),
        (ended(0, 203, PEER), replace(FULL, last_words=BAD_DATA), "DataInvalid", False, True),
        # An init container is not the trainer, and its memory is not the trainer's.
        (
            ended(0, None, init_container="mesh", ended_reason="OOMKilled", phase="Failed"),
            ended(1, 203, PEER),
            "TrainerNotStarted",
            True,
            True,
        ),
        (ended(0, 11, BAD_DATA), EVICTED, "DataInvalid", False, True),
        (ended(0, 203, PEER), ended(1, 143, STOPPED), "Disrupted", True, False),
        (ended(0, 203, PEER), ended(1, 143, STOPPED, deleting=True), "Disrupted", True, False),
        (running(0), pod(1, deleting=True, phase="Running"), "Disrupted", True, False),
        # Bare exit codes.
        (ended(0, 203, PEER), ended(1, 139), "TrainerCrashed", True, True),
        (ended(0, 203, PEER), ended(1, 137), "TrainerCrashed", True, True),
        (ended(0, 203, PEER), ended(1, 1), "TrainerCrashed", False, True),
        (
            ended(0, 128, ended_reason="StartError", ended_message=NO_PROGRAM),
            ended(1, 203, PEER),
            "TrainerNotStarted",
            False,
            True,
        ),
        (
            ended(0, 128, ended_reason="StartError", ended_message="nvidia-container-cli: initialization error"),
            ended(1, 203, PEER),
            "TrainerNotStarted",
            True,
            True,
        ),
        (ended(0, 128, ended_reason="ContainerCannotRun"), ended(1, 203, PEER), "TrainerNotStarted", True, True),
        (ended(0, 128, ended_reason="RunContainerError"), ended(1, 139), "TrainerNotStarted", True, True),
        # Nobody failed, and nobody has a result.
        (ended(0, 0), ended(1, 0), "ResultMissing", True, True),
        (ended(0, 0, success().model_copy(update={"adapter": None})), ended(1, 0), "ResultMissing", True, True),
    ],
)
def test_the_cause_outweighs_its_echoes(
    first: PodView, second: PodView, reason: str, retryable: bool, counted: bool
) -> None:
    for pods in ([first, second], [second, first]):
        made = verdict(pods)
        assert (made.reason, made.retryable, made.counted) == (reason, retryable, counted)
        assert made.message.endswith((".", "`."))


GUARANTEED = {"memory_limit": "64Gi", "memory_request": "64Gi"}
BURSTABLE = {"memory_limit": "64Gi", "memory_request": "8Gi"}
UNLIMITED = {"memory_limit": None}


@pytest.mark.parametrize(
    ("memory", "doubtful", "words"),
    [
        (GUARANTEED, False, "used more main memory than its limit and was killed: raise workers.resources.limits"),
        (BURSTABLE, True, "at its limit of 64Gi or because its node node-7 had no more: raise workers.resources"),
        (UNLIMITED, True, "because its node node-7 had no more main memory: set workers.resources.requests.memory"),
    ],
)
def test_memory_that_was_not_set_aside_may_be_what_the_node_ran_out_of(
    memory: dict[str, Any], doubtful: bool, words: str
) -> None:
    """The kernel's word is the same when a node has no memory left for a container below its limit."""
    made = verdict([ended(0, 137, ended_reason="OOMKilled", node="node-7", **memory)])
    assert (made.reason, made.retryable, made.doubtful, made.counted) == ("OutOfMemory", doubtful, doubtful, True)
    assert words in made.message
    assert made.node == "node-7"


@pytest.mark.parametrize(
    ("pods", "words"),
    [
        (
            [FULL],
            (
                "Worker 1 wrote more than 100Gi to its cache and was evicted for it: raise workers.cache.sizeLimit, "
                "or name a claim with workers.cache.persistentVolumeClaim, and create the FineTuneJob anew."
            ),
        ),
        (
            [ended(0, 128, ended_reason="StartError", ended_message=NO_PROGRAM)],
            f"Worker 0 could not start the trainer ({NO_PROGRAM}): check that workers.image is a trainer",
        ),
        (
            [ended(0, 128, ended_reason="StartError", ended_message="nvml error", node="node-7")],
            "which the node node-7 may be the cause of (StartError: nvml error): if it comes back, have the node's GPU",
        ),
        ([ended(0, 128, ended_reason="StartError")], "which its node may be the cause of (StartError): "),
        (
            [ended(0, None, init_container="mesh", ended_reason="Error", ended_message="exit code 1", phase="Failed")],
            "the init container mesh failed (Error: exit code 1). It is not this operator's",
        ),
        ([ended(0, None, init_container="mesh", phase="Failed")], "the init container mesh failed (nobody says why)"),
        ([ended(0, 137)], "Worker 0 ended with exit code 137 (killed, maybe for want of memory) and could not say why"),
        ([ended(0, 139)], "Worker 0 ended with exit code 139 and could not say why"),
        ([ended(0, None, ended_reason="Unknown")], "Worker 0 ended (Unknown) and could not say why"),
        ([ended(0, None, ended_reason="Unknown", ended_message="gone")], "Worker 0 ended (gone) and could not say"),
        ([ended(0, 143, STOPPED)], "Worker 0 was taken away by the cluster (it was told to stop); this does not"),
        ([ended(0, 137, deleting=True)], "Worker 0 was taken away by the cluster (its pod was deleted); this"),
        ([ended(0, 137, disruption="preempting\n  it")], "was taken away by the cluster (preempting it); this"),
        ([ended(0, 11, failure(Reason.DATA_INVALID, ""))], "Worker 0 failed."),
    ],
)
def test_an_end_has_its_sentence(pods: Sequence[PodView], words: str) -> None:
    assert words in verdict(pods).message


@pytest.mark.parametrize(("code", "kept"), [(-9, None), (1, 1), (255, 255), (256, None), (1000, None)])
def test_an_exit_code_that_is_none_is_left_out(code: int, kept: int | None) -> None:
    assert verdict([ended(0, code)]).exit_code == kept


def test_the_newest_checkpoint_of_all_workers_is_kept() -> None:
    words = [failure(Reason.TERMINATED, checkpoint=checkpoint(step)) for step in (4, 9, 2)]
    assert verdict([ended(index, 143, said) for index, said in enumerate(words)]).checkpoint == checkpoint(9)


def test_of_workers_without_end_three_are_named() -> None:
    """Whoever may edit a PyTorchJob may ask for two thousand million replicas."""
    found = pytorch_job(nodes=2**31 - 1, end="Failed", ended_at=later(-60))
    assert verdict([], found).message.startswith("Nothing is left of worker 0, 1, 2 and more that")
    few = pytorch_job(nodes=3, end="Failed", ended_at=later(-60))
    assert verdict([running(1)], few).message.startswith("Nothing is left of worker 0, 2 that")


def test_success_is_rank_0s_word_with_an_adapter() -> None:
    made = verdict([ended(0, 0, success(checkpoint=checkpoint(7))), ended(1, 0)])
    assert made.succeeded
    assert made.words is not None
    assert made.checkpoint == checkpoint(7)


def test_what_other_workers_do_after_rank_0_has_published_undoes_nothing() -> None:
    assert verdict([ended(0, 0, success()), ended(1, 139)]).succeeded
    assert verdict([ended(0, 0, success(), ago=31), running(1)]).succeeded


def test_another_rank_cannot_claim_success() -> None:
    assert verdict([ended(0, 0), ended(1, 0, success())]).reason == "ResultMissing"


def test_an_adapter_that_status_cannot_hold_is_none() -> None:
    nonsense = success().model_copy(update={"adapter": success().adapter.model_copy(update={"uri": ""})})  # type: ignore[union-attr]
    assert verdict([ended(0, 0, nonsense)]).reason == "ResultMissing"


def undecided(pods: Sequence[PodView], found: PyTorchJobView, noticed: datetime | None = None) -> datetime | None:
    """When to judge again; None while nothing has ended."""
    made = judge(found, pods, now=NOW, group_end_seconds=30, noticed=noticed)
    assert not isinstance(made, Verdict), made
    return made


def test_nothing_is_judged_while_the_group_runs() -> None:
    assert undecided([running(0), running(1)], pytorch_job(nodes=2)) is None
    assert undecided([running(0), ended(1, 0)], pytorch_job(nodes=2)) is None
    assert undecided([], pytorch_job(nodes=2)) is None


FAILS = ended(1, 203, PEER)


@pytest.mark.parametrize("clock", [0, -3600, 3600])
@pytest.mark.parametrize(
    ("found", "pods"),
    [
        (pytorch_job(nodes=2), [running(0), FAILS]),
        (pytorch_job(nodes=2, end="Failed"), [running(0), FAILS]),
        (pytorch_job(nodes=2, end="Failed"), [running(0), running(1)]),
        # Nothing takes the place of a pod that goes now.
        (pytorch_job(nodes=2, end="Failed"), [running(0), running(1, deleting=True)]),
        (pytorch_job(nodes=2, end="Failed"), [running(0), replace(FAILS, deleting=True)]),
        (pytorch_job(nodes=2), [running(1), ended(0, 0, success())]),
        # Its end has no time at all.
        (pytorch_job(nodes=2), [running(0), replace(FAILS, ended_at=None)]),
    ],
)
def test_the_others_get_time_to_end_whatever_the_nodes_clocks_say(
    found: PyTorchJobView, pods: list[PodView], clock: float
) -> None:
    pods = [replace(pod, ended_at=later(clock) if pod.ended_at else None) for pod in pods]
    found = replace(found, ended_at=later(clock), started_at=later(clock - 60), created_at=later(clock - 60))
    assert undecided(pods, found) == later(30)
    assert undecided(pods, found, noticed=later(-20)) == later(10)
    assert undecided(pods, found, noticed=later(-29)) == later(1)
    verdict(pods, found)
    # Our own clock was set back meanwhile.
    assert undecided(pods, found, noticed=later(3600)) == later(30)


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        ([ended(0, 203, PEER), FAILS], "PeerFailed"),
        ([ended(0, 0), ended(1, 0)], "ResultMissing"),
        # The training operator makes another pod in its place, and then nobody could tell.
        ([running(0), running(1, deleting=True)], "Disrupted"),
        ([running(0, deleting=True)], "Disrupted"),
        ([running(0, deleting=True), FAILS], "Disrupted"),
        ([running(0), replace(FAILS, last_words=STOPPED, deleting=True)], "Disrupted"),
        ([running(0), replace(FAILS, last_words=BAD_DATA, deleting=True)], "DataInvalid"),
        # One that has ended and is only being removed.
        ([ended(0, 203, PEER, deleting=True), ended(1, 11, BAD_DATA)], "DataInvalid"),
    ],
)
def test_where_nothing_more_can_be_learned_nothing_is_waited_for(pods: list[PodView], reason: str) -> None:
    made = judge(pytorch_job(nodes=len(pods)), pods, now=NOW, group_end_seconds=30)
    assert isinstance(made, Verdict)
    assert made.reason == reason


@pytest.mark.parametrize("end", ["Failed", "Succeeded"])
def test_what_has_ended_is_judged_although_it_is_suspended(end: str) -> None:
    """Or it would wait for a queue that will never let it go."""
    made = verdict([], pytorch_job(suspended=True, end=end))
    assert made.reason == ("Disrupted" if end == "Failed" else "ResultMissing")
    assert verdict([ended(0, 11, BAD_DATA)], pytorch_job(suspended=True, end=end)).reason == "DataInvalid"
    assert verdict([ended(0, 0, success())], pytorch_job(suspended=True, end=end)).succeeded


@pytest.mark.parametrize("clock", [0, -3600, 3600])
def test_of_equal_causes_the_earliest_is_told(clock: float) -> None:
    first, second = ended(1, 139, ago=clock + 9), ended(0, 139, ago=clock)
    assert verdict([second, first]).message.startswith("Worker 1 ")
    unknown = replace(first, ended_at=None)
    assert verdict([second, unknown]).message.startswith("Worker 0 ")
    assert verdict([ended(0, 139), ended(1, 139)]).message.startswith("Worker 0 ")
    assert verdict([ended(1, 139), ended(0, 139)]).message.startswith("Worker 0 ")


def test_what_somebody_else_suspended_is_not_judged() -> None:
    assert undecided([ended(0, 143, STOPPED)], pytorch_job(suspended=True)) is None


def test_pods_from_before_a_suspension_are_not_this_groups() -> None:
    old = running(0, deleting=True, deleted_at=later(-60))
    for since in (-60, 0):
        assert undecided([old], pytorch_job(resumed_at=later(since))) is None
    # Deleted since, as by a drain: also where it was made in the very second of the resumption, as most are.
    resumed = pytorch_job(resumed_at=later(-61))
    assert verdict([old], resumed).reason == "Disrupted"
    assert verdict([replace(old, created_at=later(-61))], resumed).reason == "Disrupted"
    assert verdict([replace(old, deleted_at=None)], pytorch_job(resumed_at=later(0))).reason == "Disrupted"
    drained = ended(0, 0, success(), deleting=True, deleted_at=later(-9), created_at=later(-61))
    assert verdict([drained], resumed).succeeded


@pytest.mark.parametrize(
    "found", [pytorch_job(suspended=True), pytorch_job(nodes=2), pytorch_job(nodes=2, resumed_at=later(-5))]
)
def test_an_adapter_that_was_finished_while_a_queue_stopped_the_attempt_is_its_success(found: PyTorchJobView) -> None:
    lead = ended(0, 0, success(), deleting=True, deleted_at=later(-10))
    made = judge(found, [lead, running(1)] if found.resumed_at else [lead], now=NOW, group_end_seconds=30)
    assert isinstance(made, Verdict)
    assert made.succeeded
    assert undecided([ended(0, 143, STOPPED, deleting=True)], pytorch_job(suspended=True)) is None


def test_an_end_without_pods_is_nobodys_fault() -> None:
    made = verdict([], pytorch_job(end="Failed", ended_at=later(-60)))
    assert (made.reason, made.counted, made.retryable) == ("Disrupted", False, True)
    assert verdict([], pytorch_job(end="Succeeded", ended_at=later(-60))).reason == "ResultMissing"


def test_an_end_while_all_pods_run_is_the_training_operators_word() -> None:
    made = verdict([running()], pytorch_job(end="Failed", end_message="It was asked to.", ended_at=later(-60)))
    assert (made.reason, made.counted, made.retryable) == ("WorkersFailed", True, True)
    assert "It was asked to." in made.message


@pytest.mark.parametrize("pods", [[running()], [pod()], [ended(0, 0)]])
def test_an_end_after_a_suspension_while_no_pod_failed_is_nobodys_fault(pods: list[PodView]) -> None:
    """The training operator takes a pod that the suspension deletes for one that has failed."""
    found = pytorch_job(end="Failed", end_message="1 replica failed.", resumed_at=later(-60))
    old = ended(0, 143, STOPPED, deleting=True, deleted_at=later(-60), created_at=later(-7200))
    pods = [replace(pod, created_at=later(-50)) for pod in pods]
    for there in (pods, [old, *pods]):
        made = verdict(there, found)
        assert (made.reason, made.counted, made.retryable) == ("Disrupted", False, True)
        assert "after a suspension although none of its pods had failed (1 replica failed); this" in made.message
    bad = ended(0, 11, BAD_DATA, created_at=later(-50))
    assert verdict([bad], found).reason == "DataInvalid"


@pytest.mark.parametrize(("ended_at", "reason"), [(-7200, "Disrupted"), (-6600, "Disrupted"), (-6599, "WorkersFailed")])
def test_an_end_long_after_a_suspension_has_nothing_to_do_with_it(ended_at: float, reason: str) -> None:
    """Under Kueue every PyTorchJob was suspended at first."""
    found = pytorch_job(end="Failed", resumed_at=later(-7200), ended_at=later(ended_at))
    made = verdict([running()], found)
    assert (made.reason, made.counted) == (reason, reason == "WorkersFailed")


@pytest.mark.parametrize(
    ("found", "reason", "counted"),
    [
        (ended(0, 203, PEER), "PeerFailed", False),
        (ended(0, 204, failure(Reason.INTERNAL_ERROR, "ncclSystemError.")), "InternalError", False),
        (ended(0, 134), "TrainerCrashed", False),
        (ended(0, 137), "TrainerCrashed", False),
        # No loss of another worker brings these about.
        (ended(0, 11, BAD_DATA), "DataInvalid", True),
        (ended(0, 201, failure(Reason.HUB_UNAVAILABLE, "Away.")), "HubUnavailable", True),
        (ended(0, 77), "TrainerCrashed", True),
    ],
)
def test_a_missing_worker_makes_the_others_echoes_nobodys_fault(found: PodView, reason: str, counted: bool) -> None:
    made = verdict([found], pytorch_job(nodes=2))
    assert (made.reason, made.counted) == (reason, counted)
    assert ("A worker is gone that may have been the cause" in made.message) == (not counted)
    assert verdict([found], pytorch_job()).counted


KEPT = failure(Reason.HUB_UNAVAILABLE, "Away.", checkpoint=checkpoint(3))
SAVED = {"checkpoint": checkpoint(3)}
FROM_WORLD: dict[str, Any] = {"succeeded": False, "retryable": True, "counted": True}
OF_USERS: dict[str, Any] = {"succeeded": False, "retryable": False, "counted": True}
OF_NOBODY: dict[str, Any] = {"succeeded": False, "retryable": True, "counted": False}


@pytest.mark.parametrize(
    ("pods", "found", "made"),
    [
        ([ended(0, 201, KEPT, node="n")], None, {**FROM_WORLD, **SAVED, "reason": "HubUnavailable", "node": "n"}),
        ([ended(0, 11, BAD_DATA, node="n")], None, {**OF_USERS, "reason": "DataInvalid", "node": "n"}),
        ([ended(0, 139, node="n")], None, {**FROM_WORLD, "reason": "TrainerCrashed", "node": "n"}),
        ([ended(0, 77)], None, {**OF_USERS, "reason": "TrainerCrashed"}),
        ([replace(EVICTED, index=0, last_words=KEPT)], None, {**OF_NOBODY, **SAVED, "reason": "Disrupted"}),
        ([replace(FULL, last_words=KEPT)], pytorch_job(), {**OF_USERS, **SAVED, "reason": "DiskFull"}),
        ([ended(0, 137, ended_reason="OOMKilled")], None, {**OF_USERS, "reason": "OutOfMemory"}),
        (
            [ended(0, 137, KEPT, ended_reason="OOMKilled", memory_limit=None, node="n")],
            None,
            {**FROM_WORLD, **SAVED, "reason": "OutOfMemory", "node": "n", "doubtful": True},
        ),
        (
            [ended(0, 128, ended_reason="StartError", ended_message=NO_PROGRAM, node="n")],
            None,
            {**OF_USERS, "reason": "TrainerNotStarted", "node": "n"},
        ),
        ([ended(0, None, words=KEPT)], None, {**FROM_WORLD, **SAVED, "reason": "HubUnavailable", "exit_code": 201}),
        ([ended(0, 203, PEER)], None, {**FROM_WORLD, "reason": "PeerFailed"}),
        ([ended(0, 203, PEER)], pytorch_job(nodes=2), {**OF_NOBODY, "reason": "PeerFailed"}),
        ([ended(0, 201, HUB)], pytorch_job(nodes=2), {**FROM_WORLD, "reason": "HubUnavailable"}),
        (
            [ended(0, 0, KEPT.model_copy(update={"succeeded": True, "reason": None})), ended(1, 0)],
            None,
            {**FROM_WORLD, **SAVED, "reason": "ResultMissing", "exit_code": 0},
        ),
        (
            [running(0, last_words=KEPT)],
            pytorch_job(end="Failed", end_message="Asked to..."),
            {**FROM_WORLD, **SAVED, "reason": "WorkersFailed", "exit_code": None},
        ),
        (
            [running(0, last_words=KEPT)],
            pytorch_job(nodes=2, end="Failed"),
            {**OF_NOBODY, **SAVED, "reason": "Disrupted", "exit_code": None},
        ),
        (
            [ended(0, 0, success(checkpoint=checkpoint(3)))],
            None,
            {"succeeded": True, "reason": "Succeeded", "words": success(checkpoint=checkpoint(3)), **SAVED},
        ),
    ],
)
def test_a_verdict_is_whole(pods: list[PodView], found: PyTorchJobView | None, made: dict[str, Any]) -> None:
    judged = verdict(pods, found)
    wanted = {"exit_code": pods[0].exit_code, "message": judged.message, **made}
    assert judged == Verdict(**wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Asked to...", "Asked to."),
        ("XX.", "XX."),
        ("", "it gave no reason."),
        ("x" * 400, "x" * 400 + "."),
        ("x" * 401, "x" * 399 + "…."),
    ],
)
def test_a_foreign_sentence_ends_once_and_soon(text: str, said: str) -> None:
    made = verdict([running(0)], pytorch_job(end="Failed", end_message=text))
    assert made.message == f"The training operator ended the attempt: {said}"
