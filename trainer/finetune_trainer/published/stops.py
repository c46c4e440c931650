"""What ends an answer by the files of a published folder, and which part of what was generated is its message."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orjson
import yaml

from finetune_api.answer_literals import AnswerLiterals, answer_literals
from finetune_api.generation import GenerationConfig
from finetune_api.outcome import Reason
from finetune_api.prompt_format import PromptFormat
from finetune_trainer.errors import JobError

GENERATION_FILE = "generation_config.json"
PROMPT_FORMAT_FILE = "prompt_format.yaml"
"""The job's generation_config, verbatim."""
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Stops:
    """What ends an answer, and what the format writes around it."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """Stops that are several tokens, matched as text."""
    literals: AnswerLiterals

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
        generation = _read_json(folder / GENERATION_FILE)
        ids = _listed(generation.get("eos_token_id", eos_token_id), int)
        declared = _declared_format(folder / PROMPT_FORMAT_FILE)
        literals = answer_literals("", end_of_turn, "") if declared is None else declared.literals
        return cls(tuple(ids), tuple(_listed(generation.get("stop_strings"), str)), literals)


def message_in(generated: str, stops: Stops, *, ended: bool, finished: bool) -> tuple[str, str, bool]:
    """The message in `generated`, what of it was generated before the stop, and whether it ended with a stop.

    Args:
        generated: text so far, without the stop token if there was one.
        stops: what ends an answer.
        ended: there was a stop token.
        finished: True when nothing more comes; until then a part that may become a stop, or text of the format, is
            held back.
    """
    literals = stops.literals
    found = [position for stop in stops.texts if (position := generated.find(stop)) >= 0]
    if found or ended:
        said = generated[: min(found)] if found else generated
        return literals.without(said), said, True
    if not finished and _may_become(generated, literals.starts):
        return "", generated, False
    start = next((start for start in literals.starts if generated.startswith(start)), "")
    text = generated[len(start) :]
    if finished:
        return text, generated, False
    held = max((_overlap(text, marker) for marker in (*stops.texts, literals.tail)), default=0)
    # Half of a multi-byte character decodes to a replacement mark until its rest arrives.
    return text[: len(text) - held].rstrip("\ufffd"), generated, False


def _may_become(generated: str, starts: tuple[str, ...]) -> bool:
    return any(len(generated) < len(start) and start.startswith(generated) for start in starts)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is how `marker` begins."""
    return next((size for size in range(min(len(text), len(marker)), 0, -1) if text.endswith(marker[:size])), 0)


def _declared_format(path: Path) -> PromptFormat | None:
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8") as stream:
            declared = GenerationConfig.model_validate(yaml.safe_load(stream.read(_LIMIT_BYTES)))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise JobError(
            Reason.INVALID_SPEC, f"{path} cannot be read as a generation_config: copy the adapter again."
        ) from error
    return declared.prompt_format if isinstance(declared.prompt_format, PromptFormat) else None


def _listed(value: Any, kind: type) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, kind) and not isinstance(each, bool) and each != ""]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = orjson.loads(file.read(_LIMIT_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise JobError(Reason.INVALID_SPEC, f"{path} cannot be read: copy the adapter again.") from error
    if not isinstance(content, dict):
        raise JobError(Reason.INVALID_SPEC, f"{path} is not what it should be: copy the adapter again.")
    return content
