"""What a trainer says of its adapter arrives in status."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.outcome import CheckpointResult, DatasetResult, MetricsResult, TerminationMessage, VerifiedResult
from finetune_api.status import Checkpoint, Dataset, FineTuneJobStatus, Metrics
from finetune_operator.policy.results import keep_checkpoint, keep_results
from tests.operator.policy.views import ADAPTER, checkpoint

DATASET = DatasetResult(
    rows=9,
    trainable_tokens=80,
    truncated_rows=1,
    dropped_rows=2,
    invalid_rows=3,
    retokenized_rows=4,
    sha256="f" * 64,
)
METRICS = MetricsResult(train_loss=1.0, eval_loss=2.0, perplexity=3.0, token_accuracy=0.5)


def test_status_says_what_was_checked_on_the_adapter() -> None:
    verified = VerifiedResult(
        tensors=28, moved_tensors=14, rows=4, difference_from_training=0.0, difference_from_base=1.5
    )
    words = TerminationMessage(succeeded=True, adapter=ADAPTER.model_copy(update={"verified": verified}))
    again = TerminationMessage.parse(words.to_bytes())
    assert again is not None
    status = FineTuneJobStatus()
    keep_results(status, again)
    assert status.adapter is not None
    assert status.adapter.verified is not None
    assert status.adapter.verified.model_dump(by_alias=True) == {
        "tensors": 28,
        "movedTensors": 14,
        "rows": 4,
        "differenceFromTraining": 0.0,
        "differenceFromBase": 1.5,
    }


def test_an_adapter_of_a_trainer_that_does_not_check_is_one_too() -> None:
    status = FineTuneJobStatus()
    keep_results(status, TerminationMessage(succeeded=True, adapter=ADAPTER))
    assert status.adapter is not None
    assert status.adapter.verified is None


def test_every_figure_arrives() -> None:
    status = FineTuneJobStatus()
    words = TerminationMessage(
        succeeded=True, adapter=ADAPTER, dataset=DATASET, metrics=METRICS, checkpoint=checkpoint(7)
    )
    keep_results(status, words)
    body = status.model_dump(by_alias=True, exclude_none=True)
    assert body["adapter"] == ADAPTER.model_dump(by_alias=True, exclude_none=True)
    assert body["dataset"] == DATASET.model_dump(by_alias=True)
    assert body["metrics"] == METRICS.model_dump(by_alias=True)
    assert body["checkpoint"] == {"uri": "s3://models/step-7", "step": 7}


def test_what_is_not_said_or_does_not_fit_leaves_what_was_known() -> None:
    known = FineTuneJobStatus(dataset=Dataset(rows=1, trainable_tokens=1), metrics=Metrics(eval_loss=1.0))
    for words in (
        TerminationMessage(succeeded=True),
        TerminationMessage(succeeded=True, dataset=DATASET.model_copy(update={"sha256": "odd"})),
        TerminationMessage(succeeded=True, checkpoint=CheckpointResult(uri="", step=7)),
    ):
        status = known.model_copy(deep=True)
        keep_results(status, words)
        assert status == known


@pytest.mark.parametrize(
    ("known", "found", "kept"),
    [
        (None, None, None),
        (None, 0, 0),
        (5, None, 5),
        (5, 4, 5),
        (5, 5, 5),
        (5, 6, 6),
    ],
)
def test_the_newest_checkpoint_is_kept(known: int | None, found: int | None, kept: int | None) -> None:
    status = FineTuneJobStatus(checkpoint=Checkpoint(uri="s3://old", step=known) if known is not None else None)
    keep_checkpoint(status, checkpoint(found) if found is not None else None)
    assert (status.checkpoint.step if status.checkpoint is not None else None) == kept
    if found == kept and found is not None:
        # Of the same step, the one that was named last is there.
        assert status.checkpoint == Checkpoint(uri=f"s3://models/step-{found}", step=found)


@pytest.mark.parametrize("wrong", [{"uri": "x" * 3000}, {"step": 2**60}])
def test_a_checkpoint_that_status_cannot_hold_is_none(wrong: dict[str, Any]) -> None:
    status = FineTuneJobStatus()
    keep_checkpoint(status, checkpoint(1).model_copy(update=wrong))
    assert status.checkpoint is None
