"""What must be known of a model's tokenizer before a row is tokenized: its BOS habit and its peculiarities."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from finetune_trainer.data.load_tokenizer import load_fast_tokenizer, unloadable
from finetune_trainer.data.tokenize import RowTokenizer


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer with the facts about it that formatting depends on."""

    tokenizer: Any
    """transformers' PreTrainedTokenizerFast."""
    automatic_bos: str | None
    """BOS text that the tokenizer puts in front by itself, or None."""

    def row_tokenizer(self) -> RowTokenizer:
        """A fresh RowTokenizer on this tokenizer's fast implementation."""
        # Tokens that are searched in normalized text are not cut out before everything else.
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token: text.content for token, text in added if not text.normalized}
        return RowTokenizer(self._backend(), special)

    def fingerprint(self) -> str:
        """Digest of everything that decides how text becomes ids."""
        text = f"{tokenizers.__version__} {self.automatic_bos!r} {self._backend().to_str()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def ids(self, text: str) -> list[int]:
        """Token ids of `text` alone."""
        return list(self._backend().encode_batch([text], add_special_tokens=False)[0].ids)

    def _backend(self) -> tokenizers.Tokenizer:
        backend: tokenizers.Tokenizer = self.tokenizer.backend_tokenizer
        # Some models are published with a tokenizer that cuts or pads whatever it is given.
        backend.no_truncation()
        backend.no_padding()
        return backend


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> ModelTokenizer:
    """The tokenizer in a model folder.

    Raises:
        JobError: ModelUnsupported, there is none, or none with a fast implementation that could be loaded or made.
    """
    tokenizer = load_fast_tokenizer(folder, trust_remote_code=trust_remote_code)
    with unloadable(folder):  # Some of what its files say is only looked at when a text is tokenized.
        return ModelTokenizer(tokenizer, automatic_bos(tokenizer))


def automatic_bos(tokenizer: Any) -> str | None:
    """The BOS text that `tokenizer` puts in front of every text by itself, or None."""
    if tokenizer.bos_token is None:
        return None
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else None
