"""The card says what was trained; its metadata is what the Hub takes."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from finetune_trainer.pins import BaseModelName
from finetune_trainer.publish.model_card import read_licence, write_model_card
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
    [
        (BaseModelName("acme/model", "acme/model", "abc"), {"base_model": "acme/model", "license": "llama3"}),
        (BaseModelName("local", None, None), {"base_model": None, "license": None}),
    ],
)
def test_the_card_names_a_base_that_the_hub_knows(
    base: BaseModelName, metadata: dict[str, str | None], tmp_path: Path
) -> None:
    write_model_card(tmp_path, REPORT, base=base, licence={"license": "llama3"}, sha256="f" * 64)
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(head)
    assert {key: found.get(key) for key in metadata} == metadata
    assert (found["library_name"], found["tags"]) == ("peft", ["lora"])
    assert f"A LoRA adapter of `{base.name}`" in body
    assert "q,v x 2 layers: 0.1 M parameters." in body
    assert "- `model.layers.[0-1].self_attn.q_proj`" in body
    assert "- validation loss: 0.25" in body
    assert "- train rows: 1,200" in body
    assert "f" * 64 in body
    assert "perplexity" not in body


@pytest.mark.parametrize("text", ["`a", "a``b`", "a\n# owned\n---\nlicense: mit", "a\r\u2028- owned", "`` ``` x"])
def test_no_name_breaks_out_of_its_place(text: str, tmp_path: Path) -> None:
    report = replace(REPORT, job_name=text, layers=[text], targets=text)
    write_model_card(tmp_path, report, base=BaseModelName(text, text, text), licence={}, sha256="f" * 64)
    head, body = (tmp_path / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["base_model"] == text
    kinds = [line.split()[0] for line in body.splitlines() if line.startswith(("#", "-"))]
    assert kinds == ["#", "##", "-", "##", "-", "-", "-", "##"]
    said, layer = (line for line in body.splitlines() if line.startswith(("A LoRA", "- `")))
    # What is left beside what stands between backticks, as Markdown pairs them.
    assert CODE.sub("", said) == "A LoRA adapter of  at revision ."
    assert CODE.sub("", layer) == "- "


CODE = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: llama3\nlanguage: en\n---\n# Model", {"license": "llama3"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n: {\n---\n", {}),
        ("# Model", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_one_that_the_base_models_card_declares(
    card: str | None, licence: dict[str, str], tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_licence(SimpleNamespace(config=SimpleNamespace(_name_or_path=str(tmp_path)))) == licence
