"""`finetune chat` with a model folder and with an adapter that PEFT itself wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.chat import ChatModel
from finetune_trainer.storage import write_manifest
from tests.cli.command import finetune, finetune_json
from tests.models import random_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that answers otherwise than its base model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    # As other writers leave it; PEFT warns of a key it does not know.
    declared = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(declared | {"context_length": 512}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def _greedy(model: Any, tokenizer: Any, messages: list[dict[str, str]], tokens: int) -> str:
    """What plain transformers answers."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=2)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_answer_is_the_one_that_plain_peft_gives(base: Path, adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (answer,) = finetune_json("chat", str(adapter), "-m", "Hello", "--system", "Be brief.", "--max-new-tokens", "6")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    with pytest.warns(UserWarning, match="context_length"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    assert answer["answer"] == _greedy(model, AutoTokenizer.from_pretrained(adapter), messages, 6)
    assert answer["finish_reason"] == "length"
    assert answer["tokens"] == 6
    assert answer["prompt"].endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_no_adapter_answers_as_the_base_model(base: Path, adapter: Path) -> None:
    def ask(folder: Path, *more: str) -> Any:
        return finetune_json("chat", str(folder), "-m", "Hello", "--max-new-tokens", "6", *more)[0]["answer"]

    assert ask(adapter, "--no-adapter") == ask(base)
    assert ask(adapter) != ask(base)


def test_several_messages_are_one_conversation(base: Path) -> None:
    answers = finetune_json("chat", str(base), "-m", "One", "-m", "Two", "--max-new-tokens", "3")
    assert answers[0]["answer"] in answers[1]["prompt"]
    assert "One" in answers[1]["prompt"]


def test_interactive_json_is_one_line_per_question(base: Path) -> None:
    result = finetune("chat", str(base), "-o", "json", "--max-new-tokens", "2", stdin="One\n\nTwo\n")
    assert [json.loads(line)["message"] for line in result.stdout.splitlines()] == ["One", "Two"]


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(base: Path) -> None:
    free = ChatModel.load(base).answer([{"role": "user", "content": "Hello"}], max_new_tokens=8)
    stop = free.text[3:5]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "stop_strings": [stop]}))
    pieces: list[str] = []
    on_text: Callable[[str], None] = pieces.append
    answer = ChatModel.load(base).answer([{"role": "user", "content": "Hello"}], max_new_tokens=8, on_text=on_text)
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert "".join(pieces) == answer.text


def test_several_messages_are_shown_as_the_conversation_they_are(base: Path) -> None:
    shown = finetune("chat", str(base), "-m", "One", "-m", "Two", "--max-new-tokens", "3").stdout
    assert shown.startswith("user: One\nassistant: ")
    assert "\n\nuser: Two\nassistant: " in shown
    assert "user:" not in finetune("chat", str(base), "-m", "One", "--max-new-tokens", "3").stdout


def test_the_folder_of_a_job_is_as_good_as_the_adapter_in_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "job" / "adapter")
    ask = ("-m", "Hello", "--max-new-tokens", "4")
    answer = finetune_json("chat", str(tmp_path / "job"), *ask)
    assert answer == finetune_json("chat", str(adapter), *ask)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def holding(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content)

    return write


def published(folder: Path) -> None:
    """As a job leaves it, and edited afterwards."""
    write_manifest(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def with_base(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        declared = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(declared | {"base_model_name_or_path": name}))

    return change


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "There is nothing at"),
        (without("adapter_config.json"), "There is no adapter_config.json in"),
        (holding("adapter_config.json", "{"), "adapter_config.json cannot be read: copy the adapter again"),
        (without("adapter_model.safetensors"), "does not fit"),
        (holding("adapter_model.safetensors", "torn"), "does not fit"),
        (without("tokenizer.json"), "The tokenizer in"),
        (holding("tokenizer.json", "{}"), "The tokenizer in"),
        (holding("generation_config.json", "[]"), "generation_config.json is not what it should be"),
        (holding("prompt_format.yaml", "prompt_format: {system: 1}"), "cannot be read as a generation_config"),
        (published, "chat_template.jinja is not as published: copy the adapter again; or remove manifest.json"),
        (with_base("/none"), "correct it with --base-model"),
        (with_base(""), "names no base model: give one with --base-model"),
    ],
)
def test_a_damaged_adapter_is_refused_with_a_sentence(
    adapter: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    damage(folder)
    result = finetune("chat", str(folder), "-m", "Hello")
    assert result.exit_code not in (0, 1, 2), result.output
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "correct --base-model"),
        (without("config.json"), "correct --base-model"),
        (without("model.safetensors"), "check that it is one and that its folder is complete"),
        (holding("model.safetensors", "torn"), "damaged model.safetensors"),
    ],
)
def test_a_damaged_base_model_is_refused_with_a_sentence(
    base: Path, adapter: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    damage(folder)
    result = finetune("chat", str(adapter), "--base-model", str(folder), "-m", "Hello")
    assert result.exit_code not in (0, 1, 2), result.output
    assert sentence in result.stderr


def test_a_base_model_of_another_shape_is_refused_with_a_sentence(adapter: Path, tmp_path: Path) -> None:
    other = random_llama(tmp_path / "wide", hidden=48)
    result = finetune("chat", str(adapter), "--base-model", str(other), "-m", "Hello")
    assert result.exit_code == 10
    assert "give the base model that it was trained on with --base-model" in result.stderr


def test_a_conversation_longer_than_the_model_is_refused(base: Path) -> None:
    result = finetune("chat", str(base), "-m", "word " * 600)
    assert result.exit_code == 15
    assert "make it shorter" in result.stderr
