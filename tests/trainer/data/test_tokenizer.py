"""What is found out about a model's tokenizer, and what its user is warned of, before a row is tokenized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.generation import GenerationConfig
from finetune_api.native_models import native_generation_config
from finetune_api.outcome import Reason
from finetune_api.prompt_format import HuggingFaceChatTemplate, PromptFormat
from finetune_trainer.data.tokenizer import (
    ModelTokenizer,
    automatic_bos,
    load_tokenizer,
    single_token_stops,
    tokenizer_warnings,
)
from finetune_trainer.errors import JobError
from tests.api.formats import GUARD_2, GUARD_2_END_OF_TEXT, LLAMA_3, MISTRAL
from tests.models import smollm2_folder
from tests.real_tokenizers import llama_3, mistral, smollm2
from tests.trainer.run.tiny_job import CHATML


def declared(stops: list[str] | None = None, **fields: Any) -> GenerationConfig:
    """A pass-through format with `fields` changed."""
    template = dict.fromkeys(("system", "user", "assistant"), "{instruction}")
    return GenerationConfig(prompt_format=PromptFormat(**{**template, **fields}), stopping_sequences=stops or [])


def named(made: PromptFormat, *stops: str) -> GenerationConfig:
    """A format with its stopping sequences."""
    return GenerationConfig(prompt_format=made, stopping_sequences=list(stops))


@pytest.mark.parametrize(("tokenizer", "expected"), [(llama_3, "<|begin_of_text|>"), (mistral, "<s>"), (smollm2, None)])
def test_the_bos_is_the_one_the_tokenizer_adds_by_itself(
    tokenizer: Callable[[], ModelTokenizer], expected: str | None
) -> None:
    """SmolLM2 has a BOS token but does not add it."""
    assert automatic_bos(tokenizer().tokenizer) == expected


NOT_WARNED = [
    (llama_3, named(LLAMA_3)),
    (llama_3, native_generation_config("meta-llama/Meta-Llama-3-8B-Instruct")),
    (llama_3, named(GUARD_2_END_OF_TEXT, "<|end_of_text|>")),
    (mistral, named(MISTRAL)),
    (mistral, native_generation_config("meta-llama/Llama-2-7b-chat-hf")),
    (mistral, native_generation_config("HuggingFaceH4/zephyr-7b-beta")),
    (smollm2, named(PromptFormat.model_validate(CHATML), "<|im_end|>")),
    (smollm2, native_generation_config("databricks/dbrx-instruct")),
    # The format itself says that there is no end of turn; it needs no tokenizer for that.
    (smollm2, declared()),
    (smollm2, GenerationConfig(prompt_format=HuggingFaceChatTemplate(use_hugging_face_chat_template=True))),
    (smollm2, declared(assistant="{instruction}\n")),
    # An answer between tags that stops as the model does.
    (llama_3, declared(assistant="<answer>{instruction}</answer><|eot_id|>")),
    (llama_3, declared(assistant="{instruction}\nEND", stops=["END"])),
]


@pytest.mark.parametrize(("tokenizer", "generation"), NOT_WARNED)
def test_a_format_that_fits_the_tokenizer_is_not_warned_about(
    tokenizer: Callable[[], ModelTokenizer], generation: GenerationConfig
) -> None:
    """A warning that is usual is not read."""
    assert tokenizer_warnings(tokenizer(), generation) == []


WARNED: list[tuple[Callable[[], ModelTokenizer], GenerationConfig, list[str]]] = [
    # The guide's own example: </s> means nothing to Llama 3's tokenizer.
    (llama_3, named(GUARD_2, "</s>"), ["'</s>'", "no special token", "'<|end_of_text|>'"]),
    (smollm2, declared(assistant="{instruction}</s>"), ["'</s>'", "'<|im_end|>'"]),
    (mistral, declared(assistant="{instruction}<|eot_id|>"), ["'<|eot_id|>'", "'</s>'"]),
    (llama_3, declared(assistant="{instruction} END"), ["' END'", "nothing stops the model", "'<|end_of_text|>'"]),
    (llama_3, declared(assistant="{instruction}<|eot_id|>", bos="<s>"), ["bos '<s>'", "'<|begin_of_text|>'"]),
]


@pytest.mark.parametrize(("tokenizer", "generation", "words"), WARNED)
def test_a_format_that_does_not_fit_is_warned_about_with_the_alternative(
    tokenizer: Callable[[], ModelTokenizer], generation: GenerationConfig, words: list[str]
) -> None:
    """One sentence: what the text is to this tokenizer, and what it has instead."""
    (warning,) = tokenizer_warnings(tokenizer(), generation)
    assert [word for word in words if word not in warning] == []
    assert warning.endswith(".")


def test_a_chat_template_without_the_bos_of_its_tokenizer_is_warned_about() -> None:
    """Its text is what servers prompt with, so it is trained on; the user should know."""
    generation = GenerationConfig(prompt_format=HuggingFaceChatTemplate(use_hugging_face_chat_template=True))
    model = ModelTokenizer(_with_template(mistral(), "{{ messages[0]['content'] }}"), "<s>")
    (warning,) = tokenizer_warnings(model, generation)
    assert "'<s>'" in warning
    writes_it = ModelTokenizer(_with_template(mistral(), "{{ bos_token }}{{ messages[0]['content'] }}"), "<s>")
    assert tokenizer_warnings(writes_it, generation) == []
    refuses = ModelTokenizer(_with_template(mistral(), "{{ raise_exception('no') }}"), "<s>")
    assert tokenizer_warnings(refuses, generation) == []


def _with_template(model: ModelTokenizer, template: str) -> Any:
    from copy import copy

    tokenizer = copy(model.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


STOPS: list[tuple[Callable[[], ModelTokenizer], GenerationConfig, list[str], list[str]]] = [
    (llama_3, named(LLAMA_3), ["<|eot_id|>"], []),
    (llama_3, named(LLAMA_3, "<|end_of_text|>", "<|eot_id|>"), ["<|end_of_text|>", "<|eot_id|>"], []),
    (llama_3, named(GUARD_2, "</s>"), [], ["</s>"]),
    (llama_3, named(GUARD_2), [], ["</s>"]),
    (mistral, named(GUARD_2, "</s>"), ["</s>"], []),
    (mistral, named(MISTRAL), ["</s>"], []),
    (smollm2, named(PromptFormat.model_validate(CHATML), "<|im_end|>", "\nuser:"), ["<|im_end|>"], ["\nuser:"]),
    # One token, but ordinary text: a stop by id would also end an answer that merely says so.
    (smollm2, declared(assistant="{instruction} stop", stops=["stop"]), [], ["stop"]),
    (smollm2, declared(), [], []),
    (llama_3, declared(assistant="<answer>{instruction}</answer><|eot_id|>"), ["<|eot_id|>"], []),
    # What ends the answer need not look like a tag.
    (smollm2, declared(assistant="{instruction}<repo_name>x"), ["<repo_name>"], []),
]


@pytest.mark.parametrize(("tokenizer", "generation", "ids", "texts"), STOPS)
def test_stops_are_ids_where_they_are_special_tokens_and_else_texts(
    tokenizer: Callable[[], ModelTokenizer], generation: GenerationConfig, ids: list[str], texts: list[str]
) -> None:
    """The end of turn that is trained on is a stop whether or not it is declared as one."""
    model = tokenizer()
    assert single_token_stops(model, generation) == (model.tokenizer.convert_tokens_to_ids(ids), texts)


def test_declared_stopping_tokens_are_kept() -> None:
    """In front of those that were found, each once."""
    eot = llama_3().tokenizer.convert_tokens_to_ids("<|eot_id|>")
    generation = GenerationConfig(prompt_format=LLAMA_3, stopping_tokens=[7, eot])
    assert single_token_stops(llama_3(), generation) == ([7, eot], [])


def test_a_stop_that_is_a_special_token_by_another_spelling_than_tags_is_found() -> None:
    """As DeepSeek's, which is written with full-width bars."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    stop = "<｜end▁of▁sentence｜>"
    backend = type(smollm2().tokenizer.backend_tokenizer).from_str(smollm2().tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(stop, normalized=False, special=True)])
    model = ModelTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=stop), None)
    generation = declared(assistant="{instruction}" + stop)
    assert single_token_stops(model, generation) == ([backend.token_to_id(stop)], [])
    assert tokenizer_warnings(model, generation) == []


