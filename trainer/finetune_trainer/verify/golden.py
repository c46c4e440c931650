"""golden.jsonl: prompts with the answers that the trained adapter gave to them, so that any server can be asked again.

One case per line. The file travels with adapters from foreign places, so what is read is bounded and checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

GOLDEN = "golden.jsonl"
FILE_LIMIT_BYTES = 1 << 20
LINE_LIMIT_BYTES = 96 << 10
PROMPT_LIMIT_TOKENS = 2048
ANSWER_LIMIT_TOKENS = 64
BASE_TOKENS = 16
"""Tokens of the base model's own answer that are kept: enough to know it by."""
LOGPROB_TOKENS = 8
_CASES = 64

Id = Annotated[int, Field(ge=0, lt=2**31)]
Nats = Annotated[float, Field(allow_inf_nan=False)]
Answer = Annotated[list[Id], Field(min_length=1, max_length=ANSWER_LIMIT_TOKENS)]


class GoldenMessage(BaseModel):
    """One message of a conversation, as clients send it."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class GoldenCase(BaseModel):
    """A conversation up to a user's message, and what the adapter and its base model answered, greedily."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    dtype: str = Field(pattern=r"^[a-z0-9_]{1,16}$")
    """Precision in which the answers were computed, in torch's words."""
    messages: list[GoldenMessage] = Field(min_length=1)
    prompt: str
    """The messages as the model was trained on them, up to where it answers."""
    prompt_ids: list[Id] = Field(min_length=1, max_length=PROMPT_LIMIT_TOKENS)
    ids: Answer
    """The answer, with the token that ends it."""
    text: str
    """What a client sees of it: without special tokens and without a stop text."""
    finish: Literal["stop", "length"]
    """stop: the answer ended; length: it was cut off after the last of `ids`."""
    logprobs: list[Nats] = Field(min_length=1, max_length=ANSWER_LIMIT_TOKENS)
    """Of the first tokens."""
    margins: list[Nats]
    """By how many nats each token was better than the second best: near 0 another precision may choose otherwise."""
    scale: Nats = Field(ge=0)
    """The largest logit of a token of the two answers: rounding is relative to it."""
    base_ids: Answer
    """How the base model without the adapter begins its answer to the same prompt."""
    base_text: str
    base_logprobs: list[Nats] = Field(min_length=1, max_length=ANSWER_LIMIT_TOKENS)
    base_margins: list[Nats]
    stop_token_ids: list[Id] = Field(max_length=1024)
    """Tokens that end an answer."""
    stop_texts: list[str] = Field(max_length=256)
    """Texts of several tokens that end an answer; a server has to be sent them with each request."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(self.margins) != len(self.ids) or len(self.base_margins) != len(self.base_ids):
            raise ValueError("there is not a margin for each token")
        if len(self.logprobs) > len(self.ids) or len(self.base_logprobs) > len(self.base_ids):
            raise ValueError("there are more log-probs than tokens")
        return self

    def line(self) -> bytes:
        """The case as one line of the file."""
        return self.model_dump_json().encode() + b"\n"


def read_golden(folder: Path) -> list[GoldenCase]:
    """The cases in an adapter's folder; none where it has no such file.

    Raises:
        JobError: InvalidSpec, the file is not what the trainer writes.
    """
    path = folder / GOLDEN
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})") from error
    if len(data) > FILE_LIMIT_BYTES:
        raise _refused(path, f"has more than {FILE_LIMIT_BYTES:,} bytes")
    lines = data.splitlines()
    if not 1 <= len(lines) <= _CASES:
        raise _refused(path, f"has {len(lines)} lines, where 1 to {_CASES} are expected")
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1)]


def _parsed(path: Path, number: int, line: bytes) -> GoldenCase:
    try:
        return GoldenCase.model_validate_json(line, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][:3])
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise _refused(path, f"cannot be understood at line {number} ({what[:200]})") from error


def _refused(path: Path, what: str) -> JobError:
    return JobError(
        Reason.INVALID_SPEC, f"{path} {what}: copy the adapter again, or use the version of finetune that wrote it."
    )
