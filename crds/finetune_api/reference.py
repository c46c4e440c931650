"""docs/reference/job.md, generated from the models: `python -m finetune_api.reference` prints it.

One source of prose for the CRD, `kubectl explain` and the documentation, so none of them can lag behind.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from finetune_api.crd import structural_schema
from finetune_api.llmforge import KEYS, REFUSED_PEFT_KEYS, Fate
from finetune_api.spec_size import SPEC_LIMIT_BYTES, SPEC_LIMIT_VALUES

HEADER = "<!-- Generated from crds/finetune_api by `python -m finetune_api.reference`: change the models instead. -->\n"

INTRODUCTION = """\
# FineTuneJob

`apiVersion: finetune.dev/v1alpha1`, `kind: FineTuneJob`, plural `finetunejobs`, short `ftj`.

Keys that LLMForge had are spelled as LLMForge spelled them; keys that Kubernetes has a name for keep that name. A bare
LLMForge configuration, with the keys of `spec` at its top, is read wherever a file is. An unknown key is refused with
the nearest known one, a key given twice is refused with its line, and `1e-4` is a number with or without a dot. An
empty value counts as not given.

What to train and `output` cannot be changed once applied: create a new FineTuneJob. `suspend`, `backoffLimit`,
`activeDeadlineSeconds` and `ttlSecondsAfterFinished` can be changed at any time, `workers` and `secrets` while the job
is suspended or waits.
"""

SIZES = (
    f"A spec may take {SPEC_LIMIT_BYTES // 1024} KiB as JSON and hold {SPEC_LIMIT_VALUES:,} values; what is larger is "
    "refused as a whole.\n"
)

_UNTYPED = "see text"

_NOT_TAKEN_APART = {"affinity", *(key for key, fate in KEYS.items() if fate.fate is Fate.REFUSED)}
"""Objects without a table of their own: Kubernetes documents one, and nobody is to write the others."""

_DEFAULT = re.compile(r"Default: (.*?)(?:; |\. |\.$)")

DEFAULTS_INTRODUCTION = """\
## Whose defaults these are

LLMForge documented some of its defaults, and those are kept. Where its defaults were not public, or mean something
else here, they are ours.
"""

LLMFORGE_DEFAULTS = {
    "num_epochs": "min_update_steps / steps per epoch, rounded up",
    "min_update_steps": "100",
    "lr_scheduler_type": "cosine",
    "num_warmup_steps": "10; in runs below 100 steps a tenth of them, since LLMForge's trained shorter ones hardly",
    "padding": "longest",
    "num_checkpoints_to_keep": "1",
    "checkpoint_and_evaluation_frequency": "every epoch, in runs of more than 20 epochs fewer",
    "lora_config.r": "8",
    "lora_config.lora_alpha": "16 (in its templates)",
    "lora_config.lora_dropout": "0.05 (in its templates)",
    "generation_config": "the published format of natively supported models",
}

OUR_DEFAULTS = {
    "context_length": "the model's own, or the longest row where that is shorter. LLMForge: the larger of the model's "
    "own and the rows' 95th percentile, which a model may not support",
    "task": "instruction_tuning. LLMForge's custom mode had causal_lm, which would train a classifier-style job on its "
    "own policy prompt; a notice says so when task is absent",
    "lora_config": "a LoRA adapter. LLMForge's custom mode trained all parameters; a notice says so",
    "lora_config.target_modules": "all-linear. LLMForge's templates listed the same layers and, besides, embed_tokens "
    "and lm_head",
    "learning_rate": "1e-4, LLMForge's advice for LoRA",
    "train_batch_size_per_device": "by the tokens of the training data; LLMForge's table was not public",
    "gradient_accumulation_steps": "1",
    "weight_decay": "0, with AdamW, the only optimizer",
    "max_grad_norm": "1",
    "seed": "42",
    "gradient_checkpointing": "where memory asks for it; LLMForge: always true",
    "prompt_format.strip_whitespace": "false, since the text is promised to be verbatim; LLMForge's serving code: true",
}


def reference() -> str:
    """The whole page as Markdown."""
    schema = structural_schema()["properties"]
    parts = [
        HEADER,
        INTRODUCTION,
        SIZES,
        *_sections("spec", schema["spec"]),
        DEFAULTS_INTRODUCTION,
        _table(
            ("key", "default", "whose"),
            [(f"`{key}`", text, "LLMForge's") for key, text in LLMFORGE_DEFAULTS.items()]
            + [(f"`{key}`", text, "ours") for key, text in OUR_DEFAULTS.items()],
        ),
        "## What became of LLMForge's keys\n",
        *(_fates(fate) for fate in Fate),
        "## Keys of PEFT's LoraConfig that are refused\n",
        _table(("key", "why"), [(f"`{key}`", why) for key, why in REFUSED_PEFT_KEYS.items()]),
        *_sections("status", schema["status"]),
    ]
    return "\n".join(parts)


def _fates(fate: Fate) -> str:
    rows = [(f"`{key}`", found.sentence) for key, found in KEYS.items() if found.fate is fate]
    return f"### {fate.value.capitalize()}\n\n" + _table(("key", "what becomes of it"), rows)


def _sections(path: str, node: dict[str, Any]) -> Iterator[str]:
    """A table for the object at `path`, and one for each object below it."""
    required = node.get("required", [])
    rows = []
    for key, inner in node["properties"].items():
        prose, default = _prose(inner.get("description", ""))
        rows.append((f"`{key}`", _type(inner), "required" if key in required else default, prose))
    level = "##" if "." not in path else "###"
    yield f"{level} {path}\n"
    yield _table(("field", "type", "default", "meaning"), rows)
    for key, inner in node["properties"].items():
        if key in _NOT_TAKEN_APART:
            continue
        if "properties" in inner:
            yield from _sections(f"{path}.{key}", inner)
        elif "properties" in inner.get("items", {}):
            yield from _sections(f"{path}.{key}[]", inner["items"])


def _prose(description: str) -> tuple[str, str]:
    """The description without its default, and the default."""
    found = _DEFAULT.search(description)
    if found is None:
        return description, ""
    rest = description[found.end() :].strip()
    return f"{description[: found.start()].strip()} {rest[:1].upper()}{rest[1:]}".strip(), found.group(1)


def _type(node: dict[str, Any]) -> str:
    if node.get("x-kubernetes-int-or-string"):
        return "quantity"
    kind = node.get("type")
    if kind is None:
        return _UNTYPED
    if "enum" in node:
        return " \\| ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in node["enum"])
    if kind == "array":
        return f"list of {_type(node['items'])}"
    if kind == "object" and "additionalProperties" in node and _type(node["additionalProperties"]) != _UNTYPED:
        return f"map to {_type(node['additionalProperties'])}"
    return "text" if kind == "string" else str(kind)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\\\\|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
