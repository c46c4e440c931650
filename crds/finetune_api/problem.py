"""What is wrong or noteworthy about a job, as data: the command line prints it, the operator turns it into events."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Problem:
    """One sentence about one place."""

    path: str
    """Dotted keys from the top of the file, as in `spec.lora_config.r`; empty for the file as a whole."""
    message: str
    """One sentence: what is the matter and what to write instead."""

    def below(self, prefix: str) -> Problem:
        """The same, seen from outside of `prefix`."""
        if not prefix:
            return self
        return replace(self, path=f"{prefix}.{self.path}" if self.path else prefix)

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message
