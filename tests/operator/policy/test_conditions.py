"""Conditions by the conventions: terminal for ever, one of each type, transition times that move on flips alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.status import Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_operator.policy import conditions
from finetune_operator.policy.conditions import ConditionWriter, condition, is_finished
from finetune_operator.policy.times import rfc3339
from tests.operator.policy.views import NOW, later

TURNS = ("progressing", "at_rest", "stalled", "succeeded", "failed")


def turn(status: FineTuneJobStatus, kind: str, seconds: int, message: str = "A sentence.") -> None:
    """The job takes a turn, so many seconds after NOW."""
    writer = ConditionWriter(status, later(seconds), 1)
    if kind in ("succeeded", "failed"):
        getattr(writer, kind)("Ended", message)
    else:
        getattr(writer, kind)(Phase.PENDING, "Reason", message)


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


@pytest.mark.parametrize("kind", TURNS)
def test_the_end_is_told_from_what_the_api_server_holds_too(kind: str) -> None:
    status = FineTuneJobStatus()
    assert not is_finished(status)
    turn(status, kind, 0)
    assert is_finished(status.model_dump(mode="json", by_alias=True)) is is_finished(status)


@pytest.mark.parametrize(
    "conditions",
    [
        None,
        {},
        "Succeeded",
        ["Succeeded", None, 3],
        [{"type": "Succeeded"}],
        [{"type": "Succeeded", "status": True}],
        [{"type": "Succeeded", "status": "Unknown"}],
        [{"type": "Stalled", "status": "True"}],
        [{"type": ["Succeeded"], "status": ["True"]}],
    ],
)
def test_what_says_nothing_of_an_end_is_none(conditions: object) -> None:
    assert not is_finished({"conditions": conditions})
    assert not is_finished({})


@pytest.mark.parametrize("state", ["True", "False"])
def test_an_end_is_one_among_other_conditions(state: str) -> None:
    assert is_finished({"conditions": [3, {"type": "Stalled"}, {"type": "Succeeded", "status": state}]})


def test_a_verdict_stands_behind_the_end() -> None:
    status = FineTuneJobStatus()
    ConditionWriter(status, NOW, 3).verified("True", "AsTrained", "It is.")
    ConditionWriter(status, NOW, 3).succeeded("Succeeded", "Done.")
    assert [item.type for item in status.conditions] == ["Succeeded", "Verified"]
    assert {item.observed_generation for item in status.conditions} == {3}
    assert status.phase is Phase.SUCCEEDED


def test_a_condition_that_nobody_knows_stands_last() -> None:
    time = rfc3339(NOW)
    foreign = Condition(type="Foreign", status="True", reason="So", last_transition_time=time)
    status = FineTuneJobStatus(conditions=[foreign])
    turn(status, "stalled", 0)
    assert [item.type for item in status.conditions] == ["Succeeded", "Stalled", "Foreign"]
