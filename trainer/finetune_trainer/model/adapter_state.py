"""An adapter's tensors on their way between a model and a file, none of them lost in silence.

PEFT renames what it reads as transformers renames checkpoints of that model type, but writes the model's own names. For
some types a name does not come back as it went (laguna's `mlp.shared_experts.` becomes `mlp.shared_experts..`), and the
layer is then left out with no more than a warning. So names are chosen that PEFT's reading brings home, and whoever
loads tensors is told which were not taken and which are missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

PREFIX = "base_model.model."
_SHOWN = 3


def file_names(model: Any, names: Collection[str]) -> dict[str, str]:
    """Names for a file, by name in the model, with which PEFT's reading finds every tensor's place.

    Args:
        model: the base model, or a PeftModel of it.
        names: as PEFT writes them, e.g. `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.

    Returns:
        The same as `names` for most models. Those that no name brings home are absent.
    """
    written = {name: name for name in names}
    astray = _astray(model, written)
    for rename in _ways_back(model) if astray else ():
        written |= {name: rename(name) for name in astray}
        astray = _astray(model, written)
        if not astray:
            break
    return {name: file_name for name, file_name in written.items() if name not in astray}


def cannot_be_reloaded(model: Any, modules: Collection[str]) -> list[str]:
    """Those of `modules` (full paths in the base model) whose adapter PEFT would not find again in a file."""
    names = {f"{PREFIX}{module}.lora_A.weight": module for module in modules}
    kept = file_names(model, names)
    return [module for name, module in names.items() if name not in kept]


def adapter_tensors(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's tensors on CPU, under the names they have in a file.

    Args:
        model: the PeftModel.
        adapter: its name in the model.

    Raises:
        JobError: ModelUnsupported, a layer could not be loaded again.
    """
    from peft import get_peft_model_state_dict

    # Of the whole model's state PEFT would gather a sharded base, which other ranks would have to take part in.
    own = (".lora_", ".modules_to_save.")
    state = {name: each for name, each in model.named_parameters() if any(part in name for part in own)}
    # save_embedding_layers: never ask a hub for the base model's vocabulary, and never write the embedding matrix.
    found = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter, save_embedding_layers=False)
    names = file_names(model, found)
    lost = [name for name in found if name not in names]
    if lost:
        raise JobError(
            Reason.MODEL_UNSUPPORTED,
            f"PEFT could not load the adapter of {_some(lost)} again, because it renames these layers: leave them out "
            "with lora_config.exclude_modules.",
        )
    return {names[name]: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def put_tensors(model: Any, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Put a file's tensors into the adapter of a PeftModel that is not wrapped, as plain PEFT does.

    Returns:
        What is wrong with them; None when each was taken, none is missing and all are finite.
    """
    from peft import set_peft_model_state_dict

    if broken := not_finite(tensors):
        return f"{_some(broken)} {_have(broken)} values that are no numbers"
    try:
        return load_fault(set_peft_model_state_dict(model, dict(tensors)))
    except (RuntimeError, KeyError, ValueError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        return f"PEFT refuses them ({text[:300]})"


def load_fault(result: Any, adapter: str = "default") -> str | None:
    """What PEFT's loading result says that it only warns of, or None."""
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{adapter}" in key]
    if missing:
        return f"{_some(missing)} {_have(missing)} no tensor in the file"
    if unknown := list(result.unexpected_keys):
        return f"{_some(unknown)} {'is' if len(unknown) == 1 else 'are'} in the file and not in the model"
    return None


def check_continued(model: Any, folder: Path) -> None:
    """That the adapter in `folder` is in `model`, a PeftModel made from it, whole.

    Raises:
        JobError: InvalidSpec.
    """
    from peft.utils.save_and_load import load_peft_weights

    mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None)
    fault = put_tensors(model, load_peft_weights(str(folder), device="cpu", key_mapping=mapping))
    if fault is not None:
        raise JobError(
            Reason.INVALID_SPEC,
            f"The adapter in initial_adapter_model_ckpt_path {folder} cannot be continued, {fault}: check that it is "
            "whole and was trained on the same base model.",
        )


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with a value that is infinite or no number."""
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, to see later which have changed."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def _astray(model: Any, written: Mapping[str, str]) -> list[str]:
    """Names in the model whose tensor PEFT would put elsewhere when it reads it under its name in the file."""
    landed = _landing(model, list(written.values()))
    return [name for name, file_name in written.items() if landed.get(name) != file_name]


def _landing(model: Any, file_names: list[str]) -> dict[str, str]:
    """The name in the file by the name in the model that PEFT makes of it."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    # Numbered tensors tell where each went, whatever is done with them on the way.
    tags = {name: torch.full((1, 1), float(number)) for number, name in enumerate(file_names)}
    try:
        found = convert_peft_adapter_state_dict_for_transformers(
            model=model, peft_config=LoraConfig(), adapter_state_dict=tags
        )
    except Exception:  # Conversions of layers that these are not; reading the file would fail in the same way.
        return {}
    return {name: file_names[int(tag.flatten()[0])] for name, tag in found.items()}


def _ways_back(model: Any) -> Iterator[Callable[[str], str]]:
    """Renamings from names in the model to names in a checkpoint: all that transformers knows, then each alone."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = [step for step in get_model_conversion_mapping(base) if isinstance(step, WeightRenaming)]
    back = [step.reverse_transform() for step in reversed(forward)]

    def renamed(steps: list[Any], name: str) -> str:
        return PREFIX + str(apply_renamings(name.removeprefix(PREFIX), steps))

    yield from (partial(renamed, steps) for steps in (back, *([step] for step in back)))


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} others" if len(names) > _SHOWN else shown


def _have(names: Collection[str]) -> str:
    return "has" if len(names) == 1 else "have"
