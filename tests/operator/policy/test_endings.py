"""What status keeps of the end of an attempt, and of the job."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.outcome import Reason
from finetune_api.status import ATTEMPTS_KEPT, Attempt, Checkpoint, ConditionType, FineTuneJobStatus, Phase, Progress
from finetune_operator.policy import endings
from finetune_operator.policy.conditions import ConditionWriter, condition
from finetune_operator.policy.failure_reason import Verdict
from finetune_operator.policy.observed import PodView
from finetune_operator.policy.times import rfc3339
from tests.operator.policy.views import NOW, PATIENCE, checkpoint, ended, failure, later, success


def verdict(**more: Any) -> Verdict:
    """An end of the world's fault."""
    made: dict[str, Any] = {"succeeded": False, "reason": "HubUnavailable", "message": "It was away.", **more}
    return Verdict(**made)


def status(**more: Any) -> FineTuneJobStatus:
    """A job in its third attempt, active for a minute."""
    made: dict[str, Any] = {
        "attempt": 3,
        "attempt_start_time": rfc3339(later(-90)),
        "active_since": rfc3339(later(-60)),
        "active_seconds": 5,
        "progress": Progress(step=7, eta_seconds=9),
    }
    return FineTuneJobStatus(**{**made, **more})


def test_an_attempt_is_recorded_with_everything_that_is_known_of_its_end() -> None:
    job = status(failures=1)
    endings.end_attempt(job, verdict(exit_code=201, node="node-7", checkpoint=checkpoint(4)), NOW)
    assert job.attempts == [
        Attempt(
            number=3,
            reason="HubUnavailable",
            message="It was away.",
            exit_code=201,
            counted=True,
            node="node-7",
            start_time=rfc3339(later(-90)),
            completion_time=rfc3339(NOW),
        )
    ]
    assert (job.failures, job.active_since, job.active_seconds) == (2, None, 65)
    assert job.progress == Progress(step=7)
    assert job.checkpoint == Checkpoint(uri="s3://models/step-4", step=4)


@pytest.mark.parametrize(("more", "failures"), [({}, 1), ({"counted": False}, None), ({"succeeded": True}, None)])
def test_only_failures_that_count_are_counted(more: dict[str, Any], failures: int | None) -> None:
    job = FineTuneJobStatus()
    endings.end_attempt(job, verdict(**more), NOW)
    assert job.failures == failures
    assert [attempt.number for attempt in job.attempts] == [1]
    assert job.attempts[0].counted is more.get("counted", True)
    assert job.progress is None


def test_of_many_attempts_the_newest_are_kept_and_of_a_message_its_beginning() -> None:
    job = status(attempt=ATTEMPTS_KEPT + 2)
    job.attempts = [Attempt(number=number) for number in range(2, ATTEMPTS_KEPT + 2)]
    endings.end_attempt(job, verdict(message="x" * 5000), NOW)
    assert [attempt.number for attempt in job.attempts] == list(range(3, ATTEMPTS_KEPT + 3))
    assert job.attempts[-1].message == "x" * 4096


def test_a_deleted_pytorchjob_costs_nothing_but_what_was_not_saved() -> None:
    stopped = failure(Reason.TERMINATED, checkpoint=checkpoint(4))
    found = endings.deleted(3, [ended(0, 143, stopped), ended(1, 143)])
    assert (found.succeeded, found.reason, found.retryable, found.counted) == (False, "WorkersDeleted", True, False)
    assert found.checkpoint == checkpoint(4)
    assert "The PyTorchJob of attempt 3 was deleted" in found.message


