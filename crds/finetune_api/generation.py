"""generation_config: how conversations become text, and where a model's answer ends."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from finetune_api.fields import SpecModel, Word
from finetune_api.prompt_format import HuggingFaceChatTemplate, PromptFormat
from finetune_api.untyped import FreeObject

_DECLARED, _TOKENIZERS_OWN = "declared", "tokenizers_own"


def _kind(value: Any) -> str:
    if isinstance(value, HuggingFaceChatTemplate):
        return _TOKENIZERS_OWN
    return _TOKENIZERS_OWN if isinstance(value, dict) and "use_hugging_face_chat_template" in value else _DECLARED


class GenerationConfig(SpecModel):
    """How the model is prompted, in training and at inference alike."""

    prompt_format: (
        Annotated[
            Annotated[PromptFormat, Tag(_DECLARED)] | Annotated[HuggingFaceChatTemplate, Tag(_TOKENIZERS_OWN)],
            Discriminator(_kind),
        ]
        | None
    ) = Field(
        default=None,
        description="prompt_format declares the text of each role; or use_hugging_face_chat_template: true takes the "
        "chat template of the model's tokenizer. What it writes after an answer becomes a stop of the adapter; the "
        "job, preview and validate warn where nothing in it can end an answer. validate downloads nothing: it knows a "
        "template only where the tokenizer is in a local folder or in the Hub's cache. Default: the published format "
        "of natively supported models.",
    )
    stopping_sequences: Annotated[list[Word], Field(max_length=64)] = Field(
        default_factory=list,
        description="stopping_sequences are texts at which generation ends, at most 64 of at most 256 characters. "
        "Those that are a special token of the model's tokenizer are written into the adapter's "
        "generation_config.json; the end of turn that is trained is written there in any case. Default: [].",
    )
    stopping_tokens: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=64)] = Field(
        default_factory=list,
        description="stopping_tokens are token ids at which generation ends, at most 64. Default: [].",
    )
    generate_kwargs: FreeObject | None = Field(
        default=None,
        description="generate_kwargs are sampling settings of LLMForge's serving configuration. They are accepted "
        "with a warning and have no effect on training.",
    )
