"""Answers with a base model and an adapter, from the adapter's folder alone: its own template and its own stops.

What is generated here is what any server that reads the same files generates; nothing of the job is needed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from finetune_api.outcome import Reason
from finetune_trainer.conversation import Answer
from finetune_trainer.data.end_of_turn import answer_tails
from finetune_trainer.data.render import TemplateRenderer
from finetune_trainer.errors import JobError
from finetune_trainer.launch.elastic import NodeSettings, worker_defaults
from finetune_trainer.published.base import Base, fetch_base, load_tokenizer_of, put_adapter, quantization_of
from finetune_trainer.published.folder import open_adapter
from finetune_trainer.published.stops import Stops, message_in
from finetune_trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch


class ChatModel:
    """A model that answers conversations greedily, so that the same question has the same answer."""

    def __init__(self, model: Any, tokenizer: Any, stops: Stops, notices: Sequence[str] = ()) -> None:
        self.notices = tuple(notices)
        """What to know of what was loaded, a sentence each."""
        self._model = model
        self._tokenizer = tokenizer
        self._stops = stops

    @classmethod
    def load(
        cls,
        address: str | Path,
        *,
        base_model: str | None = None,
        with_adapter: bool = True,
        trust_remote_code: bool = False,
    ) -> Self:
        """The model in an adapter's folder, or in an ordinary model folder.

        Args:
            address: folder with adapter_config.json, or a job's with `adapter` in it, or s3://, pvc://, a Hub name;
                or a folder with config.json and weights.
            base_model: base weights (folder, s3:// or Hub id) instead of those that the adapter was trained on.
            with_adapter: False answers with the base model alone, prompted in the same way.
            trust_remote_code: whether the base model's own code may run.

        Raises:
            JobError: there is no adapter or model, it is damaged or was changed, or its base model cannot be had,
                loaded, or does not fit it.
        """
        with quiet_libraries(), tempfile.TemporaryDirectory(prefix="finetune-chat-") as scratch:
            return cls._load(str(address), Path(scratch), base_model, with_adapter, trust_remote_code)

    @classmethod
    def _load(cls, address: str, scratch: Path, base_model: str | None, with_adapter: bool, trusted: bool) -> Self:
        import torch
        from transformers import GenerationConfig

        from finetune_trainer.model.load import load_model, training_dtype

        _use_available_cores()
        found = Path(address).expanduser()
        adapter, notices = None, list[str]()
        if not _is_model(found):
            adapter = open_adapter(address, scratch, weights=with_adapter)
            found = adapter.path
            check_unchanged(found, address)
        tokenizer = load_tokenizer_of(found, address)
        if tokenizer.chat_template is None:
            raise JobError(
                Reason.INVALID_SPEC, f"{address} has no chat template, so it is not known how the model is prompted."
            )
        weights, name, quantization = found, address, None
        if adapter is not None:
            base, fetched = fetch_base(adapter, Base(base_model) if base_model else None, trust_remote_code=trusted)
            weights, name = fetched.path, base.address
            notices += fetched.warnings
            quantization = quantization_of(adapter)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(
            weights,
            dtype=training_dtype(device),
            trust_remote_code=trusted,
            name=name,
            notices=notices,
            quantization=quantization,
            device=device,
        )
        model.config.use_cache = True
        # The base model's own stops and sampling must not be merged into what the folder declares.
        model.generation_config = GenerationConfig()
        if adapter is not None and with_adapter:
            model = put_adapter(model, adapter, name)
        model.eval()
        tails = answer_tails(TemplateRenderer(tokenizer))
        return cls(model, tokenizer, Stops.read(found, tokenizer.eos_token_id, tails[0] if tails else ""), notices)

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """As `Answerer.answer`.

        Raises:
            JobError: InvalidSpec, the template cannot render `messages`; ContextTooLong, they do not fit the model.
        """
        import torch
        import transformers

        prompt, ids = self._prompt(messages)
        self._check_length(len(ids))
        prompt_ids = torch.tensor([ids], device=self._model.device)  # (1, prompt)
        reader = _Reader(self._tokenizer, self._stops, on_text)
        config = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._stops.token_ids) or None,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            self._model.generate(
                input_ids=prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                generation_config=config,
                streamer=reader,
                stopping_criteria=[reader.stopped],
            )
        text = reader.finish()
        return Answer(text, reader.said, prompt, len(reader.ids), "stop" if reader.ended else "length")

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]]:
        from jinja2 import TemplateError

        conversation = [dict(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise JobError(Reason.INVALID_SPEC, f"The chat template refuses this conversation: {error}") from error
        return text, list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_length(self, length: int) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise JobError(
                Reason.CONTEXT_TOO_LONG,
                f"The conversation has {length} tokens and the model takes {limit}: make it shorter.",
            )


class _Reader:
    """Collects generated tokens, in the shape of transformers' streamers."""

    def __init__(self, tokenizer: Any, stops: Stops, on_text: Callable[[str], None] | None) -> None:
        self.ids: list[int] = []
        self.ended = False
        self.said = ""
        """What was generated before the stop."""
        self._tokenizer = tokenizer
        self._stops = stops
        self._on_text = on_text
        self._shown = 0
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt's ids, shape (1, prompt), then one generated id at a time, shape (1,)."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids.extend(value.flatten().tolist())
        self._read(finished=False)

    def end(self) -> None:
        """Part of the streamer's interface; `finish` does the work."""

    def finish(self) -> str:
        """The whole message."""
        return self._read(finished=True)

    def stopped(self, input_ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
        """A stopping criterion: whether a stop text was generated. (1, sequence) -> (1,)."""
        import torch

        return torch.full((input_ids.shape[0],), self.ended, device=input_ids.device, dtype=torch.bool)

    def _read(self, *, finished: bool) -> str:
        ids = self.ids
        stop_token = bool(ids) and ids[-1] in self._stops.token_ids
        if stop_token:
            ids = ids[:-1]
        generated = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text, self.said, ended = message_in(generated, self._stops, ended=stop_token, finished=finished)
        self.ended = self.ended or ended
        if self._on_text is not None and len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)
        return text


def check_unchanged(folder: Path, name: str) -> None:
    """Refuse a published folder whose files are not those of its manifest; one without a manifest is taken as it is.

    Raises:
        JobError: StorageNotFound, says which.
    """
    from finetune_trainer.storage import MANIFEST_NAME
    from finetune_trainer.verify.files import check_files
    from finetune_trainer.verify.report import Status

    if not (folder / MANIFEST_NAME).is_file():
        return
    check, _ = check_files(folder)
    if check.status is Status.FAULT:
        raise JobError(
            Reason.STORAGE_NOT_FOUND,
            f"{name} is not as it was published, {check.message}; or remove {MANIFEST_NAME} to use it as it is.",
        )


def _is_model(folder: Path) -> bool:
    adapters = (folder / "adapter_config.json", folder / "adapter" / "adapter_config.json")
    return (folder / "config.json").is_file() and not any(file.is_file() for file in adapters)


def _use_available_cores() -> None:
    """As many threads as this process may use: in a container torch counts the cores of the whole machine."""
    import torch

    defaults = worker_defaults(NodeSettings(nproc=1, alone=True), os.environ)
    if "OMP_NUM_THREADS" in defaults:
        torch.set_num_threads(int(defaults["OMP_NUM_THREADS"]))
