"""What a lora_config brings: why it is refused (nothing would train, no server would load it), and what to know."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from finetune_api.lora import ALL_LINEAR, LoraConfig
from finetune_api.problem import Problem

EMBEDDINGS_AND_HEADS = frozenset({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"})
"""Names that input embeddings and output heads have in Transformers' causal language models."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""

VLLM_DEFAULT_RANK = 16

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

_BEYOND_ASCII = re.compile(r"(?<!\\)(?:\\\\)*\\[uUN]")
"""The escapes of a regular expression for characters beyond U+00FF."""

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
        if isinstance(value, str):
            yield from _pattern_problems(f"lora_config.{key}", value, "correct it")
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
        if targets == ALL_LINEAR:
            return
        yield from _pattern_problems(path, targets, "correct it, or write a list")
    elif ALL_LINEAR in targets:
        yield Problem(path, "all-linear stands alone, not in a list: write target_modules: all-linear.")


def lora_notices(config: LoraConfig) -> Iterator[Problem]:
    """What to know of an adapter that can be made; paths start at `lora_config`."""
    if config.r > VLLM_DEFAULT_RANK:
        needed = next(rank for rank in VLLM_RANKS if rank >= config.r)
        yield Problem(
            "lora_config.r",
            f"vLLM serves ranks up to {VLLM_DEFAULT_RANK} by default: start it with --max-lora-rank {needed}.",
        )
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    ends = sorted({name.rsplit(".", 1)[-1] for name in targets} & EMBEDDINGS_AND_HEADS)
    if ends:
        yield Problem(
            "lora_config.target_modules",
            f"vLLM serves adapters of {_listed(ends)} for some models only (0.32 does for Llama, and refuses the whole "
            "adapter for Qwen2): leave them out where your server is vLLM, or try it before you train for long.",
        )
    if config.experts:
        yield Problem(
            "lora_config.experts",
            "vLLM 0.32 serves adapters of experts with --enable-mixed-moe-lora-format and is_3d_lora_weight: true in "
            "--lora-modules only, and Mixtral's without effect on the experts: see SERVING.md of the adapter, or merge "
            "it with `finetune merge`.",
        )
    if config.init_lora_weights is False:
        yield Problem(
            "lora_config.init_lora_weights",
            "init_lora_weights: false starts from a randomly changed model and is meant for debugging: write true.",
        )


def _pattern_problems(path: str, pattern: str, cure: str) -> Iterator[Problem]:
    if not pattern.isascii() or _BEYOND_ASCII.search(pattern):
        # Nor is it compiled: that takes 5 ms for each range to U+FFFF where case is ignored, and 80 of them fit in.
        yield Problem(
            path,
            f"{path.rpartition('.')[2]} as a regular expression is in ASCII, as names of modules are: take out what is "
            "not, and \\u, \\U and \\N.",
        )
        return
    try:
        # That a pattern may mean something else in a later Python is no fault of it today.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield Problem(path, f"{pattern!r} is not a regular expression ({error}): {cure}.")


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
