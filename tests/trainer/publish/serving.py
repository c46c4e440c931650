"""Adapters' folders for the tests of serving notes: the small files alone, or whatever a stranger wrote into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

CHATML = {
    "system": "<|im_start|>system\n{instruction}<|im_end|>\n",
    "user": "<|im_start|>user\n{instruction}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{instruction}<|im_end|>\n",
    "trailing_assistant": "<|im_start|>assistant\n",
}

_TOKENIZER = {
    "added_tokens": [
        {"id": 1, "content": "<s>", "special": True},
        {"id": 2, "content": "<|im_end|>", "special": True},
        {"id": 3, "content": "<|im_start|>", "special": True},
        {"id": 4, "content": "</answer>", "special": False},
    ],
    "post_processor": None,
}

BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}
"""A tokenizer's post-processor that adds `<s>`."""


def write_adapter(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    prompt_format: dict[str, Any] | None = None,
    stopping_sequences: tuple[str, ...] = (),
    post_processor: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    tensors: tuple[str, ...] = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",),
) -> Path:
    """An adapter's folder; what is given goes over what is usual."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "acme/model", "revision": None}
    declared = {"prompt_format": prompt_format or CHATML, "stopping_sequences": list(stopping_sequences)}
    contents = {
        "adapter_config.json": usual | (config or {}),
        "generation_config.json": {"eos_token_id": [2]} | (generation or {}),
        "tokenizer.json": _TOKENIZER | {"post_processor": post_processor},
        "manifest.json": {"version": 1, "files": {}, "job": "guard", "contextLength": 4096} | (manifest or {}),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "prompt_format.yaml").write_text(yaml.safe_dump(declared))
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    save_file({name: torch.zeros(1) for name in tensors}, folder / "adapter_model.safetensors")
    return folder
