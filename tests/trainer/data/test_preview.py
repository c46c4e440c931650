"""The preview is the training's own text, tokens and mask, and needs nothing but tokenizer and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from finetune_api.defaults import effective_job
from finetune_api.job import FineTuneJob
from finetune_api.load import load_job
from finetune_api.outcome import Reason
from finetune_trainer.data.dataset import prepare
from finetune_trainer.data.preview import PreviewRow, preview_rows
from finetune_trainer.errors import JobError
from finetune_trainer.inputs import data_source, load_model_inputs
from tests.models import smollm2_folder
from tests.trainer.run.tiny_job import CHATML, rows, write_rows

PLAIN = {
    "system": "{instruction}\n",
    "user": "Q: {instruction}\nA:\n",
    "assistant": "{instruction}\nEND\n",
}
"""No special token, and a seam that newlines straddle."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """SmolLM2's folder without its weights."""
    folder = tmp_path / "model"
    shutil.copytree(smollm2_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    assert not list(folder.glob("*.safetensors"))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))


def job_of(model: Path, data: list[dict[str, Any]], **spec: Any) -> FineTuneJob:
    """A job on `data`."""
    path = write_rows(model.parent / "train.jsonl", data)
    fields = {
        "model_id": str(model),
        "train_path": str(path),
        "task": "instruction_tuning",
        "generation_config": {"prompt_format": CHATML},
        "output": {"uri": str(model.parent / "out")},
        **spec,
    }
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "seen"}}
    loaded = load_job(yaml.safe_dump(manifest | {"spec": fields}), source="job.yaml")
    assert loaded.job is not None, loaded.errors
    return effective_job(loaded.job)


def talk(*turns: str) -> dict[str, Any]:
    """A row of user and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}


def shown(model: Path, data: list[dict[str, Any]], count: int = 10, **spec: Any) -> list[PreviewRow]:
    """The preview's rows."""
    found, _ = preview_rows(job_of(model, data, **spec), count)
    return found


