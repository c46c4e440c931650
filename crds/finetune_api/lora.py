"""lora_config: PEFT's LoraConfig, as far as the adapter can be served afterwards.

LLMForge hands the block to PEFT as it is. Here each key PEFT knows is either a field below or named in `llmforge.py`
with the reason why it is refused; `experts` is the one key of ours.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, WithJsonSchema

from finetune_api.fields import Count, SpecModel, Word
from finetune_api.untyped import NO_BOOLEAN, NO_LIST, NO_NUMBER, NO_OBJECT, NO_TEXT, UNTYPED, one_of_several

_WORD = {"minLength": 1, "maxLength": 256}
_LAYER = {"minimum": 0, "maximum": 65535}

ModuleKey = Annotated[str, StringConstraints(max_length=256)]

Modules = Annotated[
    Word | Annotated[list[Word], Field(min_length=1, max_length=256)],
    one_of_several("text (all-linear or a regular expression) or a list of module names"),
    WithJsonSchema(
        {
            **UNTYPED,
            **_WORD,
            **NO_NUMBER,
            **NO_BOOLEAN,
            **NO_OBJECT,
            "minItems": 1,
            "maxItems": 256,
            "items": {"type": "string", **_WORD},
        }
    ),
]
"""Module names, or a regular expression that must match the whole dotted name."""

Layer = Annotated[int, Field(ge=0, le=65535)]

Layers = Annotated[
    Layer | Annotated[list[Layer], Field(min_length=1, max_length=1024)],
    one_of_several("a layer number or a list of layer numbers, counted from 0"),
    WithJsonSchema(
        {
            **UNTYPED,
            **_LAYER,
            "multipleOf": 1,
            **NO_TEXT,
            **NO_BOOLEAN,
            **NO_OBJECT,
            "minItems": 1,
            "maxItems": 1024,
            "items": {"type": "integer", **_LAYER},
        }
    ),
]

Initialization = Annotated[
    bool | Word,
    one_of_several("true, false or gaussian"),
    WithJsonSchema({**UNTYPED, **_WORD, **NO_NUMBER, **NO_LIST, **NO_OBJECT}),
]


ALL_LINEAR = "all-linear"
"""target_modules for every linear layer that a text reaches."""


class LoraConfig(SpecModel):
    """The adapter's shape, in PEFT's own keys and one of ours, `experts`."""

    r: int = Field(
        default=8,
        ge=1,
        le=512,
        description="r is the rank of the adapter's matrices, 1 to 512. vLLM serves ranks up to its max_lora_rank, "
        "16 unless its server raises it. Default: 8.",
    )
    lora_alpha: int = Field(
        default=16,
        ge=1,
        le=65536,
        description="lora_alpha scales the adapter: its output is multiplied by lora_alpha / r. 1 to 65536. "
        "Default: 16.",
    )
    lora_dropout: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="lora_dropout is the share of the adapter's inputs that is zeroed during training, 0 to below 1. "
        "Default: 0.05.",
    )
    target_modules: Modules = Field(
        default=ALL_LINEAR,
        description="target_modules names the layers that get an adapter: all-linear (every linear layer of the text "
        "decoder, without output head, routers and experts), a list of module names such as [q_proj, v_proj], or a "
        "regular expression over full module names. The embedding and the output head (embed_tokens, lm_head) are "
        "trained where they are named, unless they share their weights. Default: all-linear.",
    )
    experts: bool = Field(
        default=False,
        description="experts is true to train the experts of a mixture too, which hold most of its weights; without "
        "dropout. Such an adapter is for Transformers and PEFT: vLLM 0.32 refuses it, or leaves the experts out. "
        "Default: false.",
    )
    exclude_modules: Modules | None = Field(
        default=None,
        description="exclude_modules names layers that target_modules would take and that are to stay as they are: a "
        "list of names or a regular expression. Default: none.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none",
        description="bias must be none: vLLM serves no adapter that carries biases, so all and lora_only are refused. "
        "Default: none.",
    )
    modules_to_save: Annotated[list[Word], Field(max_length=64)] = Field(
        default_factory=list,
        description="modules_to_save must be empty: vLLM serves no adapter that carries whole modules. Default: [].",
    )
    fan_in_fan_out: bool = Field(
        default=False,
        description="fan_in_fan_out is true for layers that store weights transposed, as GPT-2's Conv1D does; PEFT "
        "corrects a wrong value by itself. Default: false.",
    )
    init_lora_weights: Initialization = Field(
        default=True,
        description="init_lora_weights is true (the adapter starts as the identity) or gaussian (the same, drawn from "
        "a normal distribution); false starts from random weights and is meant for debugging. Methods that change "
        "the base model's weights (pissa, olora, corda, ...) are refused. Default: true.",
    )
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"] = (
        Field(
            default="CAUSAL_LM",
            description="task_type must be CAUSAL_LM, since only causal language models are trained. "
            "Default: CAUSAL_LM.",
        )
    )
    use_rslora: bool = Field(
        default=False,
        description="use_rslora scales the adapter by lora_alpha / sqrt(r) instead of lora_alpha / r. Default: false.",
    )
    use_dora: bool = Field(
        default=False,
        description="use_dora must be false: vLLM serves no DoRA adapters. Default: false.",
    )
    rank_pattern: Annotated[dict[ModuleKey, Count], Field(max_length=256)] = Field(
        default_factory=dict,
        description="rank_pattern gives single layers a rank of their own: module name or regular expression to rank. "
        "Default: {}.",
    )
    alpha_pattern: Annotated[dict[ModuleKey, Count], Field(max_length=256)] = Field(
        default_factory=dict,
        description="alpha_pattern gives single layers a lora_alpha of their own, as rank_pattern does for the rank. "
        "Default: {}.",
    )
    layers_to_transform: Layers | None = Field(
        default=None,
        description="layers_to_transform restricts the adapter to these layer numbers, counted from 0: a number or a "
        "list. target_modules must then be a list. Default: all layers.",
    )
    layers_pattern: Modules | None = Field(
        default=None,
        description="layers_pattern is the name of the model's list of layers, such as layers or h, where PEFT cannot "
        "find it for layers_to_transform. Default: found by PEFT.",
    )
    inference_mode: bool = Field(
        default=False,
        description="inference_mode must be false, or nothing would be trained. Default: false.",
    )
