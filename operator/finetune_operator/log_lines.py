"""One record is one line of the log, whatever names, paths and answers of others it quotes.

Names of objects are harmless, but sentences of API servers, webhooks and exceptions are not: a line break in one would
let its author write lines in the operator's name, and an escape sequence would act on the terminal of who reads them.
"""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
INDENT = "    "
"""In front of a traceback's lines, so that none of them can pass for a record."""


def printable(text: str) -> str:
    """`text` with everything escaped that is no character to be seen: line breaks, controls, changes of direction."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class LineFormatter(logging.Formatter):
    """Formats a record as one line, and a traceback as indented lines below it."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """The record's line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:  # noqa: N802  logging's name
        """The lines of a traceback."""
        return _indented(super().formatException(ei))  # type: ignore[arg-type] # whatever logging hands on

    def formatStack(self, stack_info: str) -> str:  # noqa: N802  logging's name
        """The lines of a stack."""
        return _indented(super().formatStack(stack_info))


def set_up_logging() -> None:
    """Log to standard error, from INFO on; of kopf, warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("kopf").setLevel(logging.WARNING)


def _indented(text: str) -> str:
    return "\n".join(INDENT + printable(line) for line in text.splitlines())