def test_a_tokenizer_that_is_published_with_truncation_and_padding_does_neither(tmp_path: Path) -> None:
    """Rows are cut at the job's context length, by us and counted."""
    for file in smollm2_folder().iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<|im_end|>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # Without a BOS, as Qwen's: nothing asks transformers for a plain text on the way.
    config.update(bos_token=None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model = load_tokenizer(tmp_path, trust_remote_code=False)
    for text in ("a b c d e f g", "a"):
        assert model.row_tokenizer().prompt_ids(text) == smollm2().ids(text)
        assert load_tokenizer(tmp_path, trust_remote_code=False).ids(text) == smollm2().ids(text)


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    """What is missing and where."""
    with pytest.raises(JobError) as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


def test_the_fingerprint_tells_tokenizers_apart_and_is_stable() -> None:
    """It is part of the key of cached rows."""
    prints = [model.fingerprint() for model in (llama_3(), mistral(), smollm2())]
    assert len(set(prints)) == 3
    assert smollm2().fingerprint() == prints[2]
    smollm2().tokenizer("a text", truncation=True, max_length=4, padding="max_length")
    assert smollm2().fingerprint() == prints[2]
    assert ModelTokenizer(smollm2().tokenizer, "<|im_start|>").fingerprint() != prints[2]
