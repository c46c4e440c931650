"""What readers look up is there: every reason with what to do about it, every metric, and values that the chart has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from finetune_api.outcome import EXIT_CODES, Reason, is_retryable
from finetune_api.status import ConditionType, Phase
from finetune_operator.policy.reasons import OperatorReason, VerificationReason
from finetune_operator.serving.metrics import Metrics

ROOT = Path(__file__).parents[2]
STATUS = (ROOT / "docs" / "reference" / "status.md").read_text()
PLATFORM = (ROOT / "docs" / "platform.md").read_text()

WAITS, ATTEMPT, FAILED = "Reasons why a job waits", "Reasons why an attempt ended", "Reasons why a job failed"

SAID = [reason for reason in Reason if reason is not Reason.TERMINATED]
"""A pod that was told to stop becomes an attempt that was Disrupted or Suspended."""

SEEN = {str(reason) for reason in (*OperatorReason, *SAID)} - {str(phase) for phase in Phase}


def rows(section: str) -> dict[str, list[str]]:
    """Cells of the section's table by the word in the first one."""
    text = STATUS.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {first.strip("`"): rest for first, *rest in cells}


REASONS = {section: rows(section) for section in (WAITS, ATTEMPT, FAILED)}


@pytest.mark.parametrize("reason", sorted(SEEN))
def test_a_reason_has_what_happened_and_a_cure_wherever_it_stands(reason: str) -> None:
    found = [table[reason] for table in REASONS.values() if reason in table]
    assert found
    for *_, happened, cure in found:
        assert happened.endswith(".")
        assert len(cure.split()) >= 3


@pytest.mark.parametrize("reason", SAID)
def test_a_reason_stands_where_its_exit_code_puts_it(reason: Reason) -> None:
    assert str(reason) in REASONS[ATTEMPT if is_retryable(EXIT_CODES[reason]) else FAILED]


def test_no_reason_is_explained_that_nobody_gives() -> None:
    assert {reason for table in REASONS.values() for reason in table} - SEEN - {str(Phase.SUSPENDED)} == set()


def test_every_reason_of_a_verification_is_explained() -> None:
    table = rows("Reasons of Verified")
    assert set(table) == {str(reason) for reason in VerificationReason}
    for state, happened, cure in table.values():
        assert state.strip("`") in ("True", "False", "Unknown")
        assert happened.endswith(".")
        assert len(cure.split()) >= 3


def test_every_condition_is_explained() -> None:
    assert set(rows("Conditions")) == {str(kind) for kind in ConditionType}


def test_every_phase_is_explained() -> None:
    assert set(rows("Phases")) == {str(phase) for phase in Phase}


def test_every_metric_is_explained() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    names = {metric.name for metric in registry.collect() if metric.name.startswith("finetune_")}
    assert sorted(name for name in names if f"`{name}" not in PLATFORM) == []


VALUES = ("crds", "image", "global", "metrics", "networkPolicy", "rbac", "settings", "trainer")


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(rf"`((?!metrics\.jsonl)(?:{'|'.join(VALUES)})\.\w+(?:\.\w+)*)`", PLATFORM)))
)
def test_a_value_that_is_named_is_one_of_the_charts(path: str) -> None:
    value = yaml.safe_load((ROOT / "helm" / "finetune-operator" / "values.yaml").read_text())
    for key in path.split("."):
        assert key in value
        value = value[key]
