"""GGUF files, llama.cpp's format, made into ordinary model folders: everything behind this reads one format only.

transformers dequantizes the weights and rebuilds configuration and tokenizer from the file's metadata. All three may
differ from the original model's, which the warnings say.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.storage.errors import local_errors, require_space
from finetune_trainer.storage.model_files import is_vocabulary

_log = logging.getLogger(__name__)

_LAYOUT = 1
"""Raised when the folders' content changes, so that one made by an older version is not taken for it."""
_FLOATS = {"F32", "F16", "BF16"}
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class GgufFacts:
    """What is known of a file before its weights are read."""

    quantization: str | None
    """What the file calls it (Q4_K_M), None for plain floats."""
    pre_tokenizer: str | None
    """Name of a way to cut text that transformers does not know."""

    def warnings(self, name: str, *, own_tokenizer: bool) -> list[str]:
        """What the user should know, a sentence each."""
        found = []
        if self.quantization:
            found.append(
                f"{name} is quantized ({self.quantization}); its weights were dequantized, so the base model is an "
                "approximation of the original, and the adapter fits these weights; name the original model if you can."
            )
        if self.pre_tokenizer and not own_tokenizer:
            found.append(
                f"{name} cuts text in a way that transformers does not know ({self.pre_tokenizer!r}), so some text may "
                "become other tokens than in the original model: put the original's tokenizer.json and "
                "tokenizer_config.json beside the file."
            )
        return found


def read_facts(file: Path) -> GgufFacts:
    """Quantization and pre-tokenizer of `file`, from its head.

    Raises:
        JobError: ModelUnsupported, it is no GGUF file that can be read.
    """
    from gguf import LlamaFileType
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(file))
    except Exception as error:  # A foreign file can make a reader of binary data raise anything.
        raise _unreadable(file, error) from error
    number = metadata.get("general.file_type")
    names = {int(kind): kind.name.partition("_")[2] for kind in LlamaFileType}
    quantization = names.get(number if isinstance(number, int) else -1, "in a way that it does not name")
    pre = metadata.get("tokenizer.ggml.pre")
    known = metadata.get("tokenizer.ggml.model") != "gpt2" or pre in (None, "gpt-2") or pre in GGUF_PRE_TOKENIZER_SPLITS
    return GgufFacts(None if quantization in _FLOATS else quantization, None if known else str(pre))


def ordinary_folder(file: Path, root: Path, *, weights: bool) -> Path:
    """A model folder with the content of `file`, made below `root` when it is not there yet; the caller holds a lock.

    A tokenizer.json beside the file is taken instead of the file's own tokenizer.

    Args:
        file: the GGUF file.
        root: folder for such folders.
        weights: False makes configuration and tokenizer only.

    Raises:
        JobError: ModelUnsupported, transformers cannot read it; DiskFull.
    """
    import torch
    import transformers

    # In the precision that this machine trains in: a second rounding on the way would change the weights.
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    beside = _tokenizer_beside(file)
    key = [_LAYOUT, transformers.__version__, str(dtype) if weights else None, *_rows([file, *beside])]
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    with local_errors(folder):
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=root))
    try:
        try:
            if weights:
                shutil.copytree(ordinary_folder(file, root, weights=False), scratch, dirs_exist_ok=True)
                _log.info("Dequantizing %s for training.", file.name)
                _write_weights(file, scratch, dtype)
            else:
                _write_tokenizer(file, beside, scratch)
        except (MemoryError, JobError):
            raise
        except Exception as error:  # As above: transformers raises whatever a foreign file leads it to.
            raise _unreadable(file, error) from error
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def has_own_tokenizer(file: Path) -> bool:
    """Whether a tokenizer lies beside `file` that is better than the one in it."""
    return bool(_tokenizer_beside(file))


def _tokenizer_beside(file: Path) -> list[Path]:
    if not (file.parent / "tokenizer.json").is_file():
        return []
    names = (path for path in sorted(file.parent.iterdir()) if path.is_file())
    return [path for path in names if path.name in _BESIDE or path.suffix == ".jinja" or is_vocabulary(path.name)]


def _write_tokenizer(file: Path, beside: list[Path], target: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    config.save_pretrained(target)
    if beside:
        for path in beside:
            shutil.copyfile(path, target / path.name)
        return
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).save_pretrained(target)


def _write_weights(file: Path, target: Path, dtype: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    config = AutoConfig.from_pretrained(target)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    require_space(target, parameters * dtype.itemsize, file.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        config=config,
        gguf_file=file.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        local_files_only=True,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise JobError(
            Reason.MODEL_UNSUPPORTED,
            f"{file.name} lacks {len(missing)} of the weights that transformers needs for {config.model_type} "
            f"({missing[0]}, …): name the original model.",
        )
    # The weights are plain numbers by now; the markers would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)


def _rows(files: Iterable[Path]) -> list[list[str | int]]:
    stats = ((path.resolve(), path.stat()) for path in files)
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _unreadable(file: Path, error: Exception) -> JobError:
    text = first_line(error)
    return JobError(
        Reason.MODEL_UNSUPPORTED,
        f"{file.name} cannot be read by transformers ({text.rstrip('.')}): name the original model.",
    )
