"""Which models need no generation_config, by any spelling of their id, and which do although they look alike."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.native_models import native_generation_config
from tests.api.formats import LLAMA_3, MISTRAL, NATIVE_MODELS, native_format

LLAMA_3_MODELS = [name for name in NATIVE_MODELS if name.startswith(("meta-llama/Meta-Llama-3", "meta-llama/Llama-3"))]
LLAMA_3_STOPS = ["<|end_of_text|>", "<|eot_id|>"]

SAFE = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid harmful, unethical, "
    "prejudiced, or negative content. Ensure replies promote fairness and positivity."
)

LLAMA_2_KEYS: dict[str, Any] = {
    "system": "<<SYS>>\n{instruction}\n<</SYS>>\n\n",
    "user": "[INST] {system}{instruction} [/INST]",
    "assistant": " {instruction} </s><s>",
    "system_in_user": True,
}
MISTRAL_KEYS: dict[str, Any] = {
    "system": "{instruction} + ",
    "user": "[INST] {system}{instruction} [/INST]",
    "assistant": "{instruction}</s> ",
    "system_in_user": True,
}
GEMMA_KEYS: dict[str, Any] = {
    "user": "<start_of_turn>user\n{system}{instruction}<end_of_turn>\n",
    "assistant": "<start_of_turn>model\n{instruction}<end_of_turn>\n",
    "trailing_assistant": "<start_of_turn>model\n",
    "system_in_user": True,
}
FALCON_KEYS: dict[str, Any] = {
    "system": "<|prefix_begin|>{instruction}<|prefix_end|>",
    "user": "<|prompter|>{instruction}<|endoftext|>",
    "assistant": "<|assistant|>{instruction}<|endoftext|>",
    "trailing_assistant": "<|assistant|>",
}
FALCON_STOPS = ["<|prompter|>", "<|assistant|>", "<|endoftext|>"]

# As published: every key that differs from the format's defaults, and the stops.
PUBLISHED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("meta-llama/Llama-2-7b-chat-hf", LLAMA_2_KEYS, []),
    ("codellama/CodeLlama-34b-Instruct-hf", LLAMA_2_KEYS, []),
    ("mistralai/Mistral-7B-Instruct-v0.1", MISTRAL_KEYS, []),
    ("mistralai/Mixtral-8x7B-Instruct-v0.1", {**MISTRAL_KEYS, "default_system_message": SAFE}, []),
    (
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        {
            "system": "{instruction}\n\n ",
            "user": "[INST] {system}{instruction} [/INST]",
            "assistant": "{instruction} </s> ",
            "bos": "<s> ",
            "system_in_user": True,
            "default_system_message": SAFE,
        },
        [],
    ),
    ("google/gemma-2-27b-it", {**GEMMA_KEYS, "system": "{instruction} + ", "bos": "<bos>"}, ["<end_of_turn>"]),
    ("google/gemma-7b-it", {**GEMMA_KEYS, "system": "{instruction}\n"}, ["<end_of_turn>"]),
    (
        "HuggingFaceH4/zephyr-7b-beta",
        {
            "system": "<|system|>\n{instruction}</s>\n",
            "user": "<|user|>\n{instruction}</s>\n",
            "assistant": "<|assistant|>\n{instruction}</s>\n",
            "trailing_assistant": "<|assistant|>\n",
        },
        [],
    ),
    ("OpenAssistant/falcon-7b-sft-top1-696", FALCON_KEYS, FALCON_STOPS),
    ("OpenAssistant/falcon-40b-sft-top1-560", FALCON_KEYS, FALCON_STOPS),
    (
        "databricks/dbrx-instruct",
        {
            "system": "<|im_start|>system\n{instruction}<|im_end|>\n",
            "user": "<|im_start|>user\n{instruction}<|im_end|>\n",
            "assistant": "<|im_start|>assistant\n{instruction}<|im_end|>\n",
            "trailing_assistant": "<|im_start|>assistant\n",
        },
        [],
    ),
    (
        # The published assistant text is amended so that it begins with the published trailing_assistant.
        "codellama/CodeLlama-70b-Instruct-hf",
        {
            "system": "Source: system\n\n {instruction} <step> ",
            "user": "Source: user\n\n {instruction} <step> ",
            "assistant": "Source: assistant\nDestination: user\n\n {instruction} <step> ",
            "trailing_assistant": "Source: assistant\nDestination: user\n\n ",
        },
        ["<step>"],
    ),
    (
        "amazon/LightGPT",
        {
            "system": "{instruction}\n",
            "user": "### Instruction:\n{instruction}\n",
            "assistant": "### Response:\n{instruction}\n",
            "trailing_assistant": "### Response:\n",
        },
        ["### Response:", "### End"],
    ),
]


@pytest.mark.parametrize(("model_id", "keys", "stops"), PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_a_published_format_is_kept_to_the_letter(model_id: str, keys: dict[str, Any], stops: list[str]) -> None:
    config = native_generation_config(model_id)
    assert config is not None
    assert native_format(model_id).model_dump(exclude_defaults=True) == keys
    assert config.stopping_sequences == stops


@pytest.mark.parametrize("model_id", LLAMA_3_MODELS)
def test_llama_3_and_its_successors_have_the_guides_format(model_id: str) -> None:
    config = native_generation_config(model_id)
    assert config is not None
    assert config.prompt_format == LLAMA_3
    assert config.stopping_sequences == LLAMA_3_STOPS


def test_mistral_7b_has_the_guides_format() -> None:
    assert native_format("mistralai/Mistral-7B") == MISTRAL


def test_every_native_model_is_in_one_of_these_tables() -> None:
    tabled = [*(case[0] for case in PUBLISHED), *LLAMA_3_MODELS, "mistralai/Mistral-7B"]
    others = [name for name in NATIVE_MODELS if name not in tabled]
    assert others == ["meta-llama/Llama-2-13b-chat-hf", "meta-llama/Llama-2-70b-chat-hf"]
    assert {native_format(name) == native_format("meta-llama/Llama-2-7b-chat-hf") for name in others} == {True}


@pytest.mark.parametrize("model_id", NATIVE_MODELS)
def test_case_does_not_matter(model_id: str) -> None:
    config = native_generation_config(model_id)
    assert config is not None
    assert native_generation_config(model_id.lower()) == native_generation_config(model_id.upper()) == config


@pytest.mark.parametrize(
    "model_id",
    [
        # The guide: "Llama-Guard-2 does not have defaults".
        "meta-llama/Meta-Llama-Guard-2-8B",
        "meta-llama/LlamaGuard-7b",
        # Their formats are not published.
        "mistralai/Mistral-7B-Instruct-v0.3",
        "mistralai/Mistral-7B-Instruct-v0.2",
        "mistralai/Mistral-7B-v0.1",
        "mistralai/Mistral-Nemo-Instruct-2407",
        "meta-llama/Llama-2-7b-hf",
        "meta-llama/Llama-2-13b-hf",
        "meta-llama/Llama-2-70b-hf",
        "meta-llama/Llama-2-7b-chat",
        "meta-llama/Llama-3.2-11B-Vision-Instruct",
        "google/gemma-2-9b-it",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        # Look-alikes
        "Meta-Llama-3-8B-Instruct",
        "someone/Meta-Llama-3-8B-Instruct",
        "meta-llama/Meta-Llama-3-8B-Instruct-finetuned",
        "meta-llama/Meta-Llama-3-8B-Instruct/",
        "meta-llama/Meta-Llama-3-8B-Instruct\n",
        "meta-llama/Llama-3x1-8B",
        "./meta-llama/Meta-Llama-3-8B-Instruct",
        "/models/meta-llama/Meta-Llama-3-8B-Instruct",
        "s3://bucket/meta-llama/Meta-Llama-3-8B-Instruct",
        "",
    ],
)
def test_other_models_have_no_format_of_their_own(model_id: str) -> None:
    assert native_generation_config(model_id) is None
