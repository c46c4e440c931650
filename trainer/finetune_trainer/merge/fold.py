"""An adapter's weights added to those of its base model, so that plain transformers needs no PEFT.

Only PEFT's own rules say what an adapter adds. What it does not do is done here: weights that two places share are kept
apart where the adapter is on one of them, and sums are made in float32 whatever the model is held in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError, first_line


def fold(model: Any, name: str) -> tuple[Any, list[str]]:
    """The base model of a PeftModel with the adapter in its weights. `model` is used up: the weights change in place.

    Args:
        model: the PeftModel, one adapter on it.
        name: what the user calls the adapter.

    Returns:
        The base model, and what the user should know, a sentence each.

    Raises:
        JobError: ModelUnsupported, no model folder can hold the result, or it is not finite.
    """
    notices = _separate(model.get_base_model(), name)
    try:
        with warnings.catch_warnings():
            # PEFT warns of tied weights, which were taken apart, and of layers that are merged already, which is meant.
            warnings.simplefilter("ignore", UserWarning)
            for layer in _adapted_layers(model):
                with _in_float32(layer):
                    layer.merge()
            merged = model.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise JobError(
            Reason.MODEL_UNSUPPORTED, f"PEFT cannot merge {name} ({first_line(error)}): serve it as an adapter."
        ) from error
    if broken := [path for path, weight in merged.named_parameters() if not bool(torch.isfinite(weight).all())]:
        raise JobError(
            Reason.MODEL_UNSUPPORTED,
            f"{name} cannot be merged: {broken[0]} would have values that are no numbers. Check the adapter and its "
            "base model.",
        )
    if _are_tied(merged.config) and not _share_a_weight(merged):
        # An embedding that the adapter brings whole. Reopened as tied, one of the two would be lost.
        _declare_untied(merged.config)
    return merged, notices


def _adapted_layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def _in_float32(layer: Any) -> Iterator[None]:
    """Hold a layer and its adapter in float32 within the block, so that the sum is rounded once."""
    base = layer.get_base_layer()
    held = {name: weight.dtype for name, weight in base.named_parameters(recurse=False) if weight.is_floating_point()}
    if set(held.values()) <= {torch.float32}:
        yield
        return
    for name in held:
        weight = base.get_parameter(name)
        weight.data = weight.data.float()
    for part in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
        part.float()
    yield
    for name, dtype in held.items():
        weight = base.get_parameter(name)
        weight.data = weight.data.to(dtype)


def _separate(base: Any, name: str) -> list[str]:
    """Give adapted layers weights of their own where others use the same ones.

    Raises:
        JobError: ModelUnsupported, they are shared by more than embedding and head, which no configuration can undo.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(base.named_modules(remove_duplicate=False))
    users: dict[int, dict[str, Any]] = {}
    """Path of each use of a parameter, by its identity, and the outermost adapted layer that the use belongs to."""
    for path, weight in base.named_parameters(remove_duplicate=False):
        parts = path.split(".")
        above = (modules.get(".".join(parts[:number])) for number in range(1, len(parts)))
        layer: Any = next((module for module in above if isinstance(module, BaseTunerLayer)), None)
        users.setdefault(id(weight), {})[path] = layer
    ends = {id(end) for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None}
    notices = []
    for path, module in list(modules.items()):
        if not isinstance(module, BaseTunerLayer):
            continue
        layer, parameter = module.get_base_layer(), getattr(module, "parameter_name", "weight")
        weight = getattr(layer, parameter)
        uses = users[id(weight)]
        outermost = next(modules[other] for other in _ancestors(path) if isinstance(modules[other], BaseTunerLayer))
        others = [other for other, owner in uses.items() if owner is not outermost]
        if not others:
            continue
        if id(layer) not in ends and id(module) not in ends:
            raise JobError(
                Reason.MODEL_UNSUPPORTED,
                f"{name} cannot be merged: it is on {path}, whose weights {others[0].rpartition('.')[0]} uses too, and "
                "no model folder can keep them apart. Serve it as an adapter.",
            )
        setattr(layer, parameter, nn.Parameter(weight.detach().clone(), requires_grad=False))
        _declare_untied(base.config)
        notices.append(
            f"The adapter is on {path}, whose weights {others[0].rpartition('.')[0]} shares: the merged model has "
            "both, with tie_word_embeddings: false."
        )
        users[id(getattr(layer, parameter))] = {path: outermost}
        for own in [other for other, owner in uses.items() if owner is outermost]:
            del uses[own]
    return notices


def _ancestors(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:number]) for number in range(1, len(parts) + 1))


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for part in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, part, None)) is not None:
            yield from _configs(inner)


def _are_tied(config: Any) -> bool:
    return any(getattr(part, "tie_word_embeddings", False) for part in _configs(config))


def _declare_untied(config: Any) -> None:
    for part in _configs(config):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _share_a_weight(model: Any) -> bool:
    ends = [getattr(end, "weight", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    return None in ends or ends[0] is ends[1]
