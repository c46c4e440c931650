"""Models whose prompt format need not be written: LLMForge published it.

Only published formats are here. Models that LLMForge listed without publishing their format (Mistral-7B-Instruct-v0.3,
Mistral-Nemo, base Llama 2) need a `generation_config` like any other.
"""

from __future__ import annotations

import re

from finetune_api.generation import GenerationConfig
from finetune_api.prompt_format import PromptFormat

_LLAMA_2 = PromptFormat(
    system="<<SYS>>\n{instruction}\n<</SYS>>\n\n",
    user="[INST] {system}{instruction} [/INST]",
    assistant=" {instruction} </s><s>",
    system_in_user=True,
)

_LLAMA_3 = PromptFormat(
    system="<|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{instruction}<|eot_id|>",
    trailing_assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    bos="<|begin_of_text|>",
)

# The guide's format for "mistralai/Mistral-7B".
_MISTRAL_GUIDE = PromptFormat(
    system="{instruction} + ",
    user="[INST] {system}{instruction} [/INST]",
    assistant=" {instruction}</s>",
    bos="<s>",
    system_in_user=True,
)

_MISTRAL_INSTRUCT = PromptFormat(
    system="{instruction} + ",
    user="[INST] {system}{instruction} [/INST]",
    assistant="{instruction}</s> ",
    system_in_user=True,
)

_SAFE_SYSTEM_MESSAGE = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. "
    "Avoid harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and positivity."
)

_MIXTRAL_8X7B = _MISTRAL_INSTRUCT.model_copy(update={"default_system_message": _SAFE_SYSTEM_MESSAGE})

# Served with system_in_last_user, an inference-only switch; see PromptFormat.warnings.
_MIXTRAL_8X22B = PromptFormat(
    system="{instruction}\n\n ",
    user="[INST] {system}{instruction} [/INST]",
    assistant="{instruction} </s> ",
    bos="<s> ",
    system_in_user=True,
    default_system_message=_SAFE_SYSTEM_MESSAGE,
)

_GEMMA_2 = PromptFormat(
    system="{instruction} + ",
    user="<start_of_turn>user\n{system}{instruction}<end_of_turn>\n",
    assistant="<start_of_turn>model\n{instruction}<end_of_turn>\n",
    trailing_assistant="<start_of_turn>model\n",
    bos="<bos>",
    system_in_user=True,
)

_GEMMA_1 = _GEMMA_2.model_copy(update={"system": "{instruction}\n", "bos": ""})

_ZEPHYR = PromptFormat(
    system="<|system|>\n{instruction}</s>\n",
    user="<|user|>\n{instruction}</s>\n",
    assistant="<|assistant|>\n{instruction}</s>\n",
    trailing_assistant="<|assistant|>\n",
)

# Falcon's and DBRX's serving files carry a page-long default system message of their vendors. It is left out: a
# conversation without a system message is trained as one.
_FALCON_SFT = PromptFormat(
    system="<|prefix_begin|>{instruction}<|prefix_end|>",
    user="<|prompter|>{instruction}<|endoftext|>",
    assistant="<|assistant|>{instruction}<|endoftext|>",
    trailing_assistant="<|assistant|>",
)

_CHATML = PromptFormat(
    system="<|im_start|>system\n{instruction}<|im_end|>\n",
    user="<|im_start|>user\n{instruction}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{instruction}<|im_end|>\n",
    trailing_assistant="<|im_start|>assistant\n",
)

# The published assistant text begins otherwise than the published trailing_assistant, so training could never equal
# inference. The text that prompts the model wins, since that is what its own chat template uses.
_CODE_LLAMA_70B = PromptFormat(
    system="Source: system\n\n {instruction} <step> ",
    user="Source: user\n\n {instruction} <step> ",
    assistant="Source: assistant\nDestination: user\n\n {instruction} <step> ",
    trailing_assistant="Source: assistant\nDestination: user\n\n ",
)

_LIGHT_GPT = PromptFormat(
    system="{instruction}\n",
    user="### Instruction:\n{instruction}\n",
    assistant="### Response:\n{instruction}\n",
    trailing_assistant="### Response:\n",
)

_NATIVE: list[tuple[str, PromptFormat, list[str]]] = [
    (r"meta-llama/llama-2-(7|13|70)b-chat-hf", _LLAMA_2, []),
    (r"codellama/codellama-34b-instruct-hf", _LLAMA_2, []),
    (r"codellama/codellama-70b-instruct-hf", _CODE_LLAMA_70B, ["<step>"]),
    (r"meta-llama/(meta-)?llama-3-(8|70)b(-instruct)?", _LLAMA_3, ["<|end_of_text|>", "<|eot_id|>"]),
    (r"meta-llama/(meta-)?llama-3\.1-(8|70|405)b(-instruct)?", _LLAMA_3, ["<|end_of_text|>", "<|eot_id|>"]),
    (r"meta-llama/llama-3\.2-(1|3)b(-instruct)?", _LLAMA_3, ["<|end_of_text|>", "<|eot_id|>"]),
    (r"mistralai/mistral-7b", _MISTRAL_GUIDE, []),
    (r"mistralai/mistral-7b-instruct-v0\.1", _MISTRAL_INSTRUCT, []),
    (r"mistralai/mixtral-8x7b-instruct-v0\.1", _MIXTRAL_8X7B, []),
    (r"mistralai/mixtral-8x22b-instruct-v0\.1", _MIXTRAL_8X22B, []),
    (r"google/gemma-2-27b-it", _GEMMA_2, ["<end_of_turn>"]),
    (r"google/gemma-7b-it", _GEMMA_1, ["<end_of_turn>"]),
    (r"huggingfaceh4/zephyr-7b-beta", _ZEPHYR, []),
    (
        r"openassistant/falcon-(7b-sft-top1-696|40b-sft-top1-560)",
        _FALCON_SFT,
        ["<|prompter|>", "<|assistant|>", "<|endoftext|>"],
    ),
    (r"databricks/dbrx-instruct", _CHATML, []),
    (r"amazon/lightgpt", _LIGHT_GPT, ["### Response:", "### End"]),
]


def native_generation_config(model_id: str) -> GenerationConfig | None:
    """The published prompt format and stops of `model_id` (case-insensitive), or None when there is none."""
    for pattern, prompt_format, stops in _NATIVE:
        if re.fullmatch(pattern, model_id, re.IGNORECASE):
            return GenerationConfig(prompt_format=prompt_format, stopping_sequences=stops)
    return None
