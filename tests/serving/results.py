"""What was measured against the real server, as a table for people: formats by checks, and its own words of refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.serving.cases import CASES, Case

CHECKS = {
    "prompt": "prompt ids",
    "chat": "chat = PEFT",
    "ids": "completions of ids = PEFT",
    "text": "completions of text = PEFT",
    "stop": "ends without `stop`",
    "turns": "three turns",
    "effect": "differs from the base",
}
"""Column headings by key."""


@dataclass
class Results:
    """Filled by the tests."""

    cells: dict[tuple[str, str], str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    """What a server does not do, and what it says."""

    @contextmanager
    def measured(self, case: Case, check: str, held: str = "yes") -> Iterator[None]:
        """Within the block the check is made; `held` is what the table has when nothing was raised."""
        self.cells[case.name, check] = "**no**"
        yield
        self.cells[case.name, check] = held

    @property
    def complete(self) -> bool:
        """Whether every cell was filled."""
        return all((case.name, check) in self.cells for case in CASES for check in CHECKS)

    def markdown(self, version: str) -> str:
        """The page."""
        return "\n".join([*self._head(version), *self._table(), *self._refusals()]) + "\n"

    def _head(self, version: str) -> list[str]:
        return [
            "# Served by a real vLLM",
            "",
            f"vLLM {version} on a CPU in float32; tiny random base models with real tokenizers. Every adapter was",
            "trained by `make serve-test` on four conversations of three turns: twelve answers each.",
            "",
            "- *prompt ids*: what the server makes of the messages is `finetune preview`'s `inference_ids`.",
            "- *chat*, *completions*: the tokens of `/v1/chat/completions` and `/v1/completions` are PEFT's, greedily.",
            "  Text is sent with `add_special_tokens: false`.",
            "- *ends without `stop`*: the request names no stop. *by text*: no token of the model ends an answer, so",
            "  the request has to name it: vLLM does not read `stop_strings`.",
            "- *three turns*: each answer is sent back as it came, and each prompt begins with the ids of the prompt",
            "  and the answer before.",
            "",
        ]

    def _table(self) -> Iterator[str]:
        headings = ["adapter", "base", "prompt format", "r", "trained", *CHECKS.values()]
        yield f"| {' | '.join(headings)} |"
        yield "| " + " | ".join("---" for _ in headings) + " |"
        for case in CASES:
            about = [case.name, case.base, case.prompted, str(case.rank), case.targets]
            cells = [self.cells.get((case.name, check), "not run") for check in CHECKS]
            yield f"| {' | '.join([*about, *cells])} |"

    def _refusals(self) -> Iterator[str]:
        if self.words:
            yield from ("", "## What it does not do, and what it says", "")
        for what in sorted(self.words):
            yield f"- {what}: {self.words[what]}"
