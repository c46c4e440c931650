"""Why a lora_config is refused: what would train nothing, fill gigabytes, or be an adapter that no server loads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune_api.lora import LoraConfig
from finetune_api.problem import Problem

EMBEDDINGS_AND_HEADS = frozenset(
    {"embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out", "word_embeddings", "shared", "embed_positions"}
)
"""Names that embeddings and output heads have in Transformers' causal language models."""

LORA_SENTENCES = {
    "use_dora": "use_dora: true is not supported, because vLLM serves no DoRA adapters: remove it; use_rslora and a "
    "higher r come closest.",
    "bias": "bias must be none, because vLLM serves no adapter that carries biases: remove it.",
    "modules_to_save": "modules_to_save must be empty, because it stores whole layers in the adapter, which vLLM does "
    "not serve: remove it, and name linear layers in target_modules instead.",
    "task_type": "task_type must be CAUSAL_LM, because only causal language models are trained: remove it.",
    "inference_mode": "inference_mode: true would train nothing: remove it.",
}
"""The refusals that CEL can express as well."""

_WHY = (
    "PEFT would write the whole embedding matrix into the adapter (often more than a gigabyte), which vLLM does not "
    "serve, and where input and output share their weights the two would no longer agree"
)

_INITIALIZATIONS = ("gaussian",)


def lora_problems(config: LoraConfig) -> Iterator[Problem]:
    """Every reason to refuse `config`; paths start at `lora_config`."""
    wrong = {
        "use_dora": config.use_dora,
        "bias": config.bias != "none",
        "modules_to_save": bool(config.modules_to_save),
        "task_type": config.task_type != "CAUSAL_LM",
        "inference_mode": config.inference_mode,
    }
    yield from (Problem(f"lora_config.{key}", LORA_SENTENCES[key]) for key, is_wrong in wrong.items() if is_wrong)
    yield from _target_problems(config)
    for key in ("exclude_modules", "layers_pattern"):
        value = getattr(config, key)
        if isinstance(value, str) and (fault := _pattern_fault(value)):
            yield Problem(f"lora_config.{key}", f"{value!r} is not a regular expression ({fault}): correct it.")
    start = config.init_lora_weights
    if isinstance(start, str) and start not in _INITIALIZATIONS:
        yield Problem(
            "lora_config.init_lora_weights",
            f"init_lora_weights: {start} is not supported: methods that start from changed base weights make an "
            "adapter that does not fit the published model; write true or gaussian.",
        )
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        yield Problem(
            "lora_config.layers_to_transform",
            "layers_to_transform needs target_modules as a list of module names: write for example "
            "target_modules: [q_proj, k_proj, v_proj, o_proj].",
        )
    if config.layers_pattern is not None and config.layers_to_transform is None:
        yield Problem(
            "lora_config.layers_pattern", "layers_pattern has a meaning only with layers_to_transform: remove it."
        )


def _target_problems(config: LoraConfig) -> Iterator[Problem]:
    path, targets = "lora_config.target_modules", config.target_modules
    if isinstance(targets, str):
        if targets == "all-linear":
            return
        if fault := _pattern_fault(targets):
            yield Problem(path, f"{targets!r} is not a regular expression ({fault}): correct it, or write a list.")
        elif hit := sorted(name for name in EMBEDDINGS_AND_HEADS if _reaches(targets, name)):
            yield Problem(
                path, f"the expression also matches {_listed(hit)}, which cannot be trained: {_WHY}. Narrow it."
            )
        return
    if "all-linear" in targets:
        yield Problem(path, "all-linear stands alone, not in a list: write target_modules: all-linear.")
    found = [name for name in targets if name.rsplit(".", 1)[-1] in EMBEDDINGS_AND_HEADS]
    if found:
        left = [name for name in targets if name not in found]
        rest = f"target_modules: [{', '.join(left)}]" if left else "target_modules: all-linear"
        yield Problem(path, f"remove {_listed(found)} from lora_config.target_modules and write {rest}: {_WHY}.")


def _pattern_fault(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def _reaches(pattern: str, name: str) -> bool:
    return any(re.fullmatch(pattern, prefix + name) for prefix in ("", "model.", "transformer.", "gpt_neox."))


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
