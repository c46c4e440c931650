"""The notes as a whole: one page word for word, what is in them where, and what strangers' names do to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_trainer.publish.serving_folder import read_facts
from finetune_trainer.publish.serving_notes import read_template, serving_notes, write_serving_notes
from finetune_trainer.publish.serving_targets import Target
from tests.api.formats import texts
from tests.trainer.publish.serving import BOS, CHATML, write_adapter

WHOLE = Path(__file__).with_name("serving_notes.md")
"""SERVING.md of the adapter in `test_the_whole_page`."""

INST = {
    "system": "{instruction}\n\n",
    "user": "[INST] {system}{instruction} [/INST]",
    "assistant": " {instruction} </s>",
    "system_in_user": True,
}


def _notes(folder: Path, target: Target, place: str = "/a", **facts: Any) -> str:
    return serving_notes(read_facts(folder, **facts), [target], place=place, chat_template=read_template(folder))


def test_the_whole_page(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """To be read by people after a change: write what is new into the file."""
    write_adapter(
        tmp_path,
        config={"r": 12, "revision": "abc123"},
        prompt_format=INST,
        stopping_sequences=("</s>",),
        post_processor=BOS,
        generation={"eos_token_id": [2], "stop_strings": ["</s>"]},
    )
    write_serving_notes(tmp_path, name="guard", context_length=2048)
    assert (tmp_path / "SERVING.md").read_text() == WHOLE.read_text()


@pytest.mark.parametrize(
    ("adapter", "target", "said", "unsaid"),
    [
        ({}, Target.VLLM, "--max-lora-rank 8", "Put the base model"),
        ({"config": {"base_model_name_or_path": None}}, Target.VLLM, "Put the base model in the place of", None),
        ({"config": {"r": 600}}, Target.VLLM, "**vLLM serves no rank above 512, and this adapter has 600.**", None),
        (
            {"tensors": ("model.embed_tokens.lora_embedding_A", "lm_head.lora_A")},
            Target.VLLM,
            "**This adapter changes embed_tokens and lm_head.**",
            "experts",
        ),
        ({"tensors": ("mlp.experts.lora_A.weight",)}, Target.VLLM, "--enable-mixed-moe-lora-format", "embed_tokens"),
        ({"prompt_format": CHATML}, Target.VLLM, "", "What comes back"),
        ({"prompt_format": INST}, Target.VLLM, 'around the answer: `" ANSWER </s>"`', None),
        (
            {"prompt_format": INST, "stopping_sequences": ("</s>",)},
            Target.VLLM,
            'around the answer: `" ANSWER "`',
            None,
        ),
        (
            {"prompt_format": INST, "stopping_sequences": ("</s>",)},
            Target.VLLM,
            'The `stop` has to be in every request: no token stands for `"</s>"`',
            None,
        ),
        ({"prompt_format": CHATML}, Target.VLLM, "", "has to be in every request"),
        ({"post_processor": BOS}, Target.VLLM, 'the text begins with `"<s>"` already', None),
        ({}, Target.VLLM, "keeps the server from adding anything", "begins with"),
        (
            {"prompt_format": {"use_hugging_face_chat_template": True}},
            Target.VLLM,
            "Send the token ids of",
            "/v1/completions \\",
        ),
        ({"stopping_sequences": ("</s>",)}, Target.TRANSFORMERS, 'stop_strings=["</s>"],', None),
        ({}, Target.TRANSFORMERS, "generation_config=generation", "stop_strings="),
        ({}, Target.KSERVE, "Checked against the resource definitions of KServe 0.20, not run.", None),
        ({}, Target.RAY, '"stop_token_ids": [2]', None),
        ({}, Target.KAITO, "Checked against the resource definitions of KAITO 0.12, not run.", None),
        ({"post_processor": BOS}, Target.OLLAMA, '`"<s>"` is not in the template', None),
        ({"stopping_sequences": ('"""',)}, Target.OLLAMA, "A Modelfile cannot hold the stop", None),
        (
            {"prompt_format": {"use_hugging_face_chat_template": True}},
            Target.OLLAMA,
            "There is no TEMPLATE, since",
            None,
        ),
    ],
)
def test_each_part_says_what_concerns_this_adapter(
    adapter: dict[str, Any], target: Target, said: str, unsaid: str | None, tmp_path: Path
) -> None:
    text = _notes(write_adapter(tmp_path, **adapter), target)
    assert said in re.sub(r"(?<=\w)\n(?=[\w`])", " ", text)
    assert unsaid is None or unsaid not in text


def test_the_folders_own_copy_names_no_place(tmp_path: Path) -> None:
    write_serving_notes(write_adapter(tmp_path), name="guard", context_length=None)
    text = (tmp_path / "SERVING.md").read_text()
    assert str(tmp_path) not in text
    assert "--generation-config ADAPTER_DIR" in text
    assert [f"## {title}" in text for title in ("vLLM", "Transformers and PEFT", "KServe", "Ray Serve LLM", "KAITO")]


@given(name=texts, stop=texts, template=texts, target=st.sampled_from(list(Target)))
@example(name="a\n```\n# no", stop="", template="", target=Target.VLLM)
@example(name="```\n# no", stop="\n````\n", template="\n```\n", target=Target.RAY)
@example(name="`", stop="``", template="", target=Target.VLLM)
def test_no_name_breaks_out_of_its_place(
    name: str, stop: str, template: str, target: Target, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile"
    write_adapter(folder, generation={"stop_strings": [stop]})
    facts = read_facts(folder, name=name or None)
    text = serving_notes(facts, [target], place=f"/{name}", chat_template=template)
    plain = serving_notes(read_facts(folder, name="x"), [target], place="/x", chat_template="x")
    assert _headings(text) == _headings(plain)


def _headings(text: str) -> list[str]:
    """The headings, as a reader of Markdown finds them: outside of blocks of code."""
    found, fence = [], ""
    for line in text.split("\n"):
        mark = re.match(r" {0,3}(`{3,})", line)
        if fence:
            closes = mark and len(mark[1]) >= len(fence) and not line.strip(" `")
            fence = "" if closes else fence
        elif mark:
            fence = mark[1]
        elif line.startswith("#"):
            found.append(line)
    assert not fence
    return found
