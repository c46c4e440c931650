"""Liger's kernels stand for what a model computes, found by numbers, and can be taken out again.

They run in Triton's interpreter, in a process of their own: it has to be asked for before a kernel is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from finetune_trainer.model.fused_kernels import can_fuse

pytestmark = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="on Linux only")
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
CASES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Cohere2": {},
    "GptOss": {"head_dim": 8, **EXPERTS},
}
REPLACED = {
    # Norms, gated units, rotary embeddings, in four layers.
    "Llama": [9, 4, True],
    # Of queries and keys as well.
    "Qwen3": [17, 4, True],
    # Weights around 0; a unit of another kind.
    "Gemma2": [17, 0, True],
    # Norms that subtract a mean; embeddings of neighbours.
    "Cohere2": [0, 4, False],
    # Experts; cosines of half the size.
    "GptOss": [9, 0, False],
}
CLOSE = {"float32": 1e-5, "float16": 2e-2}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What each case came to."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.trainer.model.kernel_processes", json.dumps(CASES)],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return measured


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", CLOSE)
def test_kernels_stand_for_what_they_compute_and_for_nothing_else(found: dict[str, Any], kind: str, dtype: str) -> None:
    case = found[kind][dtype]
    assert case["replaced"] == REPLACED[kind]
    assert max(case["apart"]) <= CLOSE[dtype]
    assert case["undone"]


@pytest.mark.parametrize("kind", CASES)
def test_the_gate_measures_the_model_with_them(found: dict[str, Any], kind: str) -> None:
    assert found[kind]["gate"] == ["SharedPrefix", ""]


def test_what_clamps_drops_or_is_given_more_stays_as_it_is(found: dict[str, Any]) -> None:
    assert found["others"] == ["_Unit", "_OfAnotherLayer"], "of the last the one without a limit"


def test_they_are_for_gpus() -> None:
    assert not can_fuse(torch.device("cpu"))
    assert can_fuse(torch.device("cuda"))