@pytest.mark.parametrize("made", [CHATML, PLAIN, {"use_hugging_face_chat_template": True}])
def test_rows_have_the_shapes_and_the_prompt_that_were_promised(model: Path, made: dict[str, Any]) -> None:
    """As `finetune preview` prints them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = [*rows(6), talk("hi", "\n\nhello"), talk("a", "\n\nb", "c", "\n\nd")]
    found = shown(model, data, generation_config={"prompt_format": made})
    assert [row.row for row in found] == list(range(1, 9))
    for row in found:
        assert len(row.loss_mask) == len(row.input_ids)
        assert set(row.loss_mask) == {0, 1}
        assert tokenizer.decode(row.input_ids) == row.text
        assert row.text.startswith(row.inference_prompt)
        assert row.inference_ids == tokenizer(row.inference_prompt, add_special_tokens=False)["input_ids"]
        assert row.input_ids[: len(row.inference_ids)] == row.inference_ids
        assert not any(row.loss_mask[len(row.inference_ids) - 1 : len(row.inference_ids)])
        assert all(row.loss_mask[len(row.inference_ids) :])
        assert "".join(text for text, _ in row.spans) == row.text
        trained = tokenizer.decode([token for token, on in zip(row.input_ids, row.loss_mask, strict=True) if on])
        if not row.notes:
            assert trained == "".join(text for text, on in row.spans if on)


@pytest.mark.parametrize("task", ["instruction_tuning", "causal_lm"])
def test_the_preview_is_what_is_trained_on(model: Path, task: str, tmp_path: Path) -> None:
    """Row by row the same ids and mask as in the tokenized data."""
    job = job_of(model, rows(12), task=task, context_length=64)
    found, _ = preview_rows(job, 12)
    inputs = load_model_inputs(job.spec)
    data = prepare(data_source(job.spec, inputs, job.spec.train_path), tmp_path / "tokenized")
    assert len(data) == len(found) == 12
    for number, row in enumerate(found):
        ids, trained = data.sequences(number)[0]
        assert ids.tolist() == row.input_ids
        assert trained.tolist() == [bool(on) for on in row.loss_mask]


def test_only_the_rows_asked_for_are_read(model: Path) -> None:
    """A bad row behind them does not matter yet."""
    assert len(shown(model, [*rows(3), {"messages": []}], count=3)) == 3


def test_what_is_particular_about_a_row_is_noted(model: Path) -> None:
    """Straddled seams, rows of several sequences, cut rows, rows that would be dropped."""
    made = {"prompt_format": PLAIN}
    plain, split, several = shown(
        model, [talk("a", " b"), talk("a", "\n\nb"), talk("a", "\n\nb", "c", "\n\nd")], generation_config=made
    )
    assert plain.notes == []
    assert any("tokenized again" in note for note in split.notes)
    assert any("2 sequences" in note for note in several.notes)
    cut, dropped = shown(model, [talk("a", "word " * 50), talk("word " * 50, "b")], context_length=24)
    assert len(cut.input_ids) == len(cut.loss_mask) == 24
    assert len(cut.notes) == 1
    assert "to 24 tokens" in cut.notes[0]
    assert sum(cut.loss_mask) > 0
    assert sum(dropped.loss_mask) == 0
    assert any("dropped" in note for note in dropped.notes)


def test_causal_lm_shows_every_token_but_the_first_as_trained(model: Path) -> None:
    """And a prompt all the same, of the last answer or for the next."""
    for made in (CHATML, {"use_hugging_face_chat_template": True}):
        data = [talk("hi", "hello", "so?", "fine"), {"messages": [{"role": "user", "content": "only text"}]}]
        answered, alone = shown(model, data, task="causal_lm", generation_config={"prompt_format": made})
        for row in (answered, alone):
            assert row.loss_mask == [0] + [1] * (len(row.input_ids) - 1)
            assert row.spans == [(row.text, True)]
        assert answered.text.startswith(answered.inference_prompt)
        assert answered.inference_prompt.endswith("so?<|im_end|>\n<|im_start|>assistant\n")
        assert alone.inference_prompt == alone.text + "<|im_start|>assistant\n"


def test_a_bad_row_that_the_job_does_not_allow_is_named_with_its_line(model: Path) -> None:
    """As training would refuse it."""
    with pytest.raises(JobError, match=r"line 2: .*unknown role 'robot'") as caught:
        shown(model, [*rows(1), {"messages": [{"role": "robot", "content": "x"}]}, *rows(1)])
    assert caught.value.reason is Reason.DATA_INVALID


def test_bad_rows_that_the_job_allows_are_passed_over(model: Path) -> None:
    """Their share of the whole file decides, and the first rows are not the file."""
    data = [{"messages": []}, *rows(30)]
    assert [row.row for row in shown(model, data, count=2, max_invalid_row_share=0.05)] == [2, 3]
    with pytest.raises(JobError, match="line 1"):
        shown(model, data[:1], max_invalid_row_share=0.05)


def test_a_row_that_the_template_refuses_is_a_bad_row(model: Path) -> None:
    """In the template's own words."""
    file = model / "chat_template.jinja"
    assert file.exists()
    file.write_text("{{ raise_exception('Only questions, please.') }}")
    with pytest.raises(JobError, match=r"line 1: .*Only questions, please\."):
        shown(model, rows(1), generation_config={"prompt_format": {"use_hugging_face_chat_template": True}})


def test_warnings_about_format_and_tokenizer_come_along(model: Path) -> None:
    """`</s>` is ordinary text to SmolLM2."""
    made = CHATML | {"assistant": "<|im_start|>assistant\n{instruction}</s>\n"}
    _, warnings = preview_rows(job_of(model, rows(1), generation_config={"prompt_format": made}), 1)
    assert any("'</s>'" in warning and "'<|im_end|>'" in warning for warning in warnings)


def test_a_row_with_two_bos_says_so(model: Path) -> None:
    """One of the format's and one of its own."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    made = CHATML | {"bos": "<|im_start|>", "user": "{instruction}"}
    one, two = shown(model, [talk("a", "b"), talk("<|im_start|>a", "b")], generation_config={"prompt_format": made})
    assert [note for note in one.notes if "two BOS" in note] == []
    assert [note for note in two.notes if "two BOS" in note] != []


def test_a_template_that_ends_no_answer_is_warned_about(model: Path) -> None:
    """And one that ends it with another token than the eos is not: the adapter gets that stop."""
    file = model / "chat_template.jinja"
    template = {"prompt_format": {"use_hugging_face_chat_template": True}}
    for eos, wrong in (("<|im_end|>", False), ("", True)):
        file.write_text(file.read_text().replace("<|im_end|>", eos))
        _, warnings = preview_rows(job_of(model, rows(1), generation_config=template), 1)
        assert any("never learns to stop" in warning for warning in warnings) is wrong
