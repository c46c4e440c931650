"""Nobody writes a line of the operator's log but the operator, whatever they call things or answer."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_operator.log_lines import INDENT, LineFormatter, printable

FORGED = "\n2030-01-02 03:04:05,678 INFO finetune_operator.app: all is well\x1b[2K\r"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LineFormatter())
    log = logging.getLogger("finetune_operator.test")
    log.addHandler(handler)
    yield written
    log.removeHandler(handler)


def lines(stream: io.StringIO) -> list[str]:
    """What was written, in lines as any reader may see them."""
    return stream.getvalue().splitlines()


def log() -> logging.Logger:
    return logging.getLogger("finetune_operator.test")


@pytest.mark.parametrize(
    "char", ["\n", "\r", "\x0b", "\x0c", "\x1b", "\x85", "\u2028", "\u2029", "\x00", "\x9b", "\u202e"]
)
def test_a_character_that_is_not_to_be_seen_is_written_out(stream: io.StringIO, char: str) -> None:
    log().warning("%s: %s", "team-a/guard", f"no{char}way")
    (line,) = lines(stream)
    assert line.isprintable()
    assert line.endswith(r"way")
    assert "\\" in line


def test_text_of_every_language_stays_as_it_is() -> None:
    assert printable("Zürich: 模型 не найдена – “ok”") == "Zürich: 模型 не найдена – “ok”"


def test_an_exception_cannot_pass_for_a_record(stream: io.StringIO) -> None:
    log().error("Looking at %s failed.", FORGED, exc_info=ValueError(FORGED))
    first, *rest = lines(stream)
    assert "Looking at " in first
    assert len(rest) >= 2
    assert all(line.startswith(INDENT) and line.isprintable() for line in rest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.lists(st.text(), max_size=3))
def test_a_record_is_one_line_whatever_is_in_it(stream: io.StringIO, message: str, arguments: list[str]) -> None:
    stream.seek(0)
    stream.truncate()
    log().warning("%s" * len(arguments) + message.replace("%", "%%"), *arguments)
    if not arguments:  # nothing is filled in then
        message = message.replace("%", "%%")
    (line,) = lines(stream)
    assert line.isprintable()
    assert line.endswith(printable("".join(arguments) + message))


def test_the_operator_logs_so_from_its_first_line() -> None:
    code = (
        "import logging; from finetune_operator import log_lines; log_lines.set_up_logging();"
        f"logging.getLogger('aiohttp.server').error('%s', {FORGED!r}); logging.getLogger('kopf').info('silent')"
    )
    written = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    (line,) = written.splitlines()
    assert line.isprintable()
