"""Settings come from the environment, and a wrong one ends the start with its name."""

from __future__ import annotations

import os

import pytest

from finetune_operator.settings import OperatorSettings


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("watch_namespaces", "a, b,", ("a", "b")),
        ("watch_namespaces", "", ()),
        ("accelerator_node_selectors", '{"A10G": {"gpu": "a10g"}}', {"A10G": {"gpu": "a10g"}}),
        ("pod_user_id", "null", None),
        ("default_output_uri", "pvc://results", "pvc://results"),
        ("resync_seconds", "0.5", 0.5),
    ],
)
def test_text_becomes_a_value(name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FINETUNE_OPERATOR_{name.upper()}", text)
    assert getattr(OperatorSettings.from_environment(os.environ), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RESYNC", "1"),
        ("RESYNC_SECONDS", "0"),
        ("DEFAULT_OUTPUT_URI", "hf://datasets/a/b/c.jsonl"),
        ("DEFAULT_OUTPUT_URI", "gs://bucket/x"),
        ("ACCELERATOR_NODE_SELECTORS", "A10G"),
    ],
)
def test_what_is_no_setting_or_no_value_is_refused(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FINETUNE_OPERATOR_{name}", text)
    with pytest.raises(ValueError, match=name.lower() if name in ("RESYNC_SECONDS",) else "(?i)" + name):
        OperatorSettings.from_environment(os.environ)
