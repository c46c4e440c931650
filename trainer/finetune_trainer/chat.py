"""Answers with a base model and an adapter, from the adapter's folder alone: its own template and its own stops.

What is generated here is what any server that reads the same files generates; nothing of the job is needed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml

from finetune_api.generation import GenerationConfig as DeclaredGeneration
from finetune_api.outcome import Reason
from finetune_api.prompt_format import PromptFormat
from finetune_trainer.data.end_of_turn import answer_tails
from finetune_trainer.data.render import TemplateRenderer
from finetune_trainer.errors import JobError
from finetune_trainer.launch.elastic import NodeSettings, worker_defaults
from finetune_trainer.storage import fetch_model

if TYPE_CHECKING:
    import torch

PROMPT_FORMAT_FILE = "prompt_format.yaml"
"""The job's generation_config, verbatim, in an adapter's folder."""


@dataclass(frozen=True)
class Answer:
    """One answer of a model."""

    text: str
    """The assistant's message, without its end-of-turn."""
    prompt: str
    """The text the model was given."""
    tokens: int
    """Number of tokens generated, those of the end-of-turn included."""
    finish_reason: Literal["stop", "length"]
    """stop: the model ended its turn; length: it was cut off."""


@dataclass(frozen=True)
class Stops:
    """What ends an answer."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """Stops that are several tokens, matched as text."""
    end_of_turn: str = ""
    """The text that the format or template writes after an assistant's message; "" when it is not known."""

    @classmethod
    def read(cls, folder: Path, eos_token_id: int | None, end_of_turn: str = "") -> Self:
        """The stops that `folder` declares in generation_config.json and prompt_format.yaml.

        Args:
            folder: an adapter's or a model's.
            eos_token_id: what ends a text where no file says it.
            end_of_turn: the chat template's, for a folder that declares no format.

        Raises:
            JobError: InvalidSpec, one of the files is not what it should be.
        """
        import transformers

        try:
            config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
            ids, texts = config.eos_token_id, config.stop_strings
        except OSError:
            # A plain model folder may have none; its tokenizer then says where a text ends.
            ids, texts = eos_token_id, None
        declared = folder / PROMPT_FORMAT_FILE
        tail = end_of_turn
        if declared.is_file():
            try:
                content = yaml.safe_load(declared.read_text(encoding="utf-8"))
                generation = DeclaredGeneration.model_validate(content)
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise JobError(
                    Reason.INVALID_SPEC,
                    f"{declared} cannot be read as a generation_config: copy the adapter again.",
                ) from error
            if isinstance(generation.prompt_format, PromptFormat):
                tail = generation.prompt_format.end_of_turn
        return cls(_tuple(ids), _tuple(texts), tail)


def _tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def visible_text(generated: str, stops: Stops, *, finished: bool) -> tuple[str, bool]:
    """The part of `generated` that belongs to the message, and whether it ended with a stop.

    Args:
        generated: text so far, without the stop token if there was one.
        stops: the texts that end an answer.
        finished: True when nothing more comes; until then a part that may become a stop is held back.
    """
    found = [position for stop in stops.texts if (position := generated.find(stop)) >= 0]
    if found:
        return _without_tail(generated[: min(found)], stops.end_of_turn), True
    if finished:
        return generated, False
    held = max((_overlap(generated, text) for text in (*stops.texts, stops.end_of_turn)), default=0)
    text = generated[: len(generated) - held]
    # Half of a multi-byte character decodes to a replacement mark until its rest arrives.
    return text.rstrip("\ufffd"), False


def _without_tail(text: str, end_of_turn: str) -> str:
    """`text` without the beginning of the end-of-turn that its format writes before the stop (" " of " </s>")."""
    held = _overlap(text, end_of_turn)
    return text[: len(text) - held]


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is how `marker` begins."""
    return next((size for size in range(min(len(text), len(marker)), 0, -1) if text.endswith(marker[:size])), 0)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, libraries draw no bars and do not warn of what is meant or of what only they can change."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # adapter_config.json has a key that servers read and PEFT does not know.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments", category=UserWarning)
            # PEFT still uses names that transformers has changed.
            warnings.filterwarnings("ignore", message=".* is deprecated", category=FutureWarning)
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


class ChatModel:
    """A model that answers conversations greedily, so that the same question has the same answer."""

    def __init__(self, model: Any, tokenizer: Any, stops: Stops) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stops = stops

    @classmethod
    def load(cls, folder: str | Path, *, base_model: str | None = None, with_adapter: bool = True) -> Self:
        """The model in an adapter's folder, or in an ordinary model folder.

        Args:
            folder: folder with adapter_config.json, or with config.json and weights.
            base_model: base weights (folder, s3:// or Hub id) instead of those that the adapter names.
            with_adapter: False answers with the base model alone, prompted in the same way.

        Raises:
            JobError: no such folder, or the base model cannot be had; as `fetch_model`.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise JobError(Reason.MODEL_NOT_FOUND, f"There is no folder {folder}: name an adapter's folder.")
        with quiet_libraries():
            return cls._load(path, base_model, with_adapter=with_adapter)

    @classmethod
    def _load(cls, path: Path, base_model: str | None, *, with_adapter: bool) -> Self:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        config_file = path / "adapter_config.json"
        revision: str | None = None
        if config_file.is_file():
            from peft import PeftConfig

            config = PeftConfig.from_pretrained(str(path))
            base, revision = base_model or config.base_model_name_or_path, config.revision
            if not base:
                raise JobError(
                    Reason.MODEL_NOT_FOUND, f"{config_file} names no base model: give one with --base-model."
                )
        elif (path / "config.json").is_file():
            base, with_adapter = base_model or str(path), False
        else:
            raise JobError(
                Reason.MODEL_NOT_FOUND,
                f"{path} holds neither an adapter (adapter_config.json) nor a model (config.json): name the folder "
                "`adapter` of a finished job.",
            )
        _use_available_cores()
        weights = fetch_model(base, None if base_model else revision).path
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if tokenizer.chat_template is None:
            raise JobError(
                Reason.INVALID_SPEC, f"{path} has no chat template, so it is not known how the model is prompted."
            )
        model: Any = AutoModelForCausalLM.from_pretrained(weights, dtype=_dtype(), local_files_only=True)
        # The base model's own stops and sampling must not be merged into what the folder declares.
        model.generation_config = GenerationConfig()
        if with_adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(path))
        model.to(_device()).eval()
        tails = answer_tails(TemplateRenderer(tokenizer))
        return cls(model, tokenizer, Stops.read(path, tokenizer.eos_token_id, tails[0] if tails else ""))

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """The model's next message.

        Args:
            messages: `{"role", "content"}` each, the last one the user's.
            max_new_tokens: longest answer, in tokens.
            on_text: receives the answer piece by piece while it is generated.

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
        return Answer(reader.finish(), prompt, len(reader.ids), "stop" if reader.ended else "length")

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
        if stop_token:
            text, self.ended = _without_tail(generated, self._stops.end_of_turn), True
        else:
            text, ended = visible_text(generated, self._stops, finished=finished)
            self.ended = self.ended or ended
        if self._on_text is not None and len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)
        return text


def _use_available_cores() -> None:
    """As many threads as this process may use: in a container torch counts the cores of the whole machine."""
    import torch

    defaults = worker_defaults(NodeSettings(nproc=1, alone=True), os.environ)
    if "OMP_NUM_THREADS" in defaults:
        torch.set_num_threads(int(defaults["OMP_NUM_THREADS"]))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype() -> torch.dtype:
    """bfloat16 on GPUs; float32 on CPUs, most of which compute bfloat16 a hundred times more slowly."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
