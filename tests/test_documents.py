"""Links of the Markdown files inside the repository lead somewhere, to the very heading; tests that they name exist."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "node_modules" for part in path.relative_to(ROOT).parts)
)

_FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """What GitHub calls the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in _HEADING.findall(_FENCED.sub("", path.read_text())):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return frozenset(found)


def broken(page: Path) -> list[str]:
    """Links of `page` to files and headings that are not there."""
    text = _CODE.sub("", _FENCED.sub("", page.read_text()))
    faults = []
    for link in _LINK.findall(text):
        place, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", place):
            continue
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            faults.append(link)
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_link_to_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n[a](#one-two-three) [b](page.md#one) [c](none.md) `[d](none.md)`\n")
    assert broken(page) == ["page.md#one", "none.md"]


def missing_tests(page: Path) -> list[str]:
    """Tests that `page` names and that are not there."""
    return [
        f"{file}::{name}" if name else file
        for file, name in _TEST.findall(page.read_text())
        if not (ROOT / file).exists() or (name and f"\ndef {name}(" not in (ROOT / file).read_text())
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_holds_a_promise_exists(page: Path) -> None:
    assert missing_tests(page) == []


def test_a_test_that_is_not_there_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    there, gone = "tests/test_documents.py::test_what_holds_a_promise_exists", "tests/test_documents.py::test_nothing"
    page.write_text(f"`tests/test_documents.py` `{there}` `{gone}` `tests/gone.py`")
    assert missing_tests(page) == [gone, "tests/gone.py"]
