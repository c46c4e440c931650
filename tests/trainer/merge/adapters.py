"""Adapters for merging: on the layers that the trainer would take, and as PEFT alone would make them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune_api.lora import LoraConfig
from finetune_trainer.model.adapter_state import adapter_tensors
from finetune_trainer.model.load import load_model
from finetune_trainer.model.lora import add_lora, published_config
from finetune_trainer.model.reach import reached_by_text
from finetune_trainer.model.targets import candidates, resolve_targets


def trained(base: Path, folder: Path, *, scale: float = 0.05, **keys: Any) -> Path:
    """An adapter as the trainer publishes it, its tensors moved by about `scale`; `keys` are lora_config's."""
    model = load_model(base, dtype=torch.float32, trust_remote_code=False)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | keys)
    reach = reached_by_text(model, candidates(model), list(range(4, 44)))
    with warnings.catch_warnings():
        # PEFT's, of transposed weights.
        warnings.simplefilter("ignore", UserWarning)
        adapted = add_lora(model, config, resolve_targets(model, config, reach))
    published = published_config(adapted)
    return _written(folder, published, adapter_tensors(adapted), base, scale)


def foreign(base: Path, folder: Path, *, scale: float = 0.05, **keys: Any) -> Path:
    """An adapter that PEFT puts wherever `keys`, its own, say."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = load_model(base, dtype=torch.float32, trust_remote_code=False)
    adapted = get_peft_model(model, PeftConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **keys))
    return _written(folder, adapted.peft_config["default"], adapter_tensors(adapted), base, scale)


def _written(folder: Path, config: Any, tensors: dict[str, torch.Tensor], base: Path, scale: float) -> Path:
    folder.mkdir()
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved = {name: tensor + scale * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(moved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
