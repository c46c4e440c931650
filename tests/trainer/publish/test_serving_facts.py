"""What is read from an adapter's folder for serving, and what becomes of folders that are not what they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.prompt_format import PromptFormat
from finetune_trainer.data.load_tokenizer import save_tokenizer
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.publish.serving_facts import ServingFacts
from finetune_trainer.publish.serving_folder import adapter_folder, read_facts
from tests.real_tokenizers import llama_3, mistral, smollm2
from tests.trainer.publish.serving import BOS, write_adapter


@pytest.mark.parametrize(
    ("config", "rank", "server_rank"),
    [
        ({"r": 1}, 1, 1),
        ({"r": 3}, 3, 8),
        ({"r": 16}, 16, 16),
        ({"r": 24}, 24, 32),
        ({"r": 8, "rank_pattern": {"q_proj": 65, "v_proj": 2}}, 65, 128),
        ({"r": 300}, 300, 320),
        ({"r": 513}, 513, None),
    ],
)
def test_the_servers_rank_is_the_next_that_vllm_takes(
    config: dict[str, Any], rank: int, server_rank: int | None, tmp_path: Path
) -> None:
    facts = read_facts(write_adapter(tmp_path, config=config))
    assert (facts.rank, facts.server_rank) == (rank, server_rank)


@pytest.mark.parametrize(
    ("named", "given", "base", "revision"),
    [
        ("acme/model", None, "acme/model", "abc123"),
        ("acme/model", "acme/model", "acme/model", "abc123"),
        ("acme/model", "/models/here", "/models/here", None),
        (None, None, None, "abc123"),
        ("/home/somebody/model", None, None, "abc123"),
        ("acme/model; rm -rf /", None, None, "abc123"),
        (["acme/model"], None, None, "abc123"),
    ],
)
def test_a_base_is_a_name_of_the_hub_or_what_the_user_says(
    named: Any, given: str | None, base: str | None, revision: str | None, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, config={"base_model_name_or_path": named, "revision": "abc123"})
    facts = read_facts(folder, base=given)
    assert (facts.base, facts.revision) == (base, revision)


@pytest.mark.parametrize(
    ("generation", "stopping", "ids", "texts"),
    [
        ({}, (), (2,), ()),
        ({"eos_token_id": 2}, ("<|im_end|>",), (2,), ()),
        ({"eos_token_id": [2, 4]}, ("</answer>", "\nUser:"), (2, 4), ("\nUser:",)),
        ({"stop_strings": [" </s>"]}, (" </s>", "###"), (2,), (" </s>", "###")),
        ({"stop_strings": "###", "eos_token_id": None}, (), (), ("###",)),
        ({"eos_token_id": [True, "2", 2.5]}, (), (), ()),
    ],
)
def test_stops_are_tokens_and_the_texts_that_no_token_stands_for(
    generation: dict[str, Any], stopping: tuple[str, ...], ids: tuple[int, ...], texts: tuple[str, ...], tmp_path: Path
) -> None:
    facts = read_facts(write_adapter(tmp_path, generation=generation, stopping_sequences=stopping))
    assert (facts.stop_ids, facts.stop_texts) == (ids, texts)


@pytest.mark.parametrize(
    ("assistant", "trailing", "stop_texts", "around"),
    [
        ("<|im_start|>assistant\n{instruction}<|im_end|>\n", "<|im_start|>assistant\n", (), ("", "")),
        ("<|im_start|>assistant\n{instruction}<|im_end|>\n", "", (), ("assistant\n", "")),
        (" {instruction} </s>", "", ("</s>",), (" ", " ")),
        (" {instruction}</s>", " ", ("</s>",), ("", "")),
        ("<answer>{instruction}</answer><|im_end|>", "", (), ("<answer>", "</answer>")),
        ("{instruction}", "", (), ("", "")),
    ],
)
def test_a_client_gets_the_literals_around_an_answer_but_for_special_tokens_and_stops(
    assistant: str, trailing: str, stop_texts: tuple[str, ...], around: tuple[str, str]
) -> None:
    facts = ServingFacts(
        name="guard",
        rank=8,
        stop_texts=stop_texts,
        texts_of_ids=("<|im_end|>",),
        special=frozenset({"<|im_end|>", "<|im_start|>"}),
        prompt_format=PromptFormat(
            system="{instruction}", user="{instruction}", assistant=assistant, trailing_assistant=trailing
        ),
    )
    assert facts.around_answer() == around


@pytest.mark.parametrize("tokenizer", [llama_3, mistral, smollm2])
def test_the_bos_is_the_one_that_the_tokenizer_adds(tokenizer: Callable[[], ModelTokenizer], tmp_path: Path) -> None:
    write_adapter(tmp_path)
    save_tokenizer(tokenizer().tokenizer, tmp_path)
    assert read_facts(tmp_path).bos == tokenizer().automatic_bos


@pytest.mark.parametrize(
    ("processor", "bos"),
    [
        (BOS, "<s>"),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, BOS]}, "<s>"),
        ({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}, "<s>"),
        ({"type": "ByteLevel"}, None),
        ({"type": "TemplateProcessing", "single": []}, None),
        ({"type": "TemplateProcessing", "single": ["<s>"]}, None),
        ({"type": "Sequence", "processors": [1, None]}, None),
    ],
)
def test_a_bos_is_found_in_any_post_processor(processor: dict[str, Any], bos: str | None, tmp_path: Path) -> None:
    facts = read_facts(write_adapter(tmp_path, post_processor=processor))
    assert facts.bos == bos
    prompt = "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert facts.example_prompt == (bos or "") + prompt


@pytest.mark.parametrize(
    ("tensor", "embeddings", "experts"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", [], False),
        ("base_model.model.model.embed_tokens.lora_embedding_A", ["embed_tokens"], False),
        ("base_model.model.lm_head.lora_B.weight", ["lm_head"], False),
        ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", [], True),
        ("base_model.model.model.layers.0.mlp.shared_experts.up_proj.lora_A.weight", [], False),
    ],
)
def test_what_servers_have_trouble_with_is_read_off_the_tensors_names(
    tensor: str, embeddings: list[str], experts: bool, tmp_path: Path
) -> None:
    facts = read_facts(write_adapter(tmp_path, tensors=(tensor,)))
    assert (facts.embeddings, facts.experts) == (embeddings, experts)


def test_name_and_length_are_the_manifests_unless_they_are_given(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    facts = read_facts(tmp_path)
    assert (facts.name, facts.context_length) == ("guard", 4096)
    facts = read_facts(tmp_path, name="other", context_length=5)
    assert (facts.name, facts.context_length) == ("other", 5)
    (tmp_path / "manifest.json").write_text(json.dumps({"job": 3, "contextLength": "long"}))
    facts = read_facts(tmp_path)
    assert (facts.name, facts.context_length) == ("adapter", None)


def test_an_adapter_of_somebody_else_has_fewer_facts(tmp_path: Path) -> None:
    """PEFT alone writes two of the files."""
    write_adapter(tmp_path)
    for name in ("manifest.json", "generation_config.json", "tokenizer.json", "prompt_format.yaml"):
        (tmp_path / name).unlink()
    facts = read_facts(tmp_path)
    assert (facts.name, facts.stop_ids, facts.bos, facts.example_prompt) == ("adapter", (), None, None)
    assert facts.around_answer() == ("", "")


def _bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, levels))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b'{"r": "8"}'),
        ("adapter_config.json", b'{"r": 0}'),
        ("adapter_config.json", b'{"r": 8, "rank_pattern": {"q": "9"}}'),
        ("adapter_config.json", b'{"r": 99999999999999999999999}'),
        ("adapter_config.json", b"[" * 100_000),
        ("adapter_config.json", b" " * (8 << 20) + b"{}"),
        ("generation_config.json", b"\xff"),
        ("tokenizer.json", b"null"),
        ("manifest.json", b"3"),
        ("prompt_format.yaml", b"- 1"),
        ("prompt_format.yaml", b"prompt_format: {system: 1}"),
        ("prompt_format.yaml", b"stopping_sequences: ['\\ud800', \"\\ud800\"]"),
        ("prompt_format.yaml", b"!!python/object/apply:os.system [ls]"),
        ("prompt_format.yaml", _bomb().encode()),
        ("prompt_format.yaml", b"[" * 100_000),
        ("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("adapter_model.safetensors", b"\xff" * 4),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_one_sentence(file: str, content: bytes, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(JobError) as error:
        read_facts(tmp_path)
    assert str(tmp_path / file) in error.value.message
    assert error.value.message.endswith("copy the adapter again.")


def test_an_adapter_is_found_in_its_jobs_folder_too(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "out" / "adapter")
    assert adapter_folder(str(folder)) == adapter_folder(str(tmp_path / "out")) == folder


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "There is no folder nowhere: name"),
        (".", "There is no adapter_config.json in .: name"),
        ("s3://bucket/adapter", "s3://bucket/adapter is no folder: copy the adapter to this machine first."),
    ],
)
def test_where_there_is_no_adapter_it_is_said(
    name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match=sentence.replace(".", r"\.")):
        adapter_folder(name)
