"""LoRA layers on the base model: exactly those the job names, or a sentence that says which name matched nothing."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from finetune_api.lora import LoraConfig
from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.adapter_state import check_continued


def add_lora(model: Any, config: LoraConfig) -> Any:
    """`model` as a PeftModel with fresh LoRA layers.

    Raises:
        JobError: InvalidSpec, a named module matches no layer or PEFT refuses the configuration.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    _check_targets(model, config)
    keys = config.model_dump(exclude_none=True, exclude={"inference_mode"})
    try:
        adapted = get_peft_model(model, PeftConfig(**keys))
    except (ValueError, TypeError) as error:
        raise JobError(
            Reason.INVALID_SPEC, f"PEFT refuses lora_config ({error}): correct it, or leave it out for the defaults."
        ) from error
    _check_trainable(adapted)
    return adapted


def continue_lora(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder`, to be trained further.

    Raises:
        JobError: InvalidSpec, the folder holds no LoRA adapter that fits this model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT's complaint about the context_length that we and others put beside its own keys.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # PEFT lets whatever a foreign folder causes through.
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
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


def _check_targets(model: Any, config: LoraConfig) -> None:
    """PEFT only complains when no name at all matches; a name that matches nothing would be silently untrained."""
    targets = config.target_modules
    if isinstance(targets, str):
        return
    names = [name for name, _ in model.named_modules() if name]
    missing = [target for target in targets if not any(name == target or name.endswith(f".{target}") for name in names)]
    if missing:
        layers = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)})
        raise JobError(
            Reason.INVALID_SPEC,
            f"lora_config.target_modules names {', '.join(missing)}, which this model does not have; its linear layers "
            f"are {', '.join(layers)}. Name those, or write all-linear.",
        )


def _check_trainable(model: Any) -> None:
    if trainable_parameters(model) == 0:
        raise JobError(
            Reason.INVALID_SPEC,
            "lora_config leaves nothing to train (target_modules and exclude_modules take no layer): write all-linear.",
        )


def _is_linear(module: Any) -> bool:
    return re.search(r"Linear|Conv1D", type(module).__name__) is not None
