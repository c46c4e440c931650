"""The base model from a folder, in the precision its device wants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_api.training import Quantization
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.launch.failures import has_other_cause
from finetune_trainer.model import quantized
from finetune_trainer.model.config_file import read_config_file, refuse_by_numbers
from finetune_trainer.model.heap import returned_at_once
from finetune_trainer.model.support import (
    build_skeleton,
    context_limit,
    missing_package,
    refuse_by_config,
    text_config,
    unsupported,
)
from finetune_trainer.model.weights import LoadingInfo, check_headers, check_loaded

_CPU = torch.device("cpu")


def training_dtype(device: torch.device) -> torch.dtype:
    """Precision of the frozen weights.

    bfloat16 on GPUs; float32 on CPU, where common processors multiply bfloat16 a hundred times slower.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_config(folder: Path, *, trust_remote_code: bool, name: str | None = None) -> Any:
    """The model's configuration; `name` is what the user calls the model, the folder when None.

    Raises:
        JobError: ModelUnsupported, there is none that transformers understands, or it is of no model that is trained
            here; StorageAccessDenied, a file of the folder cannot be read, which those who load weights would call
            missing.
    """
    from transformers import AutoConfig

    name = name or f"The model in {folder}"
    for file in sorted(folder.glob("*")):
        if not os.access(file, os.R_OK):
            raise JobError(
                Reason.STORAGE_ACCESS_DENIED, f"{file} may not be read by this user: change its permissions."
            )
    content = read_config_file(folder)
    refuse_by_numbers(content or {}, name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        refuse_by_config(config, name, trust_remote_code=trust_remote_code)
    except JobError:
        raise
    except Exception as error:  # A foreign folder can make transformers raise anything, or pass on values of any type.
        if has_other_cause(error):
            raise
        _refuse_unknown_type(content, name)
        raise _unsupported(name, error, trust_remote_code) from error
    return config


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    name: str | None = None,
    notices: list[str] | None = None,
    quantization: Quantization | None = None,
    device: torch.device = _CPU,
) -> Any:
    """The causal language model in `folder` on `device`, its weights frozen.

    Args:
        folder: configuration and weights.
        dtype: precision of the weights, or of what is computed with quantized ones.
        trust_remote_code: whether Python code in the folder may run.
        name: what the user calls the model, the folder when None.
        notices: what a user should know of the model is added to it.
        quantization: how the weights of linear layers are kept, None as they are.
        device: where it is wanted. Weights are quantized there.

    Raises:
        JobError: ModelUnsupported, transformers cannot make a causal language model of it, or not a whole one, or it
            has nothing to quantize; InvalidSpec, it is quantized already.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    name = name or f"The model in {folder}"
    config = load_config(folder, trust_remote_code=trust_remote_code, name=name)
    skeleton = build_skeleton(config, name, trust_remote_code=trust_remote_code)
    if skeleton is not None:
        check_headers(folder, skeleton, name)
    options: dict[str, Any] = {}
    if quantization is not None:
        quantized.refuse_quantized_already(config, name)
        options = {"quantization_config": quantized.settings(quantization, dtype, skeleton), "device_map": {"": device}}
    try:
        with returned_at_once():
            model, info = auto.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                # What does not fit is refused below, in our words.
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:  # As above.
        if has_other_cause(error):
            raise
        raise _unsupported(name, error, trust_remote_code) from error
    told = check_loaded(LoadingInfo.from_transformers(info), model, name)
    if quantization is not None:
        told += quantized.quantization_notices(model, quantization, name)
    if notices is not None:
        notices += told
    quantized.compute_with_values(model)
    # transformers moves no model that is quantized, and this one is there.
    return as_frozen(model if quantization is not None else model.to(device))


def as_frozen(model: Any) -> Any:
    """`model` as the base of an adapter: its weights get no gradient."""
    _let_generate(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def check_context_length(asked: int | None, config: Any, model_id: str, skeleton: Any | None = None) -> int | None:
    """Tokens after which rows are cut: what the job asks for, else what the model supports.

    Raises:
        JobError: ContextTooLong, the job asks for more than the model supports.
    """
    limit = context_limit(text_config(config, model_id), skeleton)
    if asked is not None and limit is not None and asked > limit:
        raise JobError(
            Reason.CONTEXT_TOO_LONG,
            f"context_length is {asked} tokens, but {model_id} supports at most {limit}: lower it to {limit} or less.",
        )
    return asked if asked is not None else limit


def vocabulary_size(config: Any, skeleton: Any | None) -> int | None:
    """Token ids that the model has an embedding for: 0 up to this, exclusive; None when it does not say."""
    sizes = [getattr(config, "vocab_size", None)]
    if skeleton is not None:
        sizes.append(getattr(skeleton.get_input_embeddings(), "num_embeddings", None))
    return max((size for size in sizes if isinstance(size, int)), default=None)


def _let_generate(model: Any) -> None:
    """Give a model of custom code what PEFT and those who load the adapter expect of a language model."""
    from transformers import GenerationConfig, GenerationMixin

    if not isinstance(model, GenerationMixin):
        model.__class__ = type(type(model).__name__, (type(model), GenerationMixin), {})
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)


def _refuse_unknown_type(content: dict[str, Any] | None, name: str) -> None:
    """A model type that is newer than transformers, or of another library."""
    import transformers

    kind = content.get("model_type") if content else None
    if content and isinstance(kind, str) and kind and kind not in transformers.CONFIG_MAPPING:
        if content.get("auto_map"):
            return
        raise unsupported(
            name,
            f"is a {kind} model, which transformers {transformers.__version__} does not know: use a trainer image with "
            "a newer version, or name another model",
        )


def _unsupported(name: str, error: Exception, trusted: bool) -> JobError:
    if isinstance(error, ImportError):
        return missing_package(name, error)
    if "trust_remote_code" in str(error) and not trusted:
        return unsupported(name, "brings Python code of its own: set trust_remote_code: true if you trust it")
    return unsupported(
        name,
        f"cannot be loaded as a causal language model ({first_line(error)}): check that it is one and that its folder "
        "is complete",
    )