@pytest.mark.parametrize(
    ("pods", "succeeded"),
    [
        ([ended(0, 0, success())], True),
        ([ended(1, 0), ended(0, 0, success())], True),
        # Only rank 0 may say so, once it has ended.
        ([ended(1, 0, success())], False),
        ([PodView(index=0, name="p", uid="u", phase="Running", last_words=success())], False),
        ([ended(0, 0)], False),
        ([ended(0, 0, success().model_copy(update={"adapter": None}))], False),
        ([ended(0, 0, success().model_copy(update={"succeeded": False}))], False),
        ([], False),
    ],
)
def test_a_result_outlives_its_pytorchjob(pods: Any, succeeded: bool) -> None:
    found = endings.deleted(3, pods)
    assert found.succeeded is succeeded
    if succeeded:
        assert (found.reason, found.exit_code, found.words) == ("Succeeded", 0, success())
        assert found.message == "The adapter is at s3://models/adapter."


def test_who_is_stopped_is_not_to_blame() -> None:
    assert endings.stopped("Odd", "So it is.") == verdict(
        reason="Odd", message="So it is.", retryable=True, counted=False
    )
    assert endings.suspended() == endings.stopped("Suspended", "The job was suspended.")


@pytest.mark.parametrize(
    ("doubtful", "before", "retryable"),
    [
        (False, [], True),
        (False, ["HubUnavailable"], True),
        (True, [], True),
        (True, ["OutOfMemory"], True),
        (True, ["HubUnavailable", "OutOfMemory"], True),
        (True, ["OutOfMemory", "HubUnavailable"], False),
    ],
)
def test_what_is_doubtful_once_is_sure_the_second_time(doubtful: bool, before: list[str], retryable: bool) -> None:
    job = FineTuneJobStatus(attempts=[Attempt(number=number, reason=why) for number, why in enumerate(before, 1)])
    sent = verdict(doubtful=doubtful, retryable=True)
    found = endings.final(sent, job)
    assert found == (sent if retryable else verdict(doubtful=True, retryable=False))


def test_success_is_whole_although_the_last_report_was_lost() -> None:
    job = status()
    endings.succeed(ConditionWriter(job, NOW, 1), verdict(succeeded=True, words=success(), message="There it is."))
    assert job.progress == Progress(step=7, percent=100, eta_seconds=0)
    assert job.adapter is not None
    assert (job.phase, job.completion_time) == (Phase.SUCCEEDED, rfc3339(NOW))
    end = condition(job, ConditionType.SUCCEEDED)
    assert end is not None
    assert (end.status, end.reason, end.message) == ("True", "Succeeded", "There it is.")
    bare = FineTuneJobStatus()
    endings.succeed(ConditionWriter(bare, NOW, 1), verdict(succeeded=True))
    assert (bare.progress, bare.adapter) == (Progress(percent=100, eta_seconds=0), None)


@pytest.mark.parametrize(("failures", "words"), [(None, "The attempt has"), (1, "The attempt has"), (2, "2 attempts")])
def test_giving_up_names_the_last_failure_that_counts(failures: int | None, words: str) -> None:
    ends = [
        Attempt(number=1, reason="HubUnavailable", message="Away."),
        Attempt(number=2, reason="TrainerCrashed", message="Gone."),
        Attempt(number=3, reason="Disrupted", message="Evicted.", counted=False),
    ]
    job = FineTuneJobStatus(attempts=ends, failures=failures)
    endings.give_up(ConditionWriter(job, NOW, 1), 1)
    end = condition(job, ConditionType.SUCCEEDED)
    assert end is not None
    assert end.message.startswith(words)
    assert end.message.endswith("; the last one: TrainerCrashed: Gone.")


def test_the_next_attempt_waits_as_long_as_the_settings_say() -> None:
    ends = [Attempt(number=number, reason="Disrupted", completion_time=rfc3339(NOW)) for number in range(1, 9)]
    assert endings.next_attempt_at(FineTuneJobStatus(attempts=ends[:1]), PATIENCE, NOW) == later(10)
    assert endings.next_attempt_at(FineTuneJobStatus(attempts=ends), PATIENCE, NOW) == later(360)
    assert endings.next_attempt_at(FineTuneJobStatus(), PATIENCE, NOW) is None
