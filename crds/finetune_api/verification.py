"""What the process that verifies an adapter says last, as its termination message; its exit code says the same.

The operator reads it into the condition Verified of the FineTuneJob.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict

from finetune_api.outcome import TERMINATION_MESSAGE_LIMIT_BYTES, parse_cut, sayable

AS_TRAINED, NOT_AS_TRAINED, COULD_NOT_TELL = 0, 1, 2
"""Exit codes."""


class VerificationMessage(BaseModel):
    """One verdict."""

    model_config = ConfigDict(extra="ignore")

    verified: bool | None
    """None: it could not be told."""
    message: Annotated[str, BeforeValidator(sayable)] = ""
    """One sentence for the person who applied the job."""

    @property
    def exit_code(self) -> int:
        """That goes with it."""
        return COULD_NOT_TELL if self.verified is None else AS_TRAINED if self.verified else NOT_AS_TRAINED

    def to_bytes(self) -> bytes:
        """UTF-8 JSON of at most TERMINATION_MESSAGE_LIMIT_BYTES; a message too long for that is shortened with "…"."""
        data, message = self.model_dump_json().encode(), self.message
        while len(data) > TERMINATION_MESSAGE_LIMIT_BYTES:
            message = message[: len(message) * 3 // 4]
            data = self.model_copy(update={"message": message + "…"}).model_dump_json().encode()
        return data

    @classmethod
    def parse(cls, data: bytes | str) -> Self | None:
        """The message in `data`, or None when it is not one: another program's last words.

        Of a text that was cut off within its sentence the rest is read.
        """
        return parse_cut(cls, data, before_sentence="verified")
