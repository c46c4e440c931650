"""Prompt formats and conversations that the tests of rendering start from, and random ones for universal rules."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from finetune_api.native_models import native_generation_config
from finetune_api.prompt_format import Message, PromptFormat

APART: dict[str, Any] = {
    "system": "<S>{instruction}</S>",
    "user": "<U>{instruction}</U>",
    "assistant": "<A>{instruction}</A>",
}
"""A format that shows where each part begins and ends."""

IN_USER: dict[str, Any] = {**APART, "user": "<U>{system}{instruction}</U>", "system_in_user": True}
"""The same with the system message inside the first user message."""

GUARD_2 = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction} </s>")
"""The guide's pass-through format: the data is formatted already."""

GUARD_2_END_OF_TEXT = PromptFormat(
    system="{instruction}", user="{instruction}", assistant="{instruction}<|end_of_text|>", bos=""
)
"""The same with the end-of-turn that the guide uses in its later text."""

LLAMA_3 = PromptFormat(
    system="<|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{instruction}<|eot_id|>",
    trailing_assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    bos="<|begin_of_text|>",
    system_in_user=False,
    default_system_message="",
)
"""As the guide writes it."""

MISTRAL = PromptFormat(
    system="{instruction} + ",
    user="[INST] {system}{instruction} [/INST]",
    assistant=" {instruction}</s>",
    trailing_assistant="",
    bos="<s>",
    system_in_user=True,
    default_system_message="",
)
"""As the guide writes it."""

NATIVE_MODELS = [
    "meta-llama/Llama-2-7b-chat-hf",
    "meta-llama/Llama-2-13b-chat-hf",
    "meta-llama/Llama-2-70b-chat-hf",
    "codellama/CodeLlama-34b-Instruct-hf",
    "codellama/CodeLlama-70b-Instruct-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Meta-Llama-3-70B",
    "meta-llama/Meta-Llama-3-70B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-70B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B",
    "mistralai/Mistral-7B",
    "mistralai/Mistral-7B-Instruct-v0.1",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "google/gemma-2-27b-it",
    "google/gemma-7b-it",
    "HuggingFaceH4/zephyr-7b-beta",
    "OpenAssistant/falcon-7b-sft-top1-696",
    "OpenAssistant/falcon-40b-sft-top1-560",
    "databricks/dbrx-instruct",
    "amazon/LightGPT",
]
"""Every kind of natively supported model, spelled as the Hub spells it."""


def native_format(model_id: str) -> PromptFormat:
    """The format of a natively supported model."""
    config = native_generation_config(model_id)
    assert config is not None
    assert isinstance(config.prompt_format, PromptFormat)
    return config.prompt_format


FORMATS = {
    "guard 2": GUARD_2,
    "guard 2, end of text": GUARD_2_END_OF_TEXT,
    **{model_id: native_format(model_id) for model_id in NATIVE_MODELS},
}
"""Every published format, by name."""


def system(content: str) -> Message:
    """A system message."""
    return Message("system", content)


def user(content: str) -> Message:
    """A user message."""
    return Message("user", content)


def assistant(content: str) -> Message:
    """An assistant message."""
    return Message("assistant", content)


def plain(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as chat templates take them."""
    return [{"role": message.role, "content": message.content} for message in messages]


_HOSTILE = [
    *("'", '"', "'''", "\\", "\\n", "\\'", "\\u0041", "\\x41", "%s", "${x}"),
    *("{", "}", "{{", "}}", "{%", "%}", "{%-", "-%}", "{#", "#}", "{{-", "-}}", "{% raw %}", "{% endraw %}"),
    *("{instruction}", "{system}", "{{ bos_token }}", "{{ messages }}", "state.text", "none", "~", "|trim"),
    *(" ", "  ", "\n", "\n\n", "\r", "\r\n", "\t", "\x0b", "\x00", "\x1c", "\x7f", "\x85", "\xa0", "\u3000"),
    *("\u2028", "\u2029", "\ufeff", "é", "e\u0301", "中", "😀", "\U0010ffff"),
    *("USER", "ASSISTANT", "BOS", "SYSTEM", "<s>", "</s>", "<s", ">", "<|begin_of_text|>", "<|begin_of"),
]

texts = st.lists(st.sampled_from(_HOSTILE) | st.text(max_size=3), max_size=5).map("".join)
"""Text that an engine for templates may trip over."""


def escaped(literal: str) -> str:
    """`literal` as it is written in a format."""
    return literal.replace("{", "{{").replace("}", "}}")


@st.composite
def prompt_formats(draw: st.DrawFn) -> PromptFormat:
    """A format that is accepted."""
    head, in_user = draw(texts), draw(st.booleans())
    fields = draw(st.permutations(["{system}", "{instruction}"])) if in_user else ["{instruction}"]
    return PromptFormat(
        system=escaped(draw(texts)) + "{instruction}" + escaped(draw(texts)),
        user="".join(escaped(draw(texts)) + field for field in fields) + escaped(draw(texts)),
        assistant=escaped(head) + "{instruction}" + escaped(draw(texts)),
        trailing_assistant=head[: draw(st.integers(0, len(head)))],
        bos=draw(st.sampled_from(["", "<s>", "<s> ", "<|begin_of_text|>"]) | texts),
        system_in_user=in_user,
        default_system_message=draw(st.just("") | texts),
        add_system_tags_even_if_message_is_empty=draw(st.booleans()),
        strip_whitespace=draw(st.booleans()),
    )


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """A conversation of any order of turns whose system message, if it has one, comes first."""
    first = [system(draw(texts))] if draw(st.booleans()) else []
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=5))
    return first + [Message(role, draw(texts)) for role in roles]
