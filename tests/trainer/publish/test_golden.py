"""The golden prompts that a run leaves in its adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.quiet import quiet_libraries
from finetune_trainer.storage import read_manifest
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.verify.golden import FILE_LIMIT_BYTES, GOLDEN, PROMPT_LIMIT_TOKENS, GoldenCase, read_golden
from tests.trainer.run.tiny_job import TinyJob, rows, tiny_model, write_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))


def golden(job: TinyJob) -> list[GoldenCase]:
    return read_golden(job.output / "adapter")


def short_job(folder: Path, **spec: Any) -> TinyJob:
    return TinyJob(folder, **{"golden": True, "num_epochs": 1, "learning_rate": 2e-2, **spec})


def plain_greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Token by token, without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cases_are_of_the_validation_data_and_answered_as_plain_peft_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    job = short_job(tmp_path)
    write_rows(tmp_path / "valid.jsonl", rows(40, start=100))
    job.run()
    assert "golden.jsonl holds 10 prompts of" in capsys.readouterr().out
    published = read_manifest(LocalStore(job.output), "adapter")
    assert published is not None
    assert GOLDEN in published.files
    cases = golden(job)
    questions = [row["messages"] for row in rows(40, start=100)]
    tokenizer = AutoTokenizer.from_pretrained(job.output / "adapter")
    for case in cases:
        messages = [message.model_dump() for message in case.messages]
        assert any(messages == question[: len(messages)] for question in questions)
        assert case.prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert case.prompt_ids == tokenizer(case.prompt, add_special_tokens=False)["input_ids"]
    several = sum(len(case.messages) > 2 for case in cases)
    assert 2 <= several <= 8, "both kinds are there"
    assert len({case.prompt for case in cases}) == len(cases) == 10

    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    assert cases[0].base_ids == plain_greedy(base, cases[0].prompt_ids, len(cases[0].base_ids))
    with quiet_libraries():
        model = PeftModel.from_pretrained(base, str(job.output / "adapter")).eval()
    assert cases[0].ids == plain_greedy(model, cases[0].prompt_ids, len(cases[0].ids))
    assert cases[0].dtype == "float32"
    with torch.inference_mode():
        logits = model(torch.tensor([cases[0].prompt_ids])).logits[0, -1]
    assert cases[0].logprobs[0] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)
    best, second = logits.topk(2).values.tolist()
    assert cases[0].margins[0] == pytest.approx(best - second, abs=1e-4)


def test_the_same_run_chooses_the_same_prompts(tmp_path: Path) -> None:
    one, other = short_job(tmp_path / "one"), short_job(tmp_path / "other")
    for job in (one, other):
        job.run()
    assert [case.prompt for case in golden(one)] == [case.prompt for case in golden(other)]


def test_without_validation_data_they_are_of_the_training_data(tmp_path: Path) -> None:
    job = short_job(tmp_path)
    del job.spec["valid_path"]
    job.run()
    assert len(golden(job)) == 10


def test_a_job_that_keeps_its_data_to_itself_has_none(tmp_path: Path) -> None:
    job = short_job(tmp_path, golden=False)
    job.run()
    assert golden(job) == []


def test_a_stop_ends_the_answer_and_is_no_part_of_its_text(tmp_path: Path) -> None:
    endless = short_job(tmp_path / "endless")
    endless.run()
    before = golden(endless)[0]
    assert (before.finish, len(before.ids)) == ("length", 64)
    stop = before.ids[0]
    job = short_job(tmp_path / "ended")
    job.spec["generation_config"]["stopping_tokens"] = [stop]
    job.run()
    case = golden(job)[0]
    assert (case.finish, case.ids, case.text) == ("stop", [stop], "")
    assert stop in case.stop_token_ids


def test_texts_without_an_answer_to_a_user_have_none_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = [{"messages": [{"role": "user", "content": f"A text about {number} things."}]} for number in range(8)]
    write_rows(tmp_path / "train.jsonl", text)
    job = short_job(tmp_path, task="causal_lm")
    del job.spec["valid_path"]
    job.run()
    assert golden(job) == []
    assert "golden.jsonl is left out" in capsys.readouterr().out


def test_rows_that_are_too_long_are_passed_over(tmp_path: Path) -> None:
    found = rows(6)
    for row in found[1:]:
        row["messages"].insert(0, {"role": "user", "content": "long " * 300})
        row["messages"].insert(1, {"role": "assistant", "content": "yes"})
    write_rows(tmp_path / "train.jsonl", found)
    job = short_job(tmp_path, context_length=128, max_dropped_row_share=0.9)
    del job.spec["valid_path"]
    job.run()
    (case,) = golden(job)
    assert len(case.prompt_ids) < 128 < PROMPT_LIMIT_TOKENS
    assert (job.output / "adapter" / GOLDEN).stat().st_size < FILE_LIMIT_BYTES


def test_the_tokenizers_own_template_has_them_too(tmp_path: Path) -> None:
    job = short_job(tmp_path, generation_config={"prompt_format": {"use_hugging_face_chat_template": True}})
    job.run()
    assert all("You are a helpful AI assistant" in case.prompt or "Be brief." in case.prompt for case in golden(job))


def test_a_model_that_cannot_be_asked_still_has_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune_trainer.model.greedy import Greedy

    def fail(*_: object) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(Greedy, "answer", fail)
    job = short_job(tmp_path)
    assert job.run().succeeded
    assert "since this model cannot be asked while it is in memory (no such operator)" in capsys.readouterr().out
    assert load_file(job.output / "adapter" / "adapter_model.safetensors")
    assert GOLDEN not in json.loads((job.output / "adapter" / "manifest.json").read_text())["files"]
