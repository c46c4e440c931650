"""The card says what was trained; its metadata is what the Hub takes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from finetune_trainer.publish.model_card import write_model_card
from finetune_trainer.publish.report import DataCounts, ReportData

REPORT = ReportData(
    job_name="guard",
    model="acme/model",
    created=datetime(2026, 1, 1, tzinfo=UTC),
    job_yaml="",
    eval_loss=0.25,
    data=[DataCounts(name="train", rows=1200)],
    targets="q,v x 2 layers: 0.1 M parameters",
    layers=["model.layers.[0-1].self_attn.q_proj", "model.layers.[0-1].self_attn.v_proj"],
)


@pytest.mark.parametrize(
    ("base", "metadata"),
    [("acme/model", "acme/model"), ("/models/local", None), ("s3://bucket/model", None)],
)
def test_the_card_names_a_base_that_the_hub_knows(base: str, metadata: str | None, tmp_path: Path) -> None:
    write_model_card(tmp_path, REPORT, base_model=base)
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(head)
    assert found.get("base_model") == metadata
    assert (found["library_name"], found["tags"]) == ("peft", ["lora"])
    assert f"A LoRA adapter of `{base}`." in body
    assert "q,v x 2 layers: 0.1 M parameters." in body
    assert "- `model.layers.[0-1].self_attn.q_proj`" in body
    assert "- validation loss: 0.25" in body
    assert "- train rows: 1,200" in body
    assert "perplexity" not in body
