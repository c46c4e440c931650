"""CEL rules of the CRD: what a schema cannot say, checked by the API server before anything is stored.

They repeat `rules.py` as far as CEL reaches, so that `kubectl apply` answers at once, and make what is trained
immutable, which only the server can. Both initial_*_ckpt_path have two types, which CEL cannot read: the operator
compares those itself, with the first attempt's ConfigMap.
"""

from __future__ import annotations

from finetune_api.job import Published
from finetune_api.llmforge import KEYS, REFUSED_TASKS, Fate
from finetune_api.prompt_format import PromptFormat
from finetune_api.rules import QUANTIZED_SHARDING, SECRET_VARIABLE
from finetune_api.rules_lora import LORA_SENTENCES
from finetune_api.storage_uri import READABLE
from finetune_api.training import WhatToTrain

Rule = dict[str, str]


def _rule(expression: str, message: str, field: str | None = None) -> Rule:
    rule = {"rule": expression, "message": message}
    return rule | {"fieldPath": f".{field}"} if field else rule


def key_length_rule(limit: int) -> Rule:
    """Of a map: a schema cannot bound the length of keys, and CEL can where the values have a type."""
    return _rule(f"self.all(key, size(key) <= {limit})", f"a key may have at most {limit} characters.")


def _immutable(name: str, *, required: bool) -> Rule:
    same = f"self.{name} == oldSelf.{name}"
    if not required:
        # Presence is compared too: a rule on the field itself would not see it come or go.
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
    return _rule(same, f"{name} is immutable, since it decides what is trained: create a new FineTuneJob.", name)


def _immutability() -> list[Rule]:
    of_two_types = ("initial_base_model_ckpt_path", "initial_adapter_model_ckpt_path")
    fields = {**WhatToTrain.model_fields, **Published.model_fields}
    return [
        _immutable(name, required=field.is_required()) for name, field in fields.items() if name not in of_two_types
    ]


def _readable(field: str, *, required: bool) -> Rule:
    schemes = " || ".join(f"self.{field}.startsWith('{scheme}')" for scheme in ("s3://", "hf://", "pvc://", "file://"))
    absent = "" if required else f"!has(self.{field}) || "
    return _rule(
        f"{absent}!self.{field}.matches('^[A-Za-z][A-Za-z0-9+.-]*://') || {schemes}",
        f"{field} has a scheme that is not read: copy the data to one of {READABLE}.",
        field,
    )


def _spec_rules() -> list[Rule]:
    refused = [
        _rule(f"!has(self.{key})", fate.sentence, key) for key, fate in KEYS.items() if fate.fate is Fate.REFUSED
    ]
    tasks = [
        _rule(f"!has(self.task) || self.task != '{task}'", sentence, "task") for task, sentence in REFUSED_TASKS.items()
    ]
    return [
        *refused,
        *tasks,
        _rule(
            "!has(self.no_gradient_checkpoint) || !has(self.gradient_checkpointing) || "
            "self.no_gradient_checkpoint != self.gradient_checkpointing",
            "no_gradient_checkpoint contradicts gradient_checkpointing: remove no_gradient_checkpoint.",
            "no_gradient_checkpoint",
        ),
        _rule(
            "!has(self.quantization) || !has(self.sharding) || self.sharding != 'fsdp'",
            QUANTIZED_SHARDING,
            "quantization",
        ),
        _rule(
            "!has(self.min_num_update_steps) || !has(self.min_update_steps) || "
            "self.min_num_update_steps == self.min_update_steps",
            "min_num_update_steps contradicts min_update_steps, of which it is another spelling: remove one.",
            "min_num_update_steps",
        ),
        _rule(
            "!has(self.output_dir) || !has(self.output) || self.output_dir == self.output.uri",
            "output_dir contradicts output.uri, of which it is another spelling: remove one.",
            "output_dir",
        ),
        _rule(
            "!has(self.num_devices) || !has(self.workers) || "
            "(has(self.workers.nodes) && has(self.workers.gpusPerNode) ? "
            "self.num_devices == self.workers.nodes * self.workers.gpusPerNode : "
            "has(self.workers.nodes) ? self.num_devices % self.workers.nodes == 0 : "
            "!has(self.workers.gpusPerNode) || "
            "(self.workers.gpusPerNode > 0 && self.num_devices % self.workers.gpusPerNode == 0))",
            "num_devices contradicts workers: remove num_devices, or make nodes x gpusPerNode the same.",
            "num_devices",
        ),
        _readable("train_path", required=True),
        _readable("valid_path", required=False),
        *_immutability(),
    ]


def _lora_rules() -> list[Rule]:
    allowed = {
        "use_dora": "!self.use_dora",
        "bias": "self.bias == 'none'",
        "modules_to_save": "size(self.modules_to_save) == 0",
        "task_type": "self.task_type == 'CAUSAL_LM'",
        "inference_mode": "!self.inference_mode",
    }
    return [_rule(f"!has(self.{key}) || {expression}", LORA_SENTENCES[key], key) for key, expression in allowed.items()]


_FORMAT_KEYS = ("system", "user", "assistant")

_FORMAT_RULES = [
    _rule(
        "has(self.use_hugging_face_chat_template) || (" + " && ".join(f"has(self.{key})" for key in _FORMAT_KEYS) + ")",
        "prompt_format needs system, user and assistant, or use_hugging_face_chat_template: true alone.",
    ),
    _rule(
        "!has(self.use_hugging_face_chat_template) || !("
        + " || ".join(f"has(self.{key})" for key in PromptFormat.model_fields)
        + ")",
        "use_hugging_face_chat_template takes the tokenizer's own format: remove it, or the keys beside it.",
    ),
    *(
        _rule(
            f"!has(self.{key}) || self.{key}.contains('{{instruction}}')",
            f"{key} must contain {{instruction}}, where the message goes.",
            key,
        )
        for key in _FORMAT_KEYS
    ),
]

_ENVIRONMENT_RULES = [
    _rule(
        "has(self.value) != has(self.valueFrom)", "an environment variable needs exactly one of value and valueFrom."
    ),
    _rule(
        f"!has(self.value) || self.value == '' || !self.name.matches('(?i){SECRET_VARIABLE}')",
        "the value of this environment variable is a secret, and everybody who may read the job could read it: use "
        "spec.secrets, or valueFrom.secretKeyRef.",
        "value",
    ),
]

_SOURCES = ("secretKeyRef", "configMapKeyRef", "fieldRef")
_VOLUMES = ("persistentVolumeClaim", "configMap", "secret", "emptyDir")


def _exactly_one(keys: tuple[str, ...], what: str) -> Rule:
    total = " + ".join(f"(has(self.{key}) ? 1 : 0)" for key in keys)
    return _rule(f"{total} == 1", f"{what} needs exactly one of {', '.join(keys[:-1])} and {keys[-1]}.")


RULES: dict[tuple[str, ...], list[Rule]] = {
    ("spec",): _spec_rules(),
    ("spec", "lora_config"): _lora_rules(),
    ("spec", "generation_config", "prompt_format"): _FORMAT_RULES,
    ("spec", "workers", "env", "[]"): _ENVIRONMENT_RULES,
    ("spec", "workers", "env", "[]", "valueFrom"): [_exactly_one(_SOURCES, "valueFrom")],
    ("spec", "workers", "volumes", "[]"): [_exactly_one(_VOLUMES, "a volume")],
}
"""Rules per place in the schema; "[]" stands for a list's entries."""
