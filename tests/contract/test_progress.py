"""Progress between trainer and operator: ours arrives as it was measured, anybody's as what status can hold."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import jsonschema
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api.crd import structural_schema
from finetune_api.outcome import BatchLayout, ProgressMetric, ProgressReport, TrainerStatus
from finetune_api.status import Phase
from finetune_operator.policy.phase import TRAINERS_PHASES
from finetune_operator.progress.figures import condensed, progress_of
from finetune_trainer.train import progress_status as trainer

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
SCHEMA = structural_schema()["properties"]["status"]["properties"]["progress"]

figure = st.floats(-1e30, 1e30, allow_nan=False, allow_infinity=False)
amount = st.floats(0, 1e30, allow_nan=False, allow_infinity=False)
whole = st.integers(0, 2**53)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Or nothing."""
    return st.none() | strategy


ours = st.builds(
    trainer.Progress,
    phase=st.sampled_from(trainer.Phase),
    percent=maybe(st.integers(0, 100)),
    step=maybe(whole),
    total_steps=maybe(st.integers(1, 2**53)),
    epoch=maybe(amount),
    loss=maybe(figure),
    eval_loss=maybe(figure),
    learning_rate=maybe(amount),
    tokens_per_second=maybe(amount),
    remaining_seconds=maybe(st.floats(0, 1e9)),
    batching=maybe(st.sampled_from([layout.value for layout in BatchLayout])),
)


def travelled(sent: trainer.Progress, at: datetime = NOW) -> TrainerStatus:
    """The report as the operator keeps it."""
    body = ProgressReport(trainer_status=trainer.trainer_status(sent, at)).model_dump_json(exclude_none=True)
    return condensed(ProgressReport.model_validate_json(body).trainer_status, NOW)


def close(read: float | None, sent: float | None) -> bool:
    """The same to six digits, which is what travels."""
    if read is None or sent is None:
        return read is sent
    return abs(read - sent) <= 1e-5 * abs(sent)


@given(ours)
def test_what_a_trainer_measures_is_what_status_shows(sent: trainer.Progress) -> None:
    progress, phase = progress_of(travelled(sent))
    assert phase == Phase(sent.phase)
    assert (progress.percent, progress.step, progress.total_steps) == (sent.percent, sent.step, sent.total_steps)
    assert (str(progress.batching) if progress.batching else None) == sent.batching
    assert progress.eta_seconds == (None if sent.remaining_seconds is None else round(sent.remaining_seconds))
    for name in ("epoch", "loss", "eval_loss", "learning_rate", "tokens_per_second"):
        assert close(getattr(progress, name), getattr(sent, name)), name


@given(ours, st.integers(-(10**6), 10**6))
def test_a_clock_that_is_wrong_is_not_believed(sent: trainer.Progress, seconds: int) -> None:
    progress, _ = progress_of(travelled(sent, NOW + timedelta(seconds=seconds)))
    assert progress.last_updated is not None
    assert abs((datetime.fromisoformat(progress.last_updated) - NOW).total_seconds()) <= 600


words = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "-0", "1_000", " 5 ", "0x10", "9" * 100, "1e308", "Running", "١٢"]),
    st.floats().map(repr),
    st.integers().map(str),
)
names = st.sampled_from([*ProgressMetric]).map(str) | st.text(max_size=10)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
bodies = st.fixed_dictionaries(
    {},
    optional={
        "trainerStatus": st.fixed_dictionaries(
            {},
            optional={
                "progressPercentage": st.integers(-5, 105) | scalars,
                "estimatedRemainingSeconds": scalars,
                "metrics": st.lists(
                    st.fixed_dictionaries({"name": names | scalars, "value": words | scalars}), max_size=6
                )
                | scalars,
                "lastUpdatedTime": words | st.datetimes().map(lambda time: time.isoformat() + "Z") | scalars,
                "more": scalars,
            },
        )
        | scalars
    },
)


@given(bodies.map(json.dumps) | st.text(max_size=50) | st.binary(max_size=50))
def test_no_report_is_too_odd_and_none_shows_what_status_cannot_hold(body: str | bytes) -> None:
    try:
        report = ProgressReport.model_validate_json(body)
    except ValidationError:
        return
    kept = condensed(report.trainer_status, NOW)
    progress, phase = progress_of(kept)
    assert phase is None or phase in TRAINERS_PHASES
    jsonschema.validate(progress.model_dump(mode="json", by_alias=True, exclude_none=True), SCHEMA)
    # Once kept, the same is read again.
    assert progress_of(condensed(kept, NOW)) == (progress, phase)
