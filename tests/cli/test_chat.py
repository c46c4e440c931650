"""`finetune chat` with a model folder and with an adapter that PEFT itself wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.chat import ChatModel
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
    # As the trainer writes it, for servers; PEFT warns of a key it does not know.
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


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [("none", "There is no folder"), ("empty", "neither an adapter")],
)
def test_a_wrong_folder_is_refused_with_a_sentence(tmp_path: Path, folder: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    result = finetune("chat", str(tmp_path / folder), "-m", "Hello")
    assert result.exit_code == 12
    assert sentence in result.stderr


def test_a_conversation_longer_than_the_model_is_refused(base: Path) -> None:
    result = finetune("chat", str(base), "-m", "word " * 600)
    assert result.exit_code == 15
    assert "make it shorter" in result.stderr
