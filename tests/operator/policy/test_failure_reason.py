"""Which end of which pod was the cause, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import pytest

from finetune_api.outcome import EXIT_CODES, Reason, is_retryable
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
    """The judgement, which must have been made."""
    made = judge(found or pytorch_job(nodes=max(1, len(pods))), pods, now=NOW, group_end_seconds=30)
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
EVICTED = ended(1, None, phase="Failed", disruption="Evicted: the node was low on memory")


@pytest.mark.parametrize(
    ("first", "second", "reason", "retryable", "counted"),
    [
        # The cause beside its echo, whoever was first.
        (ended(0, 203, PEER, ago=9), ended(1, 11, BAD_DATA), "DataInvalid", False, True),
        (ended(0, 203, PEER, ago=9), ended(1, 201, HUB), "HubUnavailable", True, True),
        (ended(0, 203, PEER), ended(1, 203, PEER), "PeerFailed", True, True),
        (ended(0, 204, CRASH, ago=9), ended(1, 201, HUB), "HubUnavailable", True, True),
        # What the cluster says of a pod.
        (ended(0, 203, PEER, ago=9), ended(1, 137, ended_reason="OOMKilled"), "OutOfMemory", False, True),
        (ended(0, 204, CRASH), ended(1, 137, CRASH, ended_reason="OOMKilled"), "OutOfMemory", False, True),
        (ended(0, 11, BAD_DATA), ended(1, 137, ended_reason="OOMKilled"), "DataInvalid", False, True),
        (ended(0, 203, PEER, ago=9), EVICTED, "Disrupted", True, False),
        (ended(0, 11, BAD_DATA), EVICTED, "DataInvalid", False, True),
        (ended(0, 203, PEER), ended(1, 143, STOPPED), "Disrupted", True, False),
        (ended(0, 203, PEER), ended(1, 143, STOPPED, deleting=True), "Disrupted", True, False),
        (running(0), pod(1, deleting=True, phase="Running"), "Disrupted", True, False),
        # Bare exit codes.
        (ended(0, 203, PEER), ended(1, 139), "TrainerCrashed", True, True),
        (ended(0, 203, PEER), ended(1, 137), "TrainerCrashed", True, True),
        (ended(0, 203, PEER), ended(1, 1), "TrainerCrashed", False, True),
        (ended(0, 128, ended_reason="StartError"), ended(1, 203, PEER), "TrainerNotStarted", False, True),
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


def test_the_others_get_time_to_end() -> None:
    pods = [running(0), ended(1, 203, PEER, ago=10)]
    assert undecided(pods, pytorch_job(nodes=2)) == later(20)
    assert verdict([running(0), ended(1, 203, PEER, ago=30)]).reason == "PeerFailed"


def test_a_nodes_clock_that_is_ahead_puts_the_judgement_off_once() -> None:
    pods = [running(0), ended(1, 203, PEER, ago=-3600)]
    assert undecided(pods, pytorch_job(nodes=2)) == later(30)
    assert undecided(pods, pytorch_job(nodes=2), noticed=later(-20)) == later(10)
    made = judge(pytorch_job(nodes=2), pods, now=NOW, group_end_seconds=30, noticed=later(-30))
    assert isinstance(made, Verdict)


def test_what_somebody_else_suspended_is_not_judged() -> None:
    assert undecided([ended(0, 143, STOPPED)], pytorch_job(suspended=True)) is None


def test_pods_from_before_a_suspension_are_not_this_groups() -> None:
    old = running(0, deleting=True)
    assert undecided([old], pytorch_job(resumed_at=later(-60))) is None
    assert verdict([old], pytorch_job(resumed_at=later(-7200))).reason == "Disrupted"


def test_an_end_without_pods_is_nobodys_fault() -> None:
    made = verdict([], pytorch_job(end="Failed", ended_at=later(-60)))
    assert (made.reason, made.counted, made.retryable) == ("Disrupted", False, True)
    assert verdict([], pytorch_job(end="Succeeded", ended_at=later(-60))).reason == "ResultMissing"


def test_an_end_while_all_pods_run_is_the_training_operators_word() -> None:
    made = verdict([running()], pytorch_job(end="Failed", end_message="It was asked to.", ended_at=later(-60)))
    assert (made.reason, made.counted, made.retryable) == ("WorkersFailed", True, True)
    assert "It was asked to." in made.message


def test_a_missing_worker_makes_the_others_echoes_nobodys_fault() -> None:
    made = verdict([ended(0, 203, PEER)], pytorch_job(nodes=2))
    assert (made.reason, made.counted) == ("PeerFailed", False)
