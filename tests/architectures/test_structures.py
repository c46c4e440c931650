"""One model type of each structure, trained with the defaults; `make models` does the same with all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architectures.cases import CASES
from tests.architectures.record import Record
from tests.architectures.results import Results, results_folder

STRUCTURES = {
    "gpt2": "transposed weights, learned positions",
    "bloom": "positions as biases of attention, fused projections",
    "phi3": "fused gate and up, sliding windows",
    "gemma2": "capped attention and logits",
    "gemma3n_text": "per-layer embeddings, several streams, shared keys and values",
    "gemma4": "experts beside dense layers, layers of different sizes, towers for images and sound",
    "gpt_oss": "attention sinks, experts with biases",
    "qwen2_moe": "experts, a gated shared expert, one dense layer",
    "deepseek_v3": "latent attention, grouped experts",
    "mllama": "cross-attention to images, skipped by text",
    "jamba": "state space beside attention and experts",
    "zamba2": "attention layers that share weights, with low-rank matrices of their own",
    "qwen3_next": "linear attention beside full attention",
    "rwkv": "a recurrent network",
    "laguna": "layers that PEFT renames on loading",
    "stablelm": "layers that hand on no arguments to their attention",
}
"""What differs most, the default layout of each kind among them."""

REFUSED = {
    "bert (is_decoder: false)": "the same without its causal mask",
    "cpmant": "no causal mask at all",
    "bart (BartForConditionalGeneration)": "an embedding under another name",
    "llama (LlamaForSequenceClassification)": "a classifier",
    "musicgen": "no text model",
    "gemma3n": "a companion package is missing",
}


@pytest.fixture(scope="session")
def records() -> dict[str, Record]:
    """All of them, examined by one process that imports everything once and forks.

    What this very code made of them with these libraries is not made again: it takes minutes.
    """
    names = [*STRUCTURES, *REFUSED]
    command = [sys.executable, "-m", "tests.architectures", "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    found = Results(results_folder()).found([CASES[name] for name in names])
    assert found.keys() == set(names), done.stdout[-3000:] + done.stderr[-3000:]
    return found


@pytest.mark.parametrize("name", STRUCTURES)
def test_each_structure_trains_with_the_defaults_and_reloads_exactly(name: str, records: dict[str, Record]) -> None:
    assert records[name].faults() == []
    assert records[name].outcome == "trained"


@pytest.mark.parametrize("name", STRUCTURES)
def test_rows_are_laid_out_as_the_table_of_all_types_says(name: str, records: dict[str, Record]) -> None:
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert f"\n| {name} | {records[name].layout} |" in table


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_not_train_is_refused_in_one_sentence(name: str, records: dict[str, Record]) -> None:
    assert records[name].faults() == []
    assert records[name].outcome == "refused"
