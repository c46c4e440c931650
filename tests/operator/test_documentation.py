"""Every reason that a job can give is explained to whoever reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.outcome import Reason
from finetune_api.status import Phase
from finetune_operator.policy.reasons import OperatorReason

ROOT = Path(__file__).parents[2]
STATUS = (ROOT / "docs" / "reference" / "status.md").read_text()

SEEN = [*OperatorReason, *(reason for reason in Reason if reason is not Reason.TERMINATED), *Phase]
"""A pod that was told to stop becomes an attempt that was Disrupted or Suspended."""


@pytest.mark.parametrize("word", sorted({str(word) for word in SEEN}))
def test_the_page_about_status_has_it(word: str) -> None:
    assert f"`{word}`" in STATUS
