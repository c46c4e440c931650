"""What ends an answer by the files of an adapter's folder, and what a client sees of an answer that has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.published.stops import Stops


@dataclass(frozen=True)
class AnswerEnds:
    """The stops of an adapter, and the tokenizer that reads its answers."""

    tokenizer: Any
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """Stops of several tokens, matched as text."""

    def by_text(self, ids: Sequence[int]) -> bool:
        """Whether a stop text was generated."""
        return bool(self.texts) and any(text in self._decoded(ids, special=True) for text in self.texts)

    def visible(self, ids: Sequence[int]) -> tuple[str, bool]:
        """What a client sees of the answer `ids`, and whether it has ended."""
        ended = bool(ids) and ids[-1] in self.token_ids
        text = self._decoded(ids[:-1] if ended else ids, special=False)
        found = [position for stop in self.texts if (position := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, ended)

    def _decoded(self, ids: Sequence[int], *, special: bool) -> str:
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )


def read_ends(folder: Path, tokenizer: Any) -> AnswerEnds:
    """The stops that the generation_config.json of an adapter's folder declares.

    Raises:
        JobError: InvalidSpec, a file is not what it should be.
    """
    stops = Stops.read(folder, tokenizer.eos_token_id)
    return AnswerEnds(tokenizer, stops.token_ids, stops.texts)
