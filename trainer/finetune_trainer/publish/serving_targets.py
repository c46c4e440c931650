"""What adapters are served with: names for the command line, which imports nothing else before it runs."""

from __future__ import annotations

from enum import StrEnum


class Target(StrEnum):
    """In the order of the notes."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    KSERVE = "kserve"
    RAY = "ray"
    KAITO = "kaito"
    OLLAMA = "ollama"
