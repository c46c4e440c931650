"""Events are told when something changes, once, and never for a state that lasts."""

from __future__ import annotations

import pytest

from finetune_api.problem import Problem
from finetune_api.status import Attempt, FineTuneJobStatus, Phase
from finetune_operator.policy.conditions import ConditionWriter
from finetune_operator.policy.transitions import MOST_WARNINGS, events_between
from tests.operator.policy.views import NOW


def status(phase: Phase = Phase.STARTING, reason: str = "Starting", attempt: int | None = 1) -> FineTuneJobStatus:
    """A job on its way."""
    made = FineTuneJobStatus(attempt=attempt, observed_generation=1)
    ConditionWriter(made, NOW, 1).progressing(phase, reason, "A sentence.")
    return made


def end(succeeded: bool, reason: str, *attempts: str) -> FineTuneJobStatus:
    """A job that has ended after such attempts."""
    made = status()
    made.attempts = [Attempt(number=number, reason=why) for number, why in enumerate(attempts, 1)]
    writer = ConditionWriter(made, NOW, 1)
    (writer.succeeded if succeeded else writer.failed)(reason, "A sentence.")
    return made


def retrying(why: str) -> FineTuneJobStatus:
    """A job between two attempts."""
    made = status(Phase.RETRYING, why)
    made.attempts = [Attempt(number=1, reason=why)]
    return made


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (FineTuneJobStatus(), status(), [("Normal", "AttemptCreated")]),
        (status(), status(Phase.RUNNING, "Running"), [("Normal", "Running")]),
        (status(), status(Phase.PREPARING, "Preparing"), []),
        (status(), status(Phase.PENDING, "Unschedulable"), [("Warning", "Unschedulable")]),
        (status(), status(Phase.QUEUED, "WaitingForQuota"), [("Normal", "WaitingForQuota")]),
        (status(), status(reason="ImagePullFailed"), [("Warning", "ImagePullFailed")]),
        (status(reason="ImagePullFailed"), status(), []),
        (status(), retrying("HubUnavailable"), [("Warning", "HubUnavailable")]),
        (status(), retrying("Disrupted"), [("Normal", "Disrupted")]),
        (retrying("Disrupted"), status(attempt=2), [("Normal", "AttemptCreated")]),
        (status(), end(True, "Succeeded", "Succeeded"), [("Normal", "Succeeded")]),
        (status(), end(False, "DataInvalid", "DataInvalid"), [("Warning", "DataInvalid")]),
        (
            status(),
            end(False, "RetriesExhausted", "HubUnavailable"),
            [("Warning", "HubUnavailable"), ("Warning", "RetriesExhausted")],
        ),
    ],
)
def test_a_change_is_told_once(old: FineTuneJobStatus, new: FineTuneJobStatus, told: list[tuple[str, str]]) -> None:
    new.attempts = [*old.attempts, *new.attempts]
    events = events_between(old, new)
    assert [(event.type, event.reason) for event in events] == told
    attempts = {f"Attempt {attempt.number}: {attempt.message or 'it has ended.'}" for attempt in new.attempts}
    sentences = {"A sentence.", "Attempt 1 was created.", "Attempt 2 was created.", *attempts}
    assert {event.message for event in events} <= sentences
    assert events_between(new, new) == []


def test_each_problem_and_each_notice_is_told() -> None:
    problems = [Problem("spec.output", "It is required."), Problem("spec.train_path", "It is local.")]
    bad = FineTuneJobStatus(observed_generation=1)
    ConditionWriter(bad, NOW, 1).stalled(Phase.PENDING, "InvalidSpec", str(problems[0]))
    notices = [Problem("spec.task", "It is not given.")]
    events = events_between(FineTuneJobStatus(), bad, problems=problems, notices=notices)
    assert [(event.reason, event.message) for event in events] == [
        ("Notice", "spec.task: It is not given."),
        ("InvalidSpec", "spec.output: It is required."),
        ("InvalidSpec", "spec.train_path: It is local."),
    ]
    assert events_between(bad, bad, problems=problems, notices=notices) == []


def test_what_the_api_server_refuses_is_told_although_nobody_found_a_problem() -> None:
    refused = FineTuneJobStatus(observed_generation=1)
    sentence = "The API server refuses the workers of this job: no such key."
    ConditionWriter(refused, NOW, 1).stalled(Phase.PENDING, "InvalidSpec", sentence)
    events = events_between(status(attempt=None), refused)
    assert [(event.type, event.reason, event.message) for event in events] == [("Warning", "InvalidSpec", sentence)]
    assert events_between(refused, refused) == []


@pytest.mark.parametrize(
    ("count", "posted"),
    [(1, 1), (MOST_WARNINGS, MOST_WARNINGS), (MOST_WARNINGS + 1, MOST_WARNINGS + 1), (100_000, MOST_WARNINGS + 1)],
)
def test_a_spec_that_is_wrong_everywhere_floods_nobody(count: int, posted: int) -> None:
    many = [Problem(f"spec.env[{number}]", "It is null.") for number in range(count)]
    bad = FineTuneJobStatus(observed_generation=1)
    ConditionWriter(bad, NOW, 1).stalled(Phase.PENDING, "InvalidSpec", str(many[0]))
    told = events_between(FineTuneJobStatus(), bad, problems=many, notices=many)
    for reason in ("InvalidSpec", "Notice"):
        messages = [event.message for event in told if event.reason == reason]
        assert len(messages) == posted
        assert messages[:10] == [str(problem) for problem in many[:10]]
        if count > MOST_WARNINGS:
            assert messages[-1].startswith(f"{count - MOST_WARNINGS} more of this kind")
