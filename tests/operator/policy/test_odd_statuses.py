"""Whoever may write status may write anything into it: the operator decides something, and what it writes is valid."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.crd import structural_schema
from finetune_api.outcome import CheckpointResult, Reason, TerminationMessage
from finetune_api.problem import Problem
from finetune_api.status import (
    Adapter,
    Attempt,
    Checkpoint,
    Condition,
    ConditionType,
    FineTuneJobStatus,
    Phase,
    Progress,
)
from finetune_operator.policy.decide import decide, note_blocked, note_created
from finetune_operator.policy.evictions import exceeded_limit
from finetune_operator.policy.nodes import nodes_to_avoid
from finetune_operator.policy.observed import PodView, PyTorchJobView, VerificationView
from finetune_operator.policy.plan import ObservedState
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.transitions import events_between
from tests.operator.policy.views import ADAPTER, NOW, PATIENCE, WORKERS_UID, desired, pytorch_job

SCHEMA = structural_schema()["properties"]["status"]
ENDS = [*OperatorReason, *Reason, "Tired"]


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Or nothing."""
    return st.none() | strategy


times = st.sampled_from(
    ["", "never", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-01-31T11:59:00Z", "2026-01-31T12:00:00Z"]
)
numbers = st.integers(0, 3) | st.sampled_from([64, 2**53])
reasons = st.sampled_from([str(reason) for reason in ENDS])
attempts = st.builds(
    Attempt,
    number=st.integers(0, 3) | st.just(2**53 - 1),
    reason=maybe(reasons),
    message=maybe(st.text(max_size=10) | st.just("x" * 4096)),
    exit_code=maybe(st.integers(0, 255)),
    counted=st.booleans(),
    node=maybe(st.sampled_from(["node-7", "no node"])),
    completion_time=maybe(times),
)
conditions = st.builds(
    Condition,
    type=st.sampled_from([*ConditionType, "Foreign"]).map(str),
    status=st.sampled_from(["True", "False", "Unknown"]),
    reason=reasons | st.sampled_from(["VerificationPending", "Verifying", "AsTrained"]),
    message=st.just("x" * 32768) | st.text(max_size=5),
    last_transition_time=times,
)
statuses = st.builds(
    FineTuneJobStatus,
    phase=maybe(st.sampled_from(Phase)),
    conditions=st.lists(conditions, max_size=4),
    attempt=maybe(numbers),
    attempt_start_time=maybe(times),
    attempts=st.lists(attempts, max_size=3) | attempts.map(lambda attempt: [attempt] * 64),
    failures=maybe(numbers),
    attempts_without_progress=maybe(numbers),
    resumed_step=maybe(numbers),
    active_seconds=maybe(numbers),
    active_since=maybe(times),
    progress=maybe(st.builds(Progress, step=maybe(numbers), last_updated=maybe(times))),
    adapter=maybe(st.just(Adapter.model_validate(ADAPTER.model_dump(by_alias=True)))),
    checkpoint=maybe(st.builds(Checkpoint, uri=st.just("s3://x"), step=numbers)),
    start_time=maybe(times),
    completion_time=maybe(times),
)

moments = st.sampled_from(
    [
        NOW,
        NOW - timedelta(hours=1),
        NOW + timedelta(hours=1),
        datetime.min.replace(tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
    ]
)
words = st.builds(
    TerminationMessage,
    succeeded=st.booleans(),
    reason=maybe(st.sampled_from(Reason)),
    message=st.just("x" * 4096) | st.text(max_size=5),
    collateral=st.booleans(),
    adapter=maybe(st.just(ADAPTER)),
    checkpoint=maybe(st.builds(CheckpointResult, uri=st.sampled_from(["", "s3://x"]), step=st.integers(0, 2**80))),
)
pods = st.builds(
    PodView,
    index=st.integers(-1, 3),
    name=st.just("p"),
    uid=st.just("u"),
    owner_uid=st.sampled_from([WORKERS_UID, "", "other"]),
    phase=st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Odd"]),
    created_at=maybe(moments),
    deleting=st.booleans(),
    deleted_at=maybe(moments),
    scheduled_at=maybe(moments),
    node=maybe(st.just("n" * 253)),
    disruption=maybe(st.just("x" * 5000)),
    disk_limit=maybe(st.just(exceeded_limit('Usage of EmptyDir volume "data" exceeds the limit "1Gi". '))),
    memory_limit=maybe(st.just("1Gi")),
    unschedulable=maybe(st.just("x" * 5000)),
    waiting=maybe(st.sampled_from(["ErrImagePull", "CreateContainerError", "Odd"])),
    waiting_message=st.just("x" * 5000),
    init_container=maybe(st.just("mesh")),
    running=st.booleans(),
    started_at=maybe(moments),
    ended=st.booleans(),
    exit_code=maybe(st.integers(-2, 300)),
    ended_reason=st.sampled_from(["", "OOMKilled", "StartError", "Error"]),
    ended_message=st.just("x" * 5000),
    last_words=maybe(words),
    ended_at=maybe(moments),
)
views = st.builds(
    pytorch_job,
    attempt=numbers,
    nodes=st.sampled_from([0, 1, 2, 2**31 - 1]),
    created_at=maybe(moments),
    started_at=maybe(moments),
    resumed_at=maybe(moments),
    suspended_at=maybe(moments),
    ended_at=maybe(moments),
    deleting=st.booleans(),
    suspended=st.booleans(),
    end=maybe(st.sampled_from(["Failed", "Succeeded"])),
    end_message=st.just("x" * 5000),
    queue=maybe(st.just("team")),
    edited=st.booleans(),
)
specs = st.builds(
    desired,
    suspend=st.booleans(),
    backoff_limit=st.integers(0, 3),
    active_deadline_seconds=maybe(st.sampled_from([1, 2**31 - 1])),
    ttl_seconds_after_finished=maybe(st.sampled_from([0, 2**31 - 1])),
    verify=st.booleans(),
    problems=st.lists(st.just(Problem("spec", "x" * 5000)), max_size=2),
    notices=st.lists(st.just(Problem("spec", "x" * 5000)), max_size=2),
)
verifications = st.builds(
    VerificationView,
    name=st.just("v"),
    uid=st.just("v"),
    created_at=maybe(moments),
    started_at=maybe(moments),
    deleting=st.booleans(),
    suspended=st.booleans(),
    ended=st.booleans(),
    end_message=st.just("x" * 5000),
    pods=st.lists(pods, max_size=2),
)
states = st.builds(
    ObservedState,
    desired=specs,
    status=statuses,
    pytorch_job=maybe(views),
    pods=st.lists(pods, max_size=3),
    unrecorded=maybe(views),
    noticed=maybe(moments),
    progress=maybe(st.builds(Progress, step=maybe(numbers))),
    reported=maybe(st.sampled_from([Phase.PREPARING, Phase.RUNNING])),
    reports_expected=st.booleans(),
    verification=maybe(verifications),
)


@given(states, st.booleans())
def test_something_is_decided_and_it_is_valid(observed: ObservedState, created: bool) -> None:
    before = observed.status.model_copy(deep=True)
    plan = decide(observed, NOW, PATIENCE)
    if plan.create is not None and created:
        view: PyTorchJobView = pytorch_job(plan.create, created_at=NOW)
        note_created(plan, view, observed, NOW, PATIENCE)
    elif plan.create is not None:
        note_blocked(plan, OperatorReason.NAME_TAKEN, "x" * 5000)
    assert observed.status == before
    jsonschema.validate(plan.status.model_dump(mode="json", by_alias=True, exclude_none=True), SCHEMA)
    for event in events_between(before, plan.status, problems=observed.desired.problems):
        assert event.reason
    assert not {"no node"} & set(nodes_to_avoid(plan.status.attempts))
    assert plan.again_at is None or plan.again_at.tzinfo is not None
