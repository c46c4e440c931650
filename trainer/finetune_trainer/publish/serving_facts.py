"""What there is to know of an adapter before it is served."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune_api.prompt_format import Message, PromptFormat
from finetune_api.rules_lora import EMBEDDINGS_AND_HEADS, VLLM_RANKS

TEMPLATE = "chat_template.jinja"
QUESTION = "What is 1+1?"
"""What the examples ask."""


@dataclass(frozen=True, kw_only=True)
class ServingFacts:
    """What the notes are made of."""

    name: str
    """What a server calls the adapter."""
    base: str | None = None
    """The base model's name on the Hub, if it has one."""
    revision: str | None = None
    """Commit of the base model that was trained on."""
    rank: int
    """The largest of any layer."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    stop_texts: tuple[str, ...] = ()
    """Stops that no token stands for: only text can be compared with them."""
    texts_of_ids: tuple[str, ...] = ()
    """What the tokens of `stop_ids` are called."""
    special: frozenset[str] = frozenset()
    """Tokens that a server leaves out of what it answers."""
    bos: str | None = None
    """BOS that the tokenizer puts in front by itself."""
    prompt_format: PromptFormat | None = None
    """None where the tokenizer's own template was trained."""
    context_length: int | None = None
    """Longest row that was trained, in tokens."""
    quantization: str | None = None
    """Of the base model while it was trained on: nf4, int8, or none."""
    left_out: tuple[str, ...] = ()
    """Layers that were not quantized, as transformers takes them; empty where it leaves out the same by itself."""
    tensors: tuple[str, ...] = field(default=(), repr=False)
    """Names of the adapter's tensors."""

    @property
    def server_rank(self) -> int | None:
        """What vLLM's --max-lora-rank has to be; None where it serves no such rank."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)

    @property
    def embeddings(self) -> list[str]:
        """Embeddings and output heads that the adapter changes."""
        return sorted({part for name in self.tensors for part in name.split(".")} & EMBEDDINGS_AND_HEADS)

    @property
    def experts(self) -> bool:
        """Whether it changes experts of a mixture."""
        return any("experts" in name.split(".") for name in self.tensors)

    @property
    def example_prompt(self) -> str | None:
        """The trained prompt that asks `QUESTION`, its BOS included; None where only the template knows."""
        if self.prompt_format is None:
            return None
        text = self.prompt_format.render_prompt([Message("user", QUESTION)])
        return text if not self.bos or text.startswith(self.bos) else self.bos + text

    def around_answer(self) -> tuple[str, str]:
        """The format's own text before and after an answer, as a client gets it from a server."""
        if self.prompt_format is None:
            return "", ""
        literals = self.prompt_format.literals
        before = literals.head[len(self.prompt_format.trailing_assistant) :]
        after = literals.tail
        stops = [place for stop in (*self.stop_texts, *self.texts_of_ids) if stop and (place := after.find(stop)) >= 0]
        return self._shown(before), self._shown(after[: min(stops, default=len(after))])

    def _shown(self, text: str) -> str:
        for token in sorted(self.special, key=len, reverse=True):
            text = text.replace(token, "")
        return text
