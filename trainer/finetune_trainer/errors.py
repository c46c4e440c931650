"""The one exception for failures that were foreseen.

Whoever raises it has found the sentence the user needs. Everything else that escapes is an internal error.
"""

from __future__ import annotations

from finetune_api.outcome import EXIT_CODES, Reason
from finetune_api.problem import printable


class JobError(Exception):
    """A failure with a reason that machines read and one sentence that says what happened and what to do."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def exit_code(self) -> int:
        """1-127 when only the user can mend it, 128 and above when another try may succeed."""
        return EXIT_CODES[self.reason]

    def __reduce__(self) -> tuple[type[JobError], tuple[Reason, str]]:
        return type(self), (self.reason, self.message)


def first_line(error: BaseException) -> str:
    """What of a library's error fits into a sentence of ours."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], 300)
