"""What counts as a fault, and what becomes of the results in the document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.architectures.record import Record
from tests.architectures.report import document, summary
from tests.architectures.results import Results

GOOD = Record(
    "llama",
    "llama",
    causal=True,
    outcome="trained",
    losses=[6.0, 4.0],
    layout="SharedPrefix",
    first_loss_difference=1e-8,
    last_loss_difference=1e-8,
    reload_difference=0.0,
    effect=0.5,
    merged_difference=1e-6,
    resumed_difference=0.0,
    layers={"q_proj": 4, "v_proj": 4},
    share=0.25,
    weights_were_read=True,
)
REFUSED = Record("reformer", "reformer", upstream="ValueError: no", outcome="refused", sentence="No.", reason="Invalid")
ENCODER = Record(
    "bert (is_decoder: false)", "bert", why_not="it sees the answer", outcome="refused", sentence="It sees."
)


def test_all_well() -> None:
    assert GOOD.faults() == REFUSED.faults() == ENCODER.faults() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"losses": [4.0, 4.5]}, "the loss does not fall"),
        ({"losses": [4.0, float("nan")]}, "the loss does not fall"),
        ({"lost_tensors": ["a"]}, "1 tensors are lost on reload, first a"),
        ({"first_loss_difference": 1e-3}, "first loss: off by 1e-03"),
        ({"last_loss_difference": float("nan")}, "last loss: off by nan"),
        ({"reload_difference": None}, "reloaded logits: not measured"),
        ({"merged_difference": 0.3}, "merged logits: off by 3e-01"),
        ({"resumed_difference": 1e-4}, "resumed adapter: off by 1e-04"),
        ({"launched_difference": 1e-4}, "launched adapter: off by 1e-04"),
        ({"effect": 0.0}, "the adapter changes nothing"),
        ({"errors": ["resumed: no"]}, "resumed: no"),
        ({"causal": False}, "trains, and should not"),
        ({"upstream": "an error"}, "trains, and should not: an error"),
        ({"outcome": "failed", "sentence": "KeyError: 1"}, "fails: KeyError: 1"),
        ({"outcome": "refused", "sentence": "Not this one."}, "is refused, and could train"),
    ],
)
def test_what_is_wrong_with_a_type_that_should_train(change: dict[str, Any], fault: str) -> None:
    assert any(fault in found for found in replace(GOOD, **change).faults())


@pytest.mark.parametrize("change", [{"sentence": "Two\nlines."}, {"reason": "InternalError"}, {"sentence": "x" * 700}])
def test_a_refusal_is_one_sentence(change: dict[str, Any]) -> None:
    assert "is not refused with one sentence" in replace(REFUSED, **change).faults()[0]


def test_the_document_counts_the_types_and_shows_each() -> None:
    padded = replace(GOOD, name="gpt2", model_type="gpt2", layout="Padded", merged_difference=0.3)
    text = document([GOOD, padded, REFUSED, ENCODER])
    assert "| train with the defaults | 2 |" in text
    assert "| train with the defaults, and everything below is exact | 1 |" in text
    assert "| merged is equal | 1 |" in text
    assert "| llama | SharedPrefix | q v | 25% | yes |" in text
    assert "| gpt2 | Padded | q v | 25% | merged logits: off by 3e-01 |" in text
    assert "| reformer | No. | ValueError: no " in text
    assert "| bert (is_decoder: false) | yes | It sees. |" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert any(line.endswith("train with the defaults") for line in summary([GOOD]))


def test_results_are_found_again(tmp_path: Path) -> None:
    from tests.architectures.cases import CASES

    results = Results(tmp_path)
    results.keep(GOOD)
    assert results.found([CASES["llama"], CASES["gpt2"]]) == {"llama": GOOD}
