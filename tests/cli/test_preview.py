"""`finetune preview`: what programs read of it, and what people see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import EXIT_CODES, Reason
from tests.cli.command import finetune, finetune_json
from tests.models import smollm2_folder

JOB = {
    "model_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "task": "instruction_tuning",
    "lora_config": {"r": 8},
    "generation_config": {
        "prompt_format": {
            "system": "<|im_start|>system\n{instruction}<|im_end|>\n",
            "user": "<|im_start|>user\n{instruction}<|im_end|>\n",
            "assistant": "<|im_start|>assistant\n{instruction}<|im_end|>\n",
            "trailing_assistant": "<|im_start|>assistant\n",
        }
    },
}
TURNS = [("user", "What is 1+1?"), ("assistant", "2"), ("user", "And 2+2?"), ("assistant", "4 {{ x }}")]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of two rows on a model folder that has no weights."""
    model = tmp_path / "model"
    shutil.copytree(smollm2_folder(), model, ignore=shutil.ignore_patterns("*.safetensors"))
    row = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    places = {"train_path": str(tmp_path / "train.jsonl"), "initial_base_model_ckpt_path": str(model)}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(JOB | places))
    return path


def test_json_has_the_text_the_tokens_the_mask_and_the_prompt(job: Path) -> None:
    rows: list[dict[str, Any]] = finetune_json("preview", str(job), "--rows", "5")
    assert [row["row"] for row in rows] == [1, 3]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    for row in rows:
        assert set(row) == {"row", "text", "input_ids", "loss_mask", "inference_prompt", "inference_ids"}
        assert tokenizer.decode(row["input_ids"]) == row["text"]
        assert len(row["loss_mask"]) == len(row["input_ids"])
        trained = [token for token, mask in zip(row["input_ids"], row["loss_mask"], strict=True) if mask]
        assert tokenizer.decode(trained) == "2<|im_end|>\n4 {{ x }}<|im_end|>\n"
        assert row["text"].startswith(row["inference_prompt"])
        assert row["inference_prompt"].endswith("And 2+2?<|im_end|>\n<|im_start|>assistant\n")
        assert row["input_ids"][: len(row["inference_ids"])] == row["inference_ids"]
        assert tokenizer(row["inference_prompt"], add_special_tokens=False)["input_ids"] == row["inference_ids"]


def test_no_more_rows_than_asked_for_are_shown(job: Path) -> None:
    assert len(finetune_json("preview", str(job), "-n", "1")) == 1


def test_without_colours_the_trained_part_stands_in_brackets(job: Path) -> None:
    result = finetune("preview", str(job))
    assert result.exit_code == 0
    assert "⟦2<|im_end|>\n⟧" in result.stdout
    assert "line 3: " in result.stdout


def test_a_row_that_is_cut_says_so(job: Path) -> None:
    result = finetune("preview", str(job), "--set", "context_length=20")
    assert "cut from" in result.stdout
    assert len(finetune_json("preview", str(job), "--set", "context_length=20")[0]["input_ids"]) == 20


def test_bad_rows_end_it_with_the_trainers_sentence_and_code(job: Path) -> None:
    (job.parent / "train.jsonl").write_text('{"messages": []}\n')
    result = finetune("preview", str(job))
    assert result.exit_code == EXIT_CODES[Reason.DATA_INVALID]
    assert "line 1" in result.stderr


def test_a_tag_that_is_no_special_token_is_a_warning(job: Path) -> None:
    result = finetune(
        "preview",
        str(job),
        "--set",
        'generation_config.prompt_format.assistant="<|im_start|>assistant\\n{instruction}</s>"',
    )
    assert result.exit_code == 0
    assert "'</s>' in the assistant text is no special token" in result.stderr
    assert "'<|im_end|>'" in result.stderr
