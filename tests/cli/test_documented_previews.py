"""Rendered rows that docs/users.md shows are what `finetune preview` prints: a reader copies formats from there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests import real_tokenizers
from tests.cli.command import finetune

PAGE = (Path(__file__).parents[2] / "docs" / "users.md").read_text()
SECTION = PAGE.partition("\n## Prompt formats by example\n")[2].partition("\n## ")[0]
BLOCK = re.compile(r"^```(json|yaml|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TOKENIZERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama_3",
    "meta-llama/Meta-Llama-Guard-2-8B": "llama_3",
    # Llama 2's cannot be had without its licence.
    "meta-llama/Llama-2-7b-chat-hf": "mistral",
    "mistralai/Mistral-7B-v0.1": "mistral",
}


class Example(NamedTuple):
    """A job, the row of its data, and what the page says is printed."""

    title: str
    row: str
    job: str
    printed: str


def _examples() -> Iterator[Example]:
    row = job = title = ""
    for part in re.split(r"^(?=### )", SECTION, flags=re.MULTILINE):
        title = part.partition("\n")[0].removeprefix("### ")
        for kind, text in BLOCK.findall(part):
            if kind == "json":
                row = text
            elif kind == "yaml":
                job = text
            else:
                yield Example(title, row, job, text)


EXAMPLES = list(_examples())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each tokenizer: all that a preview reads of a model."""
    from transformers import LlamaConfig

    folders = {}
    for name in set(TOKENIZERS.values()):
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer = getattr(real_tokenizers, name)().tokenizer
        tokenizer.save_pretrained(folders[name])
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_the_page_shows_what_is_printed(example: Example, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(example.row)
    model = models[TOKENIZERS[yaml.safe_load(example.job)["model_id"]]]
    places = {"train_path": tmp_path / "train.jsonl", "initial_base_model_ckpt_path": model}
    # What the page leaves out, so that nothing is warned of but what is shown.
    unsaid = {"task": "instruction_tuning", "lora_config": "{r: 8}"}
    text = "".join(f"{key}: {value}\n" for key, value in unsaid.items() if f"\n{key}:" not in example.job)
    job = tmp_path / "job.yaml"
    job.write_text(example.job + text + "".join(f"{key}: {value}\n" for key, value in places.items()))
    result = finetune("preview", str(job))
    assert result.exit_code == 0, result.output
    warnings = result.stderr.replace(str(job), "job.yaml")
    legend = "The model learns to produce ⟦what looks like this⟧.\n\n"
    assert warnings + result.stdout.removeprefix(legend) == example.printed


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 9
