"""A tiny model of every causal language model type that transformers knows, with every layer kind of its family.

Each is made from the type's own configuration class (`sizes.py` says how it becomes small, `families.py` what is
switched on) with random weights, and saved in the class that its published checkpoints are of.

    folder = build("mixtral", Path("mixtral"))   # configuration, safetensors, tokenizer with a chat template
    model = tiny_model("mixtral")                # in memory
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.families import FAMILIES, INCOMPLETE, NOT_CAUSAL, PUBLISHED_AS
from tests.architectures.sizes import shrunk
from tests.architectures.tokenizer import save_tokenizer

__all__ = ["INCOMPLETE", "MODEL_TYPES", "NOT_CAUSAL", "build", "tiny_config", "tiny_model"]

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The tiny configuration of `model_type`, with single settings changed.

    Raises:
        Exception: whatever transformers raises for a type that it cannot make a configuration of.
    """
    config_class = CONFIG_MAPPING[model_type]
    try:
        published = config_class()
    except Exception:  # A class without a valid default; its family has all settings.
        published = None
    found = shrunk(published) if published is not None else {}
    for name in config_class.sub_configs:
        part = getattr(published, name, None)
        if part is not None:
            found[name] = {"model_type": part.model_type, **shrunk(part)}
    for name, value in {**FAMILIES.get(model_type, {}), **changes}.items():
        found[name] = {**found.get(name, {}), **value} if name in config_class.sub_configs else value
    return config_class(**found)


def tiny_model(model_type: str, **changes: Any) -> Any:
    """What AutoModelForCausalLM makes of the tiny configuration: float32, random, always the same.

    Raises:
        Exception: whatever transformers raises for a type that it cannot make.
    """
    config = tiny_config(model_type, **changes)
    return _random(lambda: AutoModelForCausalLM.from_config(config))


def build(model_type: str, folder: Path, *, saved_as: str | None = None, **changes: Any) -> Path:
    """Save a tiny model as its published checkpoints are: configuration, safetensors and a tokenizer.

    Where transformers cannot make the model (a companion package is missing), the weights are a placeholder.

    Args:
        model_type: one of `MODEL_TYPES`.
        folder: is made.
        saved_as: name of transformers' class to save, instead of the published one.
        changes: settings of the configuration.

    Raises:
        Exception: whatever transformers raises for a configuration that it does not accept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(model_type, **changes)
    name = saved_as or PUBLISHED_AS.get(model_type)
    make = getattr(transformers, name) if name else AutoModelForCausalLM.from_config
    try:
        model = _random(lambda: make(config))
    except Exception:  # Model code that nobody here has seen; `tiny_model` raises it.
        config.save_pretrained(folder)
        save_file({"placeholder": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _random(make: Any) -> Any:
    """The model that `make` returns, its weights random throughout.

    What families begin with as all ones or zeros (norms, biases, gates, sinks, second matrices of low rank) is moved
    too: left alone it would hide whoever forgets it.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            elif parameter.numel() == 1:
                parameter.add_(0.1)
    return model.eval()
