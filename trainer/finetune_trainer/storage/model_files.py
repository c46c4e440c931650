"""Which files of a model repository are needed: repositories carry the same weights in several formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

Select = Callable[[Iterable[str]], list[str]]
"""Takes the relative paths of a repository's files, returns the ones to fetch."""

_TOKENIZER = re.compile(
    r"(?:[^/]*\.json|[^/]*\.jinja|additional_chat_templates/[^/]*\.jinja|[^/]*\.(?:model|tiktoken|spm|vocab|tokenizer)|"
    r"merges\.txt|vocab\.txt)"
)
"""Tokenizer, templates and configuration: all small. `*.json` includes the configuration of the weights."""
INDEX = re.compile(r"[^/]*\.index\.json")
_READ_FIRST = "model.safetensors.index.json"
"""The list of shards that is read before any of them, since it tells what is missing."""
WEIGHTS = (".safetensors", ".bin", ".gguf")
READ_WHOLE_BYTES = 64 << 20
"""Larger files are not read as a whole to see whether they are what they were."""
_VOCABULARIES = (".model", ".tiktoken", ".spm", ".vocab", ".tokenizer")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_NO_MODEL = re.compile(r"(^|/)(mmproj|imatrix)|imatrix\.gguf$|mmproj[^/]*\.gguf$")
"""A vision tower and the statistics of a quantization, in the same format."""
_FORMATS = (
    # (whole file, index of the shards, shards). `consolidated.*` and adapters are other things in the same format.
    ("model.safetensors", "model.safetensors.index.json", re.compile(r"(?!consolidated|adapter)[^/]*\.safetensors")),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", re.compile(r"pytorch_model[^/]*\.bin")),
)


def tokenizer_files(
    paths: Iterable[str], *, source: str = "", code: bool = False, gguf: str | None = None
) -> list[str]:
    """Everything but weights, and the list of them; Python files only where the job trusts them.

    A GGUF file brings weights, tokenizer and configuration in one. Arguments and errors as for `model_files`.
    """
    paths = sorted(paths)
    needed = [
        path
        for path in paths
        if (_TOKENIZER.fullmatch(path) and (path == _READ_FIRST or not INDEX.fullmatch(path)))
        or (code and path.endswith(".py"))
    ]
    file = gguf_file(paths, source=source, named=gguf)
    return sorted([*needed, file]) if file else needed


def is_vocabulary(path: str) -> bool:
    """Whether `path` is a vocabulary in one of the forms that tokenizer.json replaces."""
    return path.startswith(("vocab", "merges", "tekken")) or path.endswith(_VOCABULARIES)


def model_files(paths: Iterable[str], *, source: str, code: bool = False, gguf: str | None = None) -> list[str]:
    """Tokenizer files, the card, and the weights in one format: safetensors before PyTorch's before GGUF.

    Args:
        paths: All files of the repository `source`.
        source: Its name, for the message.
        code: Whether its Python files are needed too (trust_remote_code).
        gguf: The GGUF file among them that is asked for by name.

    Raises:
        JobError: ModelUnsupported when there are no weights that can be trained; ModelNotFound when there are several
            GGUF files to choose from, or none of that name.
    """
    paths = sorted(paths)
    needed = set(tokenizer_files(paths, source=source, code=code, gguf=gguf))
    # The adapter's card repeats the licence that the model's card declares.
    needed |= {"README.md"} & set(paths)
    if any(path.endswith(".gguf") for path in needed):
        return sorted(needed)
    for whole, index, shards in _FORMATS:
        if whole in paths:
            return sorted(needed | {whole})
        if index in paths:
            return sorted(needed | {index} | {path for path in paths if shards.fullmatch(path)})
    raise JobError(Reason.MODEL_UNSUPPORTED, f"{source} holds no weights to train: {_instead(paths)}.")


def gguf_file(paths: Iterable[str], *, source: str, named: str | None = None) -> str | None:
    """The GGUF file that holds the weights: the one that is named, or the only one where there is no other format.

    Raises:
        JobError: ModelNotFound or ModelUnsupported, as `model_files`.
    """
    paths = sorted(paths)
    files = [path for path in paths if path.endswith(".gguf") and not _NO_MODEL.search(path)]
    if named is None:
        if not files or any(whole in paths or index in paths for whole, index, _ in _FORMATS):
            return None
        if len(files) > 1 and not all(_PART.search(path) for path in files):
            raise JobError(
                Reason.MODEL_NOT_FOUND, f"{source} holds several GGUF files: write {source}/ and one of {_some(files)}."
            )
        named = files[0]
    if _PART.search(named):
        raise JobError(
            Reason.MODEL_UNSUPPORTED,
            f"The weights of {source} are split into several GGUF files ({named}, …), which transformers does not "
            "read: join them with llama-gguf-split --merge, or name the original model.",
        )
    if named not in paths:
        there = f" among {_some(files)}" if files else ""
        raise JobError(Reason.MODEL_NOT_FOUND, f"{source} has no file {named}{there}: correct the name.")
    return named


def _some(files: list[str], limit: int = 20) -> str:
    return ", ".join(files[:limit]) + (f" and {len(files) - limit} more" if len(files) > limit else "")


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
    return "name a model with model.safetensors"
