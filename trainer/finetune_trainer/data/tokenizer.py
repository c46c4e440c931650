"""What must be known of a model's tokenizer before a row is tokenized: its BOS habit, its stops, its peculiarities."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from finetune_api.generation import GenerationConfig
from finetune_api.prompt_format import PromptFormat
from finetune_trainer.data.load_tokenizer import load_fast_tokenizer
from finetune_trainer.data.tokenize import RowTokenizer

_TAG = re.compile(r"</?[\w|]+>|<\|[^|<>]+\|>|\[/?[A-Z_]+\]")
"""Text that looks as if its author took it for a special token."""


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
    return ModelTokenizer(tokenizer, automatic_bos(tokenizer))


def automatic_bos(tokenizer: Any) -> str | None:
    """The BOS text that `tokenizer` puts in front of every text by itself, or None."""
    if tokenizer.bos_token is None:
        return None
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else None


def tokenizer_warnings(model: ModelTokenizer, generation: GenerationConfig) -> list[str]:
    """What the declared format means to this tokenizer that its author may not expect, a sentence each."""
    prompt_format = generation.prompt_format
    if not isinstance(prompt_format, PromptFormat):
        return _template_warnings(model)
    found = []
    tokenizer = model.tokenizer
    eos = tokenizer.eos_token
    tail = prompt_format.end_of_turn
    stops = [stop for stop in generation.stopping_sequences or [] if stop in tail]
    # Tags around an answer that a special token ends (`</answer><|eot_id|>`) need not stop anything.
    tags = dict.fromkeys([*(_TAG.findall(tail) if _special_token(model, tail) is None else []), *stops])
    for tag in tags:
        count = len(model.ids(tag))
        if count > 1:
            instead = f"; its own end-of-sequence token is {eos!r}" if eos else ""
            found.append(
                f"{tag!r} in the assistant text is no special token of this model's tokenizer, which makes {count} "
                f"ordinary tokens of it: the model learns to write it out and must be stopped by text{instead}."
            )
    if tail.strip() and not tags and _special_token(model, tail) is None:
        found.append(
            f"the assistant text ends with {tail!r}, which is neither a special token of this model's tokenizer nor in "
            f"stopping_sequences: nothing stops the model there{f'; consider {eos!r}' if eos else ''}."
        )
    bos = tokenizer.bos_token
    if prompt_format.bos.strip() and bos and prompt_format.bos.strip() != bos and len(model.ids(prompt_format.bos)) > 1:
        found.append(f"bos {prompt_format.bos!r} is no special token of this model's tokenizer; its own is {bos!r}.")
    return found


def _template_warnings(model: ModelTokenizer) -> list[str]:
    if model.automatic_bos is None or not model.tokenizer.chat_template:
        return []
    try:
        text = model.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except Exception:  # Rows are refused with the template's own words; here it only goes unwarned.
        return []
    if text.startswith(model.automatic_bos):
        return []
    warning = (
        f"the tokenizer's chat template does not write the BOS {model.automatic_bos!r} that the tokenizer adds to "
        "plain text: rows are trained without it, since servers prompt with what the template writes."
    )
    return [warning]


def single_token_stops(model: ModelTokenizer, generation: GenerationConfig) -> tuple[list[int], list[str]]:
    """(token ids, texts) that end an answer: stops that are one token, and those that must be matched as text."""
    ids = list(generation.stopping_tokens or [])
    texts = []
    prompt_format = generation.prompt_format
    tail = prompt_format.end_of_turn if isinstance(prompt_format, PromptFormat) else ""
    trained = _special_token(model, tail) or next(iter(_TAG.findall(tail)), None)
    for stop in dict.fromkeys([*(generation.stopping_sequences or []), *([trained] if trained else [])]):
        found = model.ids(stop)
        if len(found) == 1 and found[0] in model.tokenizer.added_tokens_decoder:
            ids.append(found[0])
        else:
            texts.append(stop)
    return list(dict.fromkeys(ids)), texts


def _special_token(model: ModelTokenizer, tail: str) -> str | None:
    """The first special token in `tail`, where the model stops."""
    added = model.tokenizer.added_tokens_decoder
    return next((str(added[token].content) for token in model.ids(tail) if token in added), None)
