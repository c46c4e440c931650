"""docs/serving-results.md is what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.environment import vllm_version
from tests.serving.results import Results

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving-results.md"


def test_the_page_has_the_results_of_today(results: Results, pytestconfig: pytest.Config) -> None:
    if not results.complete or pytestconfig.getoption("--write-serving-results"):
        pytest.skip("some were not measured, or the page is written anew")
    assert PAGE.read_text(encoding="utf-8") == results.markdown(vllm_version()), (
        "write it anew: make serve-test SERVE='--write-serving-results docs/serving-results.md'"
    )
