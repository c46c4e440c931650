"""What a trainer says of its adapter arrives in status."""

from __future__ import annotations

from finetune_api.outcome import TerminationMessage, VerifiedResult
from finetune_api.status import FineTuneJobStatus
from finetune_operator.policy.results import keep_results
from tests.operator.policy.views import ADAPTER


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
