"""Which files of a model repository are needed: repositories carry the same weights in several formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

Select = Callable[[Iterable[str]], list[str]]
"""Takes the relative paths of a repository's files, returns the ones to fetch."""

_TOKENIZER = re.compile(
    r"(?:[^/]*\.json|[^/]*\.jinja|additional_chat_templates/[^/]*\.jinja|[^/]*\.(?:model|tiktoken|spm|vocab)|"
    r"merges\.txt|vocab\.txt)"
)
"""Tokenizer, templates and configuration: all small. `*.json` includes the configuration of the weights."""
_INDEX = re.compile(r"(?!model\.safetensors\.)[^/]*\.index\.json")
"""Lists of shards, but the one that is read before any of them: it tells what is missing."""
_FORMATS = (
    # (whole file, index of the shards, shards). `consolidated.*` and adapters are other things in the same format.
    ("model.safetensors", "model.safetensors.index.json", re.compile(r"(?!consolidated|adapter)[^/]*\.safetensors")),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", re.compile(r"pytorch_model[^/]*\.bin")),
)


def tokenizer_files(paths: Iterable[str], *, code: bool = False) -> list[str]:
    """Everything but weights, and the list of them; Python files only where the job trusts them."""
    return sorted(
        path
        for path in paths
        if (_TOKENIZER.fullmatch(path) and not _INDEX.fullmatch(path)) or (code and path.endswith(".py"))
    )


def model_files(paths: Iterable[str], *, source: str, code: bool = False) -> list[str]:
    """Tokenizer files and the weights in one format, safetensors before PyTorch's.

    Args:
        paths: All files of the repository `source`.
        source: Its name, for the message.
        code: Whether its Python files are needed too (trust_remote_code).

    Raises:
        JobError: ModelUnsupported when there are no weights that can be trained.
    """
    paths = sorted(paths)
    needed = set(tokenizer_files(paths, code=code))
    for whole, index, shards in _FORMATS:
        if whole in paths:
            return sorted(needed | {whole})
        if index in paths:
            return sorted(needed | {index} | {path for path in paths if shards.fullmatch(path)})
    raise JobError(Reason.MODEL_UNSUPPORTED, f"{source} holds no weights to train: {_instead(paths)}.")


def adapter_files(paths: Iterable[str], *, source: str) -> list[str]:
    """A PEFT adapter's configuration and weights.

    Raises:
        JobError: ModelNotFound when `source` is no adapter.
    """
    paths = set(paths)
    weights = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in paths]
    if "adapter_config.json" not in paths or not weights:
        raise JobError(
            Reason.MODEL_NOT_FOUND,
            f"{source} is no PEFT adapter, which has adapter_config.json and adapter_model.safetensors: "
            "name the folder that has both.",
        )
    return ["adapter_config.json", weights[0]]


def _instead(paths: list[str]) -> str:
    if "adapter_config.json" in paths:
        return "it is an adapter, name its base model and give it as initial_adapter_model_ckpt_path"
    if any(path.endswith(".gguf") for path in paths):
        return "GGUF is for inference only, name the original model"
    return "name a model with model.safetensors"
