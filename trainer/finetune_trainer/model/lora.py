"""LoRA layers on the base model: exactly those of `targets.py`, in training and in the published configuration.

PEFT 0.21 rewrites what it is given for mixtures of experts: names that the experts' checkpoints had in transformers 4
(`gate_proj`, `w1`, …) become `target_parameters`, also where they stand for the dense layers beside the experts. It
does so once more when the adapter is loaded, so an adapter on such a layer has to be published in the one way that PEFT
leaves alone: as a target parameter, the layer's weight. The tensors are the same.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import transformers_weight_conversion
from torch import nn

from finetune_api.lora import LoraConfig
from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.model.adapter_state import check_continued
from finetune_trainer.model.targets import Targets, is_expert, leaf, share_of_experts

_RESOLVED = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "experts", "inference_mode"}
"""Keys of lora_config that are not PEFT's, or that the targets have taken account of."""


def add_lora(model: Any, config: LoraConfig, targets: Targets) -> Any:
    """`model` as a PeftModel with fresh LoRA layers on `targets`.

    Raises:
        JobError: InvalidSpec, PEFT refuses the configuration.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    keys = config.model_dump(exclude_none=True, exclude=_RESOLVED)
    if targets.parameters:
        keys |= {"target_parameters": list(targets.parameters), "lora_dropout": 0.0}
    names = _shortest(targets.modules, [path for path, _ in model.named_modules()])
    try:
        with _nothing_rewritten():
            model = get_peft_model(model, PeftConfig(target_modules=names, **keys))
    except (ValueError, TypeError) as error:
        raise JobError(Reason.INVALID_SPEC, f"PEFT refuses lora_config ({error}): correct what it names.") from error
    found = adapted(model)
    differing = {*found.modules, *found.parameters} ^ {*targets.modules, *targets.parameters}
    if differing:
        raise RuntimeError(f"PEFT adapted other layers than it was told: {sorted(differing)[:5]}")
    return model


def published_config(model: Any) -> Any:
    """PEFT's configuration of the adapter as plain PEFT has to read it to put it on the same layers."""
    config = copy.deepcopy(model.peft_config["default"])
    base = model.get_base_model()
    layers = [path for path, module in _lora_layers(model) if not hasattr(module, "parameter_name")]
    rewritten = {name for name in {leaf(path) for path in layers} if _is_rewritten(base, config, name)}
    if rewritten:
        kept = [path for path in layers if leaf(path) not in rewritten]
        weights = [f"{path}.weight" for path in layers if leaf(path) in rewritten]
        config.target_modules = set(_shortest(kept, [_plain(path) for path, _ in base.named_modules()]))
        config.target_parameters = sorted({*(config.target_parameters or []), *weights})
        # A pattern that is meant for the layer has to fit its weight as well.
        for pattern in (config.rank_pattern, config.alpha_pattern):
            pattern |= {rf"({name})\.weight": value for name, value in pattern.items()}
        # PEFT adapts parameters without dropout only, and refuses the whole adapter otherwise.
        config.lora_dropout = 0.0
    config.inference_mode = True
    return config


def continue_lora(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder`, to be trained further.

    Raises:
        JobError: InvalidSpec, the folder holds no LoRA adapter that fits this model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # Writers of adapters put keys of their own beside PEFT's, such as context_length.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # PEFT lets whatever a foreign folder causes through.
        text = first_line(error)
        raise JobError(
            Reason.INVALID_SPEC,
            f"initial_adapter_model_ckpt_path {folder} holds no adapter that fits this model ({text}): check that it "
            "was trained on the same base model.",
        ) from error
    _check_trainable(adapted)
    check_continued(adapted, folder)
    return adapted


def kept_settings(model: Any, config: LoraConfig) -> list[str]:
    """What `config` asks for and a continued adapter keeps its own value of, a sentence each."""
    own = model.peft_config["default"]
    return [
        f"lora_config.{key} is {getattr(config, key)}, but the continued adapter keeps its own {getattr(own, key)}."
        for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")
        if getattr(own, key) != getattr(config, key)
    ]


def trainable_parameters(model: Any) -> int:
    """Number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapted(model: Any) -> Targets:
    """What an adapter is on, read from the PeftModel."""
    modules, parameters = [], []
    for path, module in _lora_layers(model):
        name = getattr(module, "parameter_name", None)
        if name is None or isinstance(module.get_base_layer(), nn.Linear):
            modules.append(path)
        else:
            parameters.append(f"{path}.{name}")
    base = model.get_base_model()
    untouched = 0.0 if parameters or any(is_expert(path) for path in modules) else share_of_experts(base)
    return Targets(tuple(modules), tuple(parameters), (), untouched)


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            # Several parameters of a module are adapted by wrappers inside each other.
            yield _plain(path), module


def _plain(path: str) -> str:
    return re.sub(r"\.base_layer(?=\.|$)", "", path)


def _shortest(paths: Sequence[str], all_paths: Sequence[str]) -> list[str]:
    """The last parts of the names where they stand for these layers and no others, as people write them; else all."""
    leaves = {leaf(path) for path in paths}
    others = {path for path in all_paths if leaf(path) in leaves} - set(paths)
    return list(paths) if others else sorted(leaves)


@contextmanager
def _nothing_rewritten() -> Iterator[None]:
    """PEFT takes its configuration as it is written."""
    name = "convert_peft_config_for_transformers"
    original = getattr(transformers_weight_conversion, name)
    setattr(transformers_weight_conversion, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(transformers_weight_conversion, name, original)


def _is_rewritten(base: Any, config: Any, name: str) -> bool:
    """Whether PEFT would make something else of a layer with this name."""
    trial = copy.deepcopy(config)
    trial.target_modules, trial.target_parameters = {name}, None
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(trial, model=base, conversions=None)
    except ValueError:  # Experts' names that it knows only together.
        return True
    return bool(trial.target_modules != {name})


def _check_trainable(model: Any) -> None:
    if trainable_parameters(model) == 0:
        raise JobError(
            Reason.INVALID_SPEC,
            "initial_adapter_model_ckpt_path has no layers to train: name an adapter with LoRA layers.",
        )
