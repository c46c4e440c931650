"""Conditions by the conventions: terminal for ever, one of each type, transition times that move on flips alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.status import Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_operator.policy import conditions
from finetune_operator.policy.conditions import condition, is_finished
from finetune_operator.policy.times import rfc3339
from tests.operator.policy.views import NOW, later

TURNS = ("progressing", "at_rest", "stalled", "succeeded", "failed")


def turn(status: FineTuneJobStatus, kind: str, seconds: int, message: str = "A sentence.") -> None:
    """The job takes a turn, so many seconds after NOW."""
    if kind in ("succeeded", "failed"):
        conditions.finished(
            status, succeeded=kind == "succeeded", reason="Ended", message=message, now=later(seconds), generation=1
        )
    else:
        getattr(conditions, kind)(status, Phase.PENDING, "Reason", message, now=later(seconds), generation=1)


def states(status: FineTuneJobStatus) -> dict[str, str]:
    """Type and status of every condition."""
    return {item.type: item.status for item in status.conditions}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("progressing", {"Succeeded": "Unknown", "Reconciling": "True"}),
        ("at_rest", {"Succeeded": "Unknown"}),
        ("stalled", {"Succeeded": "Unknown", "Stalled": "True"}),
        ("succeeded", {"Succeeded": "True"}),
        ("failed", {"Succeeded": "False", "Stalled": "True"}),
    ],
)
@pytest.mark.parametrize("before", TURNS[:3])
def test_only_what_is_true_stands_beside_succeeded(before: str, kind: str, expected: dict[str, str]) -> None:
    status = FineTuneJobStatus()
    turn(status, before, 0)
    turn(status, kind, 1)
    assert states(status) == expected
    assert is_finished(status) == (kind in ("succeeded", "failed"))


@given(st.lists(st.tuples(st.sampled_from(TURNS), st.integers(1, 100), st.text(max_size=5))))
def test_a_transition_time_moves_when_its_status_does(turns: Sequence[tuple[str, int, str]]) -> None:
    status, clock = FineTuneJobStatus(), 0
    for kind, seconds, message in turns:
        clock += seconds
        before: dict[str, Condition] = {item.type: item for item in status.conditions}
        turn(status, kind, clock, message)
        assert len(states(status)) == len(status.conditions)
        for item in status.conditions:
            old = before.get(item.type)
            kept = old is not None and old.status == item.status
            assert item.last_transition_time == (
                old.last_transition_time if old is not None and kept else rfc3339(later(clock))
            )


@given(st.sampled_from(TURNS[:3]), st.lists(st.sampled_from(TURNS[:3])))
def test_the_way_to_a_state_leaves_no_trace(last: str, way: list[str]) -> None:
    """Or the same state would be another text, and a write."""
    straight, round_about = FineTuneJobStatus(), FineTuneJobStatus()
    for kind in [*way, last]:
        turn(round_about, kind, 0)
    turn(straight, last, 0)
    assert straight == round_about


def test_a_long_message_is_cut_to_what_the_schema_takes() -> None:
    status = FineTuneJobStatus()
    turn(status, "stalled", 0, "x" * 100_000)
    found = condition(status, ConditionType.STALLED)
    assert found is not None
    assert len(found.message) == conditions.MESSAGE_LIMIT
    FineTuneJobStatus.model_validate(status.model_dump())


def test_the_end_has_a_time() -> None:
    status = FineTuneJobStatus()
    turn(status, "failed", 7)
    assert status.completion_time == rfc3339(NOW + timedelta(seconds=7))
    assert status.phase is Phase.FAILED
