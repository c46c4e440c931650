"""The base model from a folder, in the precision its device wants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError


def training_dtype(device: torch.device) -> torch.dtype:
    """Precision of the frozen weights.

    bfloat16 on GPUs; float32 on CPU, where common processors multiply bfloat16 a hundred times slower.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The model's configuration.

    Raises:
        JobError: ModelUnsupported, there is none that transformers understands; StorageAccessDenied, a file of the
            folder cannot be read, which those who load weights would call missing.
    """
    from transformers import AutoConfig

    for file in sorted(folder.glob("*")):
        if not os.access(file, os.R_OK):
            raise JobError(
                Reason.STORAGE_ACCESS_DENIED, f"{file} may not be read by this user: change its permissions."
            )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # A foreign folder can make transformers raise anything.
        raise _unsupported(folder, error, trust_remote_code) from error


def load_model(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The causal language model in `folder`, its weights frozen.

    Raises:
        JobError: ModelUnsupported, transformers cannot make a causal language model of it.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # As above; running out of memory is told apart before.
        raise _unsupported(folder, error, trust_remote_code) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def model_context_length(config: Any) -> int | None:
    """Most positions that the model supports, or None when it sets no bound (state-space models)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def check_context_length(asked: int | None, config: Any, model_id: str) -> int | None:
    """Tokens after which rows are cut: what the job asks for, else what the model supports.

    Raises:
        JobError: ContextTooLong, the job asks for more than the model supports.
    """
    limit = model_context_length(config)
    if asked is not None and limit is not None and asked > limit:
        raise JobError(
            Reason.CONTEXT_TOO_LONG,
            f"context_length is {asked} tokens, but {model_id} supports at most {limit}: lower it to {limit} or less.",
        )
    return asked if asked is not None else limit


def _unsupported(folder: Path, error: Exception, trusted: bool) -> JobError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if "trust_remote_code" in str(error) and not trusted:
        return JobError(
            Reason.MODEL_UNSUPPORTED,
            f"The model in {folder} brings Python code of its own: set trust_remote_code: true if you trust it.",
        )
    return JobError(
        Reason.MODEL_UNSUPPORTED,
        f"The model in {folder} cannot be loaded as a causal language model ({text}): check that it is one and that "
        "its folder is complete.",
    )
