"""What a job's author is warned of before a row is tokenized."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune_api.generation import GenerationConfig
from finetune_api.native_models import native_generation_config
from finetune_api.outcome import Reason
from finetune_api.prompt_format import PromptFormat
from finetune_trainer.data.format_warnings import format_warnings
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.errors import JobError
from tests.api.formats import GUARD_2, GUARD_2_END_OF_TEXT, LLAMA_3, MISTRAL
from tests.real_tokenizers import llama_3, mistral, published_templates, smollm2, with_template
from tests.trainer.data.declared import TEMPLATE, declared, named
from tests.trainer.run.tiny_job import CHATML

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
    (smollm2, TEMPLATE),
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
    assert format_warnings(tokenizer(), generation) == []


WARNED: list[tuple[Callable[[], ModelTokenizer], GenerationConfig, list[str]]] = [
    # The guide's own example: </s> means nothing to Llama 3's tokenizer.
    (llama_3, named(GUARD_2, "</s>"), ["'</s>'", "no special token", "'<|end_of_text|>'"]),
    (smollm2, declared(assistant="{instruction}</s>"), ["'</s>'", "'<|im_end|>'"]),
    (mistral, declared(assistant="{instruction}<|eot_id|>"), ["'<|eot_id|>'", "'</s>'"]),
    (llama_3, declared(assistant="{instruction} END"), ["' END'", "stopped by text", "'<|end_of_text|>'"]),
    (llama_3, declared(assistant="{instruction}<|eot_id|>", bos="<s>"), ["bos '<s>'", "'<|begin_of_text|>'"]),
]


@pytest.mark.parametrize(("tokenizer", "generation", "words"), WARNED)
def test_a_format_that_does_not_fit_is_warned_about_with_the_alternative(
    tokenizer: Callable[[], ModelTokenizer], generation: GenerationConfig, words: list[str]
) -> None:
    """One sentence: what the text is to this tokenizer, and what it has instead."""
    (warning,) = format_warnings(tokenizer(), generation)
    assert [word for word in words if word not in warning] == []
    assert warning.endswith(".")


ANSWER = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}END{% endif %}{% endfor %}"
)
"""A chat template; END stands for what it writes after an answer."""


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("{{ eos_token }}", []),
        ("\n<|im_end|>", []),
        ("", ["writes nothing after an answer", "never learns to stop", "ends with '<|im_end|>'"]),
        ("{{ ' \n' }}", ["writes nothing after an answer"]),
        ("{% if messages[0]['role'] != 'system' %}{{ eos_token }}{% endif %}", ["in some conversations nothing"]),
        ("</s>", ["'</s>' in the tokenizer's chat template is no special token", "stopped by text"]),
    ],
)
def test_a_chat_template_that_teaches_no_stop_is_warned_about(end: str, words: list[str]) -> None:
    """As is one that spells its stop out."""
    found = format_warnings(with_template(smollm2(), ANSWER.replace("END", end)), TEMPLATE)
    assert len(found) == bool(words)
    assert [word for word in words if word not in found[0]] == []


def test_a_declared_stop_that_the_template_writes_needs_no_warning() -> None:
    """Not even a line break, where the user says that it ends an answer."""
    model = with_template(smollm2(), ANSWER.replace("END", "{{ '\n' }}"))
    assert format_warnings(model, TEMPLATE) != []
    assert format_warnings(model, TEMPLATE.model_copy(update={"stopping_sequences": ["\n"]})) == []


def test_of_published_templates_only_one_that_ends_no_answer_is_warned_about() -> None:
    """GLM's models stop at the next message's <|user|>, which no answer is trained with."""
    warned, refused = set(), dict[str, str]()
    for name, model in published_templates().items():
        try:
            told = format_warnings(model, TEMPLATE)
        except JobError as error:
            refused[name] = error.message
        else:
            warned |= {name for sentence in told if "never learns to stop" in sentence}
    assert warned == {"glm4moe"}
    # They take lists of parts only.
    assert set(refused) == {"idefics3", "llava_next", "smolvlm"}
    assert [name for name, sentence in refused.items() if "plain text" not in sentence] == []


def test_a_chat_template_without_the_bos_of_its_tokenizer_is_warned_about() -> None:
    """Its text is what servers prompt with, so it is trained on; the user should know."""
    without = with_template(mistral(), ANSWER.replace("{{ bos_token }}", "").replace("END", "</s>"))
    (warning,) = format_warnings(without, TEMPLATE)
    assert "'<s>'" in warning
    assert format_warnings(with_template(mistral(), ANSWER.replace("END", "</s>")), TEMPLATE) == []
    assert format_warnings(with_template(mistral(), "{{ raise_exception('no') }}"), TEMPLATE) == []


def test_a_chat_template_that_is_not_there_is_refused() -> None:
    """Before any data is fetched."""
    with pytest.raises(JobError) as caught:
        format_warnings(llama_3(), TEMPLATE)
    assert caught.value.reason is Reason.INVALID_SPEC
