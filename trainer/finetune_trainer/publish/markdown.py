"""Text of others in a Markdown page, where nothing of it can become markup or close what it stands in."""

from __future__ import annotations

import re

_BACKTICKS = re.compile("`+")


def one_line(text: str) -> str:
    """`text` with everything escaped that is no character to be seen, line breaks among it."""
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text)


def code(text: str) -> str:
    """`text` as code in running text."""
    text = one_line(text)
    mark = "`" * (longest_run(text) + 1)
    # A backtick at an end would be taken for one of the marks.
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{mark}{space}{text}{space}{mark}"


def block(language: str, text: str) -> str:
    """A block of code, whose fence nothing in it closes."""
    fence = "`" * max(3, longest_run(text) + 1)
    return "\n".join([fence + language, text.rstrip("\n"), fence])


def longest_run(text: str) -> int:
    """How many backticks follow each other in `text` at most."""
    return max((len(run) for run in _BACKTICKS.findall(text)), default=0)
