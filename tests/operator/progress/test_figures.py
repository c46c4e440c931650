"""Whatever a trainer reports, status gets figures that its schema takes, and no figure that nobody measured."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.crd import structural_schema
from finetune_api.outcome import BatchLayout, Metric, ProgressMetric, TrainerStatus
from finetune_api.status import Phase, Progress
from finetune_operator.progress.figures import CLOCK_TOLERANCE, KNOWN, condensed, progress_of, sent_at
from finetune_trainer.train import progress_status as ours

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
SENT = "2030-01-02T03:04:05Z"


def report(at: str = SENT, percent: int | None = None, eta: int | None = None, **metrics: str) -> TrainerStatus:
    return TrainerStatus(
        progress_percentage=percent,
        estimated_remaining_seconds=eta,
        metrics=[Metric(name=name, value=value) for name, value in metrics.items()],
        last_updated_time=at,
    )


def test_our_own_report_arrives_whole() -> None:
    sent = ours.Progress(
        phase=ours.Phase.PUBLISHING,
        percent=99,
        step=7,
        total_steps=8,
        epoch=0.875,
        loss=1.25,
        eval_loss=1.5,
        learning_rate=1e-4,
        tokens_per_second=5000.0,
        remaining_seconds=12.4,
        batching="SharedPrefix",
    )
    progress, phase = progress_of(condensed(ours.trainer_status(sent, NOW), NOW))
    assert phase is Phase.PUBLISHING
    assert progress == Progress(
        percent=99,
        step=7,
        total_steps=8,
        epoch=0.875,
        loss=1.25,
        eval_loss=1.5,
        learning_rate=1e-4,
        tokens_per_second=5000.0,
        batching=BatchLayout.SHARED_PREFIX,
        eta_seconds=12,
        last_updated=SENT,
    )


def test_a_layout_that_nobody_knows_is_left_out() -> None:
    assert progress_of(report(batching="Stacked"))[0].batching is None


def test_what_was_not_measured_is_absent() -> None:
    progress, phase = progress_of(condensed(ours.trainer_status(ours.Progress(phase=ours.Phase.PREPARING), NOW), NOW))
    assert phase is Phase.PREPARING
    assert progress.model_dump(exclude_none=True) == {"lastUpdated": SENT}


def test_the_names_of_transformers_logs_are_understood_where_ours_are_missing() -> None:
    progress, phase = progress_of(report(epoch="0.5", train_tokens_per_second="10.5", loss="1.25"))
    assert (progress.epoch, progress.tokens_per_second, progress.loss) == (0.5, 10.5, 1.25)
    assert phase is Phase.RUNNING
    progress, _ = progress_of(report(epoch="0.5", current_epoch="0.75"))
    assert progress.epoch == 0.75
    progress, _ = progress_of(report(epoch="0.5", current_epoch="nan"))
    assert progress.epoch == 0.5


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "", "many", "0x10", "{}", "None", "-1"])
@pytest.mark.parametrize(
    "name", [name for name in ProgressMetric if name not in (ProgressMetric.PHASE, "loss", "eval_loss")]
)
def test_a_figure_that_is_none_is_absent_and_the_others_stay(name: str, value: str) -> None:
    progress, _ = progress_of(report(SENT, 5, None, **{name: value}))
    assert progress.model_dump(exclude_none=True) == {"percent": 5, "lastUpdated": SENT}


@pytest.mark.parametrize(
    ("value", "step"),
    [("3", 3), ("3.0", 3), ("3.5", None), (str(2**53), 2**53), (str(2**53 + 2), None), ("1e300", None)],
)
def test_a_step_is_a_whole_number_within_the_bounds(value: str, step: int | None) -> None:
    assert progress_of(report(current_step=value))[0].step == step


def test_stock_transformers_unknown_number_of_steps_is_absent() -> None:
    for value in ("-1", "0"):
        assert progress_of(report(total_steps=value))[0].total_steps is None


@pytest.mark.parametrize(
    ("step", "total", "shown"),
    [("8", "8", (8, 8)), ("9", "8", (None, None)), ("9", "0", (9, None)), ("nan", "8", (None, 8))],
)
def test_a_step_beyond_the_last_one_is_not_shown(step: str, total: str, shown: tuple[int | None, int | None]) -> None:
    progress, _ = progress_of(report(current_step=step, total_steps=total))
    assert (progress.step, progress.total_steps) == shown


@pytest.mark.parametrize(("eta", "seconds"), [(0, 0), (2**53, 2**53), (2**53 + 1, None), (10**4000, None)])
def test_a_time_left_beyond_the_bounds_is_absent(eta: int, seconds: int | None) -> None:
    assert progress_of(report(eta=eta))[0].eta_seconds == seconds


@pytest.mark.parametrize("name", ["Succeeded", "Failed", "Pending", "running", "", "<b>"])
def test_a_phase_that_a_trainer_cannot_be_in_is_none(name: str) -> None:
    assert progress_of(report(phase=name))[1] is None


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("2030-01-02T03:04:00Z", "2030-01-02T03:04:00Z"),
        ("2030-01-02T04:04:00.123456+01:00", "2030-01-02T03:04:00Z"),
        ("2030-01-02T03:04:00.123456789Z", "2030-01-02T03:04:00Z"),
        *(
            (wrong, SENT)
            for wrong in (
                "",
                "now",
                "2030-01-02",
                "2030-01-02T03:04:00",
                "1893553440",
                "2030-13-02T03:04:00Z",
                "0001-01-01T00:00:00+23:59",
                "9999-12-31T23:59:59-23:59",
                (NOW + CLOCK_TOLERANCE + timedelta(seconds=1)).isoformat(),
                (NOW - CLOCK_TOLERANCE - timedelta(seconds=1)).isoformat(),
                (NOW + timedelta(seconds=1)).isoformat(),
            )
        ),
    ],
)
def test_a_time_that_cannot_be_believed_is_replaced_by_that_of_receipt(sent: str, kept: str) -> None:
    assert progress_of(condensed(report(at=sent), NOW))[0].last_updated == kept


@pytest.mark.parametrize(
    ("sent", "counts"),
    [
        (NOW.isoformat(), NOW),
        ((NOW - timedelta(seconds=0.25)).isoformat(), NOW - timedelta(seconds=0.25)),
        ((NOW - 2 * CLOCK_TOLERANCE).isoformat(), NOW - CLOCK_TOLERANCE),
        ((NOW + timedelta(days=1)).isoformat(), NOW),
        ("yesterday", NOW),
    ],
)
def test_a_report_was_sent_before_it_came_and_not_long_before(sent: str, counts: datetime) -> None:
    assert sent_at(report(at=sent), NOW) == counts


def test_nothing_but_known_metrics_is_kept_and_of_each_the_first() -> None:
    metrics = [Metric(name=name, value="1") for name in KNOWN for _ in range(8)]
    metrics += [Metric(name=f"grad_norm_{number}", value="x" * 128) for number in range(100)]
    kept = condensed(report().model_copy(update={"metrics": metrics}), NOW)
    assert sorted(metric.name for metric in kept.metrics) == sorted(KNOWN)


PROGRESS_SCHEMA = structural_schema()["properties"]["status"]["properties"]["progress"]
VALUES = st.one_of(
    st.text(max_size=128),
    st.floats().map(str),
    st.integers().map(lambda number: str(number)[:128]),
    st.sampled_from(Phase),
)
REPORTS = st.builds(
    TrainerStatus,
    progress_percentage=st.none() | st.integers(0, 100),
    estimated_remaining_seconds=st.none() | st.integers(min_value=0),
    metrics=st.lists(
        st.builds(Metric, name=st.sampled_from(sorted(KNOWN)) | st.text(max_size=128), value=VALUES), max_size=20
    ),
    last_updated_time=st.datetimes().map(datetime.isoformat) | st.text(max_size=64),
)


@given(REPORTS)
def test_whatever_is_sent_fits_the_schema_and_survives_being_condensed(sent: TrainerStatus) -> None:
    kept = condensed(sent, NOW)
    progress, phase = progress_of(kept)
    jsonschema.validate(progress.model_dump(mode="json", exclude_none=True), PROGRESS_SCHEMA)
    jsonschema.validate(progress_of(sent)[0].model_dump(mode="json", exclude_none=True), PROGRESS_SCHEMA)
    at_once, phase_at_once = progress_of(sent)
    assert phase == phase_at_once
    assert progress.model_copy(update={"last_updated": None}) == at_once.model_copy(update={"last_updated": None})
    assert progress.last_updated is not None
    assert abs(datetime.fromisoformat(progress.last_updated) - NOW) <= CLOCK_TOLERANCE + timedelta(seconds=1)
