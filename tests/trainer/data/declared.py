"""generation_configs that the tests of stops and of warnings start from."""

from __future__ import annotations

from typing import Any

from finetune_api.generation import GenerationConfig
from finetune_api.prompt_format import HuggingFaceChatTemplate, PromptFormat

TEMPLATE = GenerationConfig(prompt_format=HuggingFaceChatTemplate(use_hugging_face_chat_template=True))
"""The tokenizer's own chat template."""


def declared(stops: list[str] | None = None, **fields: Any) -> GenerationConfig:
    """A pass-through format with `fields` changed."""
    template = dict.fromkeys(("system", "user", "assistant"), "{instruction}")
    return GenerationConfig(prompt_format=PromptFormat(**{**template, **fields}), stopping_sequences=stops or [])


def named(made: PromptFormat, *stops: str) -> GenerationConfig:
    """A format with its stopping sequences."""
    return GenerationConfig(prompt_format=made, stopping_sequences=list(stops))
