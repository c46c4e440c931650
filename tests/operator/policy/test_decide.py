"""The next step for a job, from what status says has been done and what is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.outcome import Reason
from finetune_api.problem import Problem
from finetune_api.status import Attempt, ConditionType, FineTuneJobStatus, Phase, Progress
from finetune_operator.policy.conditions import condition, is_finished
from finetune_operator.policy.decide import decide, note_blocked, note_created
from finetune_operator.policy.plan import ObservedState, Plan
from finetune_operator.policy.times import moment, rfc3339
from tests.operator.policy.views import (
    ADAPTER,
    NOW,
    PATIENCE,
    checkpoint,
    desired,
    ended,
    failure,
    later,
    observed,
    pod,
    pytorch_job,
    running,
    success,
)


def reason(status: FineTuneJobStatus) -> str | None:
    """Of the condition Succeeded."""
    found = condition(status, ConditionType.SUCCEEDED)
    return found.reason if found else None


def stalled(status: FineTuneJobStatus) -> bool:
    """Whether it waits for somebody."""
    return condition(status, ConditionType.STALLED) is not None


def during(attempt: int = 1, **more: Any) -> FineTuneJobStatus:
    """Status of a job whose attempt began an hour ago."""
    since = rfc3339(later(-3600))
    made: dict[str, Any] = {"attempt_start_time": since, "active_since": since, "start_time": since, **more}
    return FineTuneJobStatus(attempt=attempt, **made)


def between(why: str = "HubUnavailable", ago: float = 3600, **more: Any) -> FineTuneJobStatus:
    """Status of a job whose first attempt ended so many seconds ago."""
    end = Attempt(number=1, reason=why, message="It was away.", completion_time=rfc3339(later(-ago)))
    return during(attempts=[end], **{"active_since": None, "active_seconds": 60, **more})


def test_a_new_job_gets_its_first_attempt() -> None:
    plan = decide(observed(generation=7), NOW, PATIENCE)
    assert (plan.create, plan.release, plan.delete_job) == (1, False, False)
    note_created(plan, pytorch_job(created_at=NOW), observed(), NOW, PATIENCE)
    status = plan.status
    assert (status.attempt, status.phase, reason(status)) == (1, Phase.STARTING, "Starting")
    assert moment(status.start_time) == moment(status.active_since) == NOW
    assert [status.observed_generation, *(item.observed_generation for item in status.conditions)] == [7] * 3


def test_what_hinders_the_creation_is_said_and_comes_to_no_attempt() -> None:
    plan = decide(observed(), NOW, PATIENCE)
    note_blocked(plan, "TrainingOperatorMissing", "It is not there.")
    assert (plan.status.phase, reason(plan.status), plan.status.attempt) == (
        Phase.PENDING,
        "TrainingOperatorMissing",
        None,
    )


def test_success_is_copied_into_status() -> None:
    status = during(progress=Progress(percent=70, loss=1.0, eta_seconds=9))
    plan = decide(observed(status, pytorch_job(), [ended(0, 0, success(checkpoint=checkpoint(5)))]), NOW, PATIENCE)
    made = plan.status
    assert made.adapter is not None
    assert made.adapter.uri == ADAPTER.uri
    assert made.progress == Progress(percent=100, loss=1.0, eta_seconds=0)
    assert (made.phase, reason(made), made.completion_time) == (Phase.SUCCEEDED, "Succeeded", rfc3339(NOW))
    assert not stalled(made)
    assert (made.active_seconds, made.active_since, made.failures) == (3600, None, None)


def test_a_users_mistake_is_not_tried_again() -> None:
    plan = decide(observed(during(), pytorch_job(), [ended(0, 11, failure(Reason.DATA_INVALID))]), NOW, PATIENCE)
    assert plan.create is None
    assert (plan.status.phase, reason(plan.status)) == (Phase.FAILED, "DataInvalid")
    assert stalled(plan.status)


def test_the_worlds_fault_is_tried_again_after_a_wait() -> None:
    plan = decide(observed(during(), pytorch_job(), [ended(0, 201, failure(Reason.HUB_UNAVAILABLE))]), NOW, PATIENCE)
    assert (plan.create, plan.release) == (None, False)
    assert (plan.status.phase, plan.status.failures) == (Phase.RETRYING, 1)
    # Recorded first; what is left of the attempt goes with the next look.
    gone = decide(observed(plan.status, pytorch_job(), [ended(0, 201)]), NOW, PATIENCE)
    assert (gone.release, gone.create, gone.again_at) == (True, None, later(5))
    waiting = decide(observed(gone.status), later(9), PATIENCE)
    assert (waiting.create, waiting.again_at) == (None, later(10))
    assert decide(observed(waiting.status), later(10), PATIENCE).create == 2


@pytest.mark.parametrize(("failures", "limit", "over"), [(None, 0, True), (2, 3, False), (3, 3, True)])
def test_backoff_limit_counts_failures(failures: int | None, limit: int, over: bool) -> None:
    status = during(attempt=(failures or 0) + 1, failures=failures)
    found = pytorch_job(attempt=status.attempt or 1)
    plan = decide(
        observed(status, found, [ended(0, 201, failure(Reason.HUB_UNAVAILABLE))], backoff_limit=limit), NOW, PATIENCE
    )
    assert is_finished(plan.status) is over
    if over:
        assert reason(plan.status) == "RetriesExhausted"
        last = condition(plan.status, ConditionType.SUCCEEDED)
        assert last is not None
        assert "HubUnavailable" in last.message


OOM = ended(0, 137, ended_reason="OOMKilled", memory_limit=None, node="node-7")


@pytest.mark.parametrize(
    ("before", "over"),
    [([], False), (["TrainerCrashed"], False), (["OutOfMemory"], True), (["OutOfMemory", "Disrupted"], False)],
)
def test_what_may_be_the_nodes_fault_is_tried_once_more(before: list[str], over: bool) -> None:
    ends = [Attempt(number=number, reason=why) for number, why in enumerate(before, 1)]
    status = during(attempt=len(ends) + 1, attempts=ends, failures=len(ends))
    plan = decide(observed(status, pytorch_job(attempt=len(ends) + 1), [OOM], backoff_limit=9), NOW, PATIENCE)
    assert is_finished(plan.status) is over
    end = plan.status.attempts[-1]
    assert (end.reason, end.counted, end.node) == ("OutOfMemory", True, "node-7")
    assert reason(plan.status) == "OutOfMemory"


def test_the_end_of_an_attempt_is_looked_out_for_once_it_has_begun() -> None:
    for second, ending, again_at in [(running(1), False, None), (ended(1, 201), True, later(30))]:
        plan = decide(observed(during(), pytorch_job(nodes=2), [running(0), second]), NOW, PATIENCE)
        assert (plan.ending, plan.again_at) == (ending, again_at)


def test_disruptions_do_not_count() -> None:
    status = during(failures=3, attempt=4)
    evicted = ended(0, None, phase="Failed", disruption="Evicted")
    plan = decide(observed(status, pytorch_job(attempt=4), [evicted]), NOW, PATIENCE)
    assert (plan.status.failures, plan.status.phase) == (3, Phase.RETRYING)


@pytest.mark.parametrize(
    ("limit", "active_seconds", "over"), [(3600, None, True), (3601, None, False), (3601, 1, True), (None, 9999, False)]
)
def test_the_deadline_counts_all_active_time(limit: int | None, active_seconds: int | None, over: bool) -> None:
    status = during(active_seconds=active_seconds)
    plan = decide(observed(status, pytorch_job(), [running()], active_deadline_seconds=limit), NOW, PATIENCE)
    assert (reason(plan.status) == "DeadlineExceeded") is over
    if limit is not None and not over:
        assert plan.again_at == later(limit - 3600 - (active_seconds or 0))


def test_after_the_deadline_what_still_runs_goes() -> None:
    plan = decide(observed(during(), pytorch_job(), [running()], active_deadline_seconds=5), NOW, PATIENCE)
    assert not plan.release
    assert decide(observed(plan.status, pytorch_job(), [running()]), NOW, PATIENCE).release


def test_success_beats_deadline_and_suspension() -> None:
    pods = [ended(0, 0, success())]
    plan = decide(observed(during(), pytorch_job(), pods, suspend=True, active_deadline_seconds=1), NOW, PATIENCE)
    assert reason(plan.status) == "Succeeded"


def test_suspension_ends_the_attempt_frees_the_machines_and_rests() -> None:
    plan = decide(observed(during(), pytorch_job(), [running()], suspend=True), NOW, PATIENCE)
    assert plan.status.attempts[-1].reason == "Suspended"
    assert plan.status.failures is None
    going = decide(observed(plan.status, pytorch_job(), [running()], suspend=True), NOW, PATIENCE)
    assert (going.release, going.status.phase) == (True, Phase.SUSPENDED)
    saved = ended(0, 143, failure(Reason.TERMINATED, checkpoint=checkpoint(9)), deleting=True)
    told = decide(observed(going.status, None, [saved], suspend=True), NOW, PATIENCE)
    assert told.status.checkpoint is not None
    assert told.status.checkpoint.step == 9
    rest = decide(observed(told.status, suspend=True), NOW, PATIENCE)
    assert (rest.create, rest.again_at) == (None, None)
    assert condition(rest.status, ConditionType.RECONCILING) is None
    assert decide(observed(rest.status), NOW, PATIENCE).create == 2


def test_a_job_that_is_applied_suspended_makes_nothing() -> None:
    plan = decide(observed(suspend=True), NOW, PATIENCE)
    assert (plan.create, plan.status.phase, reason(plan.status)) == (None, Phase.SUSPENDED, "Suspended")


def test_an_attempt_that_was_created_and_not_written_down_is_found() -> None:
    found = ObservedState(desired=desired(suspend=True), status=FineTuneJobStatus(), unrecorded=pytorch_job())
    plan = decide(found, NOW, PATIENCE)
    assert (plan.status.attempt, plan.create, plan.again_at) == (1, None, NOW)
    assert decide(observed(plan.status, pytorch_job(), [], suspend=True), NOW, PATIENCE).status.attempts[-1].number == 1


def test_no_attempt_begins_while_pods_of_the_last_one_run() -> None:
    plan = decide(observed(between(), None, [running(0, deleting=True)]), NOW, PATIENCE)
    assert (plan.create, reason(plan.status)) == (None, "PodsStillEnding")


def test_a_deleted_pytorchjob_is_no_failure() -> None:
    plan = decide(observed(during()), NOW, PATIENCE)
    assert (plan.status.attempts[-1].reason, plan.status.attempts[-1].counted) == ("WorkersDeleted", False)
    late = decide(observed(during(), None, [ended(0, 0, success())]), NOW, PATIENCE)
    assert reason(late.status) == "Succeeded"


def test_nothing_is_believed_of_a_pod_that_nobody_owns() -> None:
    forged = [replace(ended(0, 0, success(checkpoint=checkpoint(9))), owner_uid="")]
    plan = decide(observed(during(), None, forged), NOW, PATIENCE)
    assert plan.status.attempts[-1].reason == "WorkersDeleted"
    assert (plan.status.adapter, plan.status.checkpoint) == (None, None)
    assert decide(observed(between(), None, forged), NOW, PATIENCE).status.checkpoint is None


@pytest.mark.parametrize(
    ("owner", "ago", "waits"),
    [
        ("workers-uid", 3601, True),
        ("workers-uid", 0, True),
        # Its owner was deleted without it: it trains on beside the next attempt.
        ("", 3601, True),
        ("", 3600, True),
        ("", None, True),
        ("", 3599, False),
        ("", 0, False),
    ],
)
def test_a_pod_without_an_owner_is_waited_for_if_it_was_there_before_its_attempt_ended(
    owner: str, ago: float | None, waits: bool
) -> None:
    made = later(-ago) if ago is not None else None
    plan = decide(observed(between(), None, [replace(running(), owner_uid=owner, created_at=made)]), NOW, PATIENCE)
    assert (plan.create is None) is waits


@pytest.mark.parametrize(
    ("ago", "again"), [(0, 5), (50, 5), (60, 6), (600, 60), (3000, 300), (86400, 300), (-600, 5), (-601, 300)]
)
@pytest.mark.parametrize("suspend", [False, True])
def test_what_somebodys_finalizer_holds_is_looked_at_more_and_more_seldom(
    ago: float, again: float, suspend: bool
) -> None:
    for found, pods in ((pytorch_job(deleting=True), []), (None, [running(0, deleting=True)])):
        plan = decide(observed(between(ago=ago), found, pods, suspend=suspend), NOW, PATIENCE)
        assert plan.again_at == later(again)


BAD = Problem("spec.output", "output is required.")


def test_an_invalid_spec_waits_for_somebody_and_does_not_end() -> None:
    plan = decide(observed(problems=[BAD]), NOW, PATIENCE)
    assert (plan.create, plan.status.phase, reason(plan.status)) == (None, Phase.PENDING, "InvalidSpec")
    assert stalled(plan.status)
    assert not is_finished(plan.status)
    assert decide(observed(plan.status), NOW, PATIENCE).create == 1


def test_what_runs_goes_on_under_a_spec_that_has_become_invalid() -> None:
    plan = decide(observed(during(), pytorch_job(), [running()], problems=[BAD]), NOW, PATIENCE)
    assert (plan.release, plan.status.phase, reason(plan.status)) == (False, Phase.RUNNING, "InvalidSpec")
    assert decide(observed(between(), problems=[BAD]), NOW, PATIENCE).create is None


def test_the_queue_is_not_active_time() -> None:
    queued = decide(observed(during(), pytorch_job(suspended=True)), NOW, PATIENCE).status
    assert (queued.phase, queued.active_since, queued.active_seconds) == (Phase.QUEUED, None, 3600)
    again = decide(observed(queued, pytorch_job(resumed_at=later(100)), [pod()]), later(130), PATIENCE).status
    assert (again.active_since, again.active_seconds) == (rfc3339(later(100)), 3600)


def test_what_a_pod_saved_when_its_queue_stopped_it_is_kept() -> None:
    words = failure(Reason.TERMINATED, checkpoint=checkpoint(70))
    stopped = decide(observed(during(), pytorch_job(suspended=True), [ended(0, 143, words)]), NOW, PATIENCE)
    assert stopped.status.checkpoint is not None
    assert (stopped.status.checkpoint.step, stopped.status.attempts) == (70, [])


@pytest.mark.parametrize(
    ("found", "pods", "release"),
    [
        (pytorch_job(end="Succeeded"), [ended(0, 0)], False),
        (pytorch_job(), [ended(0, 0)], False),
        (pytorch_job(), [ended(0, 0), running(1)], True),
        (pytorch_job(), [], True),
        (pytorch_job(end="Failed"), [], False),
        (pytorch_job(deleting=True), [running()], False),
        (None, [], False),
    ],
)
def test_after_the_end_only_what_still_holds_machines_goes(found: Any, pods: Any, release: bool) -> None:
    done = decide(observed(during(), pytorch_job(), [ended(0, 0, success())]), NOW, PATIENCE).status
    plan = decide(observed(done, found, pods), NOW, PATIENCE)
    assert (plan.release, plan.create) == (release, None)
    assert plan.status == done


def test_a_sidecar_that_outlives_the_trainer_goes_after_a_while() -> None:
    done = decide(observed(during(), pytorch_job(), [ended(0, 0, success())]), NOW, PATIENCE).status
    pods = [ended(0, 0, phase="Running")]
    early = decide(observed(done, pytorch_job(), pods), NOW, PATIENCE)
    assert (early.release, early.again_at) == (False, later(30))
    assert decide(observed(done, pytorch_job(), pods), later(30), PATIENCE).release


@pytest.mark.parametrize(
    ("found", "pods", "goes"),
    [
        (pytorch_job(nodes=2), [ended(0, 11)], True),
        (pytorch_job(nodes=2), [ended(0, 11), ended(1, 0)], False),
        (pytorch_job(nodes=2, end="Failed"), [ended(0, 11)], False),
        # One takes the place of a pod that goes.
        (pytorch_job(), [ended(0, 0, deleting=True)], True),
        (pytorch_job(end="Succeeded"), [ended(0, 0, deleting=True)], False),
        # Its queue may let it go on.
        (pytorch_job(suspended=True), [ended(0, 0)], True),
        (pytorch_job(suspended=True, end="Succeeded"), [ended(0, 0)], False),
    ],
)
def test_a_pytorchjob_that_may_yet_make_pods_goes_after_a_while(found: Any, pods: Any, goes: bool) -> None:
    done = decide(observed(during(), pytorch_job(), [ended(0, 0, success())]), NOW, PATIENCE).status
    early = decide(observed(done, found, pods), NOW, PATIENCE)
    assert (early.release, early.again_at) == (False, later(30) if goes else None)
    assert decide(observed(done, found, pods), later(30), PATIENCE).release is goes


def test_the_ttl_deletes_the_job_when_it_is_over() -> None:
    done = decide(observed(during(), pytorch_job(), [ended(0, 0, success())]), NOW, PATIENCE).status
    early = decide(observed(done, ttl_seconds_after_finished=60), later(59), PATIENCE)
    assert (early.delete_job, early.again_at) == (False, later(60))
    assert decide(observed(done, ttl_seconds_after_finished=60), later(60), PATIENCE).delete_job
    assert decide(observed(done, ttl_seconds_after_finished=0), NOW, PATIENCE).delete_job


def test_progress_is_the_current_attempts() -> None:
    report = Progress(percent=5, loss=2.0)
    found = ObservedState(
        desired=desired(),
        status=during(),
        pytorch_job=pytorch_job(),
        pods=[running()],
        progress=report,
        reported=Phase.PREPARING,
    )
    plan = decide(found, NOW, PATIENCE)
    assert (plan.status.progress, plan.status.phase) == (report, Phase.PREPARING)
    fresh: Plan = decide(observed(between(progress=report)), NOW, PATIENCE)
    note_created(fresh, pytorch_job(attempt=2), observed(), NOW, PATIENCE)
    assert fresh.status.progress is None


def test_a_notice_stands_in_the_message() -> None:
    notices = [Problem("spec.deepspeed", "deepspeed has no effect."), Problem("spec.task", "No task.")]
    plan = decide(observed(during(), pytorch_job(), [running()], notices=notices), NOW, PATIENCE)
    found = condition(plan.status, ConditionType.SUCCEEDED)
    assert found is not None
    assert "Note: spec.deepspeed: deepspeed has no effect." in found.message


@pytest.mark.parametrize(("attempt", "left"), [(None, None), (1, None), (2, 2), (7, 7)])
def test_what_somebody_elses_deletion_has_left_goes_before_the_next_attempt(
    attempt: int | None, left: int | None
) -> None:
    """The first ConfigMap stays: it says what is trained. The others nobody else would delete."""
    ends = [Attempt(number=attempt, reason="WorkersDeleted")] if attempt is not None else []
    status = FineTuneJobStatus(attempt=attempt, attempts=ends)
    plan = decide(observed(status), NOW, PATIENCE)
    assert (plan.create, plan.leftover_config_map) == ((attempt or 0) + 1, left)


def test_between_two_attempts_no_config_map_is_looked_for() -> None:
    status = between(ago=5, attempt=2)
    status.attempts[0].number = 2
    for suspend in (False, True):
        plan = decide(observed(status, suspend=suspend), NOW, PATIENCE)
        assert (plan.create, plan.leftover_config_map) == (None, None)


@pytest.mark.parametrize(
    ("current", "label", "note"),
    [
        ("team", "team", None),
        (None, None, None),
        ("team", "other", "stays in the queue team, and the queue other counts from the next attempt on: suspend"),
        ("team", None, "stays in the queue team, and no queue counts from the next attempt on"),
        (None, "other", "stays in no queue, and the queue other counts from the next attempt on"),
    ],
)
@pytest.mark.parametrize("suspended", [True, False])
def test_the_queue_that_is_named_is_the_attempts(
    current: str | None, label: str | None, note: str | None, suspended: bool
) -> None:
    found = pytorch_job(queue=current, suspended=suspended)
    plan = decide(observed(during(), found, [] if suspended else [running()], queue=label), NOW, PATIENCE)
    end = condition(plan.status, ConditionType.SUCCEEDED)
    assert end is not None
    assert (f"waits in the queue {current} until Kueue" in end.message) is (suspended and current is not None)
    assert "waits in the queue other" not in end.message
    told = f"Note: metadata.labels[kueue.x-k8s.io/queue-name]: the current attempt {note}"
    assert told in end.message if note is not None else "Note" not in end.message


def test_a_notice_about_the_queue_stands_before_the_others() -> None:
    notices = [Problem("spec.task", "No task.")]
    found = observed(during(), pytorch_job(queue="team"), [running()], queue="other", notices=notices)
    end = condition(decide(found, NOW, PATIENCE).status, ConditionType.SUCCEEDED)
    assert end is not None
    assert "Note: metadata.labels" in end.message
    assert end.message.endswith(" (1 more: see the events.)")
