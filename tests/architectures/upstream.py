"""What transformers and PEFT are known to do wrong by themselves, with the reports of it where there are any."""

from __future__ import annotations

ISSUES: dict[str, str] = {
    "reformer": "[transformers#10922](https://github.com/huggingface/transformers/issues/10922)",
}
"""By type, the report of what transformers fails with."""

_SHARED_EMBEDDING = """Published encoder-decoders share one embedding, whose name `AutoModelForCausalLM` does not look
  for: embedding and head stay random
  ([transformers#17375](https://github.com/huggingface/transformers/issues/17375) is about the head). A decoder that is
  saved by itself loads and trains."""

NOTES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("bart", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart"), _SHARED_EMBEDDING),
)
"""Types, and what is to know about them."""
