"""The formats that were published, with the texts that their authors assert and show."""

from __future__ import annotations

import pytest

from finetune_api.prompt_format import (
    PromptFormat,
)
from tests.api.formats import (
    FORMATS,
    GUARD_2,
    GUARD_2_END_OF_TEXT,
    LLAMA_3,
    MISTRAL,
    assistant,
    native_format,
    system,
    user,
)

FIVE = [system("hello1"), user("hello2"), assistant("hello3"), user("hello4"), assistant("hello5")]

ASSERTED = [
    (
        "meta-llama/Llama-2-7b-chat-hf",
        "[INST] <<SYS>>\nhello1\n<</SYS>>\n\nhello2 [/INST] hello3 </s><s>[INST] hello4 [/INST] hello5 </s><s>",
    ),
    (
        "mistralai/Mistral-7B-Instruct-v0.1",
        "[INST] hello1 + hello2 [/INST]hello3</s> [INST] hello4 [/INST]hello5</s> ",
    ),
]


@pytest.mark.parametrize(("model_id", "text"), ASSERTED)
def test_renderings_that_llmforges_own_tests_assert(model_id: str, text: str) -> None:
    assert native_format(model_id).render(FIVE).text == text


@pytest.mark.parametrize("name", FORMATS)
def test_the_prompt_for_an_answer_is_a_prefix_of_the_training_text(name: str) -> None:
    made = FORMATS[name]
    whole = made.render(FIVE)
    prompt = made.render_prompt(FIVE[:4])
    assert whole.text.startswith(prompt)
    assert whole.inference_prompt() == prompt
    assert whole.inference_prompt(0) == made.render_prompt(FIVE[:2])


@pytest.mark.parametrize("name", FORMATS)
def test_a_published_format_is_accepted_as_it_would_be_from_a_file(name: str) -> None:
    made = FORMATS[name]
    assert PromptFormat.model_validate(made.model_dump()) == made


@pytest.mark.parametrize("name", set(FORMATS) - {"amazon/LightGPT"})
def test_a_published_format_is_accepted_without_a_warning(name: str) -> None:
    assert FORMATS[name].warnings() == []


def test_the_guides_llama_guard_row_is_concatenated_verbatim() -> None:
    policy = (
        "<|begin_of_text|>[INST] Task: Check if there is unsafe content in 'User' messages ...\n\nO1: Violence.\n\n"
    )
    question = "Provide your safety assessment for ONLY THE LAST User in the above conversation:\n- ... [/INST]"
    row = [system(policy), user(question), assistant("unsafe\nO3")]
    assert GUARD_2.render(row).text == policy + question + "unsafe\nO3 </s>"
    assert GUARD_2.render_prompt(row[:2]) == policy + question
    assert GUARD_2_END_OF_TEXT.render(row).text == policy + question + "unsafe\nO3<|end_of_text|>"
    assert GUARD_2.render(row).with_bos("<|begin_of_text|>").text == GUARD_2.render(row).text


def test_the_guides_llama_3_example() -> None:
    conversation = [
        system("You are a helpful assistant"),
        user("What's the value of 1+1?"),
        assistant("The value is 2"),
    ]
    prompt = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat's the value of 1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert LLAMA_3.render(conversation).text == prompt + "The value is 2<|eot_id|>"
    assert LLAMA_3.render_prompt(conversation[:2]) == prompt


def test_the_guides_mistral_format() -> None:
    assert MISTRAL.render(FIVE).text == ("<s>[INST] hello1 + hello2 [/INST] hello3</s>[INST] hello4 [/INST] hello5</s>")
    assert MISTRAL.render_prompt(FIVE[:2]) == "<s>[INST] hello1 + hello2 [/INST]"
