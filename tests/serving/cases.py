"""The adapters that a real server is asked about: formats, tokenizers, ranks, targets and architectures.

Those of one base model are served together. The first of them gives the server its chat template and its stops, as
somebody with one adapter would; the others send their template with each request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.api.formats import GUARD_2, LLAMA_3, native_format
from tests.trainer.run.tiny_job import CHATML

INST: dict[str, Any] = {
    "system": "{instruction}\n\n",
    "user": "[INST] {system}{instruction} [/INST]",
    "assistant": " {instruction} </s>",
    "system_in_user": True,
}


@dataclass(frozen=True)
class Case:
    """One adapter."""

    name: str
    """Its name at the server, too."""
    base: str
    """Key of `bases.BASES`."""
    prompted: str
    """Its format, for people."""
    generation: dict[str, Any]
    rank: int
    lora: dict[str, Any] = field(default_factory=dict)
    """lora_config beside the rank."""
    learning_rate: float = 1e-2
    epochs: int = 50
    """Optimizer steps: all rows are in each."""
    by_text: bool = False
    """No token ends an answer."""

    @property
    def targets(self) -> str:
        """What is trained, for people."""
        found = self.lora.get("target_modules", "all-linear")
        found = found if isinstance(found, str) else ", ".join(found)
        extras = [key for key in ("use_rslora", "experts") if self.lora.get(key)]
        return "; ".join([found, *extras])


def _declared(prompt_format: Any, *stops: str) -> dict[str, Any]:
    dumped = prompt_format if isinstance(prompt_format, dict) else prompt_format.model_dump()
    return {"prompt_format": dumped, "stopping_sequences": list(stops)}


_ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
_MISTRAL = native_format("mistralai/Mistral-7B-Instruct-v0.1")

CASES = (
    Case(
        *("pass-through", "llama", "`{instruction} </s>`, a token to nobody there", _declared(GUARD_2, "</s>"), 16),
        lora=_ATTENTION,
        learning_rate=2e-2,
        epochs=120,
        by_text=True,
    ),
    Case("chatml", "llama", "ChatML", _declared(CHATML), 8),
    Case(
        "own-template",
        "llama",
        "the tokenizer's own template",
        {"prompt_format": {"use_hugging_face_chat_template": True}},
        24,
    ),
    Case("llama-3", "untied-llama", "Llama 3 headers", _declared(LLAMA_3, "<|eot_id|>"), 12),
    Case(
        *("llama-3-rslora", "untied-llama", "Llama 3 headers, no `bos`"),
        *(_declared(LLAMA_3.model_copy(update={"bos": ""})), 3),
        lora={"use_rslora": True},
    ),
    Case(
        *("llama-3-embeddings", "untied-llama", "Llama 3 headers", _declared(LLAMA_3), 8),
        lora={"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"], "lora_alpha": 24},
        learning_rate=2e-2,
    ),
    Case("inst", "mistral", "`[INST]`, system in user, ` {instruction} </s>`", _declared(INST, "</s>"), 3),
    Case("mistral", "mistral", "Mistral's built-in", _declared(_MISTRAL), 24),
    Case("wrapper", "gemma-3", "ChatML", _declared(CHATML), 12, epochs=80),
    Case("mixture", "qwen-3-moe", "ChatML", _declared(CHATML), 8, learning_rate=2e-2, epochs=80),
    Case("mixture-experts", "qwen-3-moe", "ChatML", _declared(CHATML), 8, {"experts": True}),
)


def of_base(base: str) -> list[Case]:
    """The cases that one server serves."""
    return [case for case in CASES if case.base == base]


def called(*names: str) -> list[Case]:
    """Cases by name."""
    return [case for case in CASES if case.name in names]


ELSEWHERE = Case("llama-3", "qwen-2", "Llama 3 headers", _declared(LLAMA_3), 8)
"""What a server with no more than `--enable-lora` is given."""
_BARELY = replace(ELSEWHERE, epochs=1)
BARELY_TRAINED = (
    replace(_BARELY, name="rank-24", rank=24),
    replace(_BARELY, name="embeddings", lora={"target_modules": ["q_proj", "embed_tokens"]}),
    replace(_BARELY, name="another-base", base="untied-llama"),
)
"""What that server is asked to load, too. It looks at their form only."""

MIXTRAL_EXPERTS = Case("mixtral-experts", "mixtral", "ChatML", _declared(CHATML), 8, {"experts": True})
"""What a server loads, and leaves half of aside."""
