"""Whatever is in the files of a model's folder, it is loaded or refused in a sentence, in a moment."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.outcome import Reason
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import load_config, load_model
from finetune_trainer.model.support import build_skeleton
from finetune_trainer.model.weights import check_names
from tests.hostile.samples import JSON, as_json, damaged, is_sentence, near_misses, some
from tests.real_tokenizers import smollm2
from tests.trainer.model.test_folders import llama, sharded

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 8


@functools.cache
def model() -> Path:
    """A tiny model with a tokenizer of its first 300 tokens."""
    folder = llama(Path(tempfile.mkdtemp(prefix="hostile-")))
    smollm2().tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {token: index for token, index in content["model"]["vocab"].items() if index < 300}
    merges = [pair for pair in content["model"]["merges"] if "".join(pair) in vocabulary]
    content["model"] |= {"vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def answered(folder: Path, name: str, content: bytes, load: Callable[[Path], object]) -> bool:
    """Whether a folder with `content` as its file `name` is loaded; it is refused in a sentence otherwise."""
    (folder / name).write_bytes(content)
    try:
        load(folder)
    except JobError as error:
        refusal = error
    else:
        return True
    assert refusal.reason is Reason.MODEL_UNSUPPORTED
    assert is_sentence(refusal)
    return False


def whole(folder: Path) -> None:
    load_model(folder, dtype=torch.float32, trust_remote_code=False)


def tokenizer(folder: Path) -> None:
    found = load_tokenizer(folder, trust_remote_code=False)
    found.row_tokenizer()
    found.fingerprint()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model, for all examples of a test."""
    copied = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(model(), copied)
    return copied


def file(name: str) -> bytes:
    return (model() / name).read_bytes()


def content(name: str) -> Any:
    return json.loads(file(name))


@st.composite
def jsons(draw: st.DrawFn, name: str) -> bytes:
    """Something else in place of a JSON file of the model."""
    return draw(near_misses(content(name)).map(as_json) | JSON.map(as_json) | damaged(file(name)))


def configured(**settings: Any) -> bytes:
    return as_json(content("config.json") | settings)


@some(40)
@given(jsons("config.json"))
@example(configured(num_hidden_layers=2**31))
@example(configured(head_dim=2**31))
@example(configured(vocab_size=10**30))
@example(configured(model_type=["llama"]))
@example(configured(model_type="\x1b[31m"))
@example(configured(architectures=[["LlamaForCausalLM"]]))
@example(configured(architectures=1))
@example(configured(auto_map=1))
@example(b'{"model_type": "x", "a": ' + b"[" * 100_000)
def test_a_configuration_is_loaded_or_refused(folder: Path, data: bytes) -> None:
    try:
        answered(folder, "config.json", data, whole)
    finally:
        (folder / "config.json").write_bytes(file("config.json"))


def test_numbers_that_some_model_has_are_not_refused(folder: Path) -> None:
    odd = configured(max_position_embeddings=10**9, sliding_window=2**31, rope_theta=1e12, max_window_layers=10**6)
    try:
        assert answered(folder, "config.json", odd, whole)
    finally:
        (folder / "config.json").write_bytes(file("config.json"))


@some(30)
@given(jsons("generation_config.json") | jsons("tokenizer_config.json"))
def test_what_is_said_of_generation_is_taken_or_refused(folder: Path, data: bytes) -> None:
    try:
        answered(folder, "generation_config.json", data, whole)
    finally:
        (folder / "generation_config.json").write_bytes(file("generation_config.json"))


@some(30)
@given(jsons("tokenizer_config.json"))
@example(as_json({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "long", "bos_token": "<s>"}))
def test_a_tokenizers_settings_are_taken_or_refused(folder: Path, data: bytes) -> None:
    try:
        answered(folder, "tokenizer_config.json", data, tokenizer)
    finally:
        (folder / "tokenizer_config.json").write_bytes(file("tokenizer_config.json"))


def prefixed() -> bytes:
    """As if pieces within a word began with ##, which the library reads beyond the end of a text for."""
    whole = content("tokenizer.json")
    whole["model"]["continuing_subword_prefix"] = "##"
    return as_json(whole)


@some(30)
@given(jsons("tokenizer.json"))
@example(prefixed())
def test_a_tokenizer_is_loaded_or_refused(folder: Path, data: bytes) -> None:
    try:
        answered(folder, "tokenizer.json", data, tokenizer)
    finally:
        (folder / "tokenizer.json").write_bytes(file("tokenizer.json"))


def safetensors(header: bytes) -> bytes:
    data = file(WEIGHTS)
    return len(header).to_bytes(8, "little") + header + data[HEADER_BYTES + int.from_bytes(data[:8], "little") :]


def header() -> dict[str, Any]:
    data = file(WEIGHTS)
    return dict(json.loads(data[HEADER_BYTES : HEADER_BYTES + int.from_bytes(data[:8], "little")]))


def entry(**settings: Any) -> bytes:
    found = header()
    found["model.norm.weight"] |= settings
    return safetensors(as_json(found))


@some(50)
@given(st.deferred(lambda: near_misses(header()).map(as_json).map(safetensors) | damaged(file(WEIGHTS))))
@example(entry(shape=[2**70]))
@example(entry(shape=[-1]))
@example(entry(data_offsets=[]))
@example(entry(data_offsets=["0", "1"]))
@example(entry(data_offsets=[0, 1e308]))
@example(entry(dtype=[]))
@example(b"\xff" * 8 + b"{}")
@example((100_000).to_bytes(8, "little") + b"[" * 100_000)
def test_weights_are_loaded_or_refused(folder: Path, data: bytes) -> None:
    try:
        answered(folder, WEIGHTS, data, whole)
    finally:
        (folder / WEIGHTS).write_bytes(file(WEIGHTS))


@some(30)
@given(st.data())
def test_the_index_of_the_weights_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = shards(str(tmp_path_factory.getbasetemp()))
    skeleton = build_skeleton(load_config(folder, trust_remote_code=False), "team/model", trust_remote_code=False)
    index = json.loads((folder / "kept.json").read_text())
    wrong = st.sampled_from(["../x.safetensors", "/etc/passwd", "x" * 300, "a\0", "", None, {"a": "b"}])
    renamed = st.builds(lambda name: as_json({"weight_map": {**index["weight_map"], "lm_head.weight": name}}), wrong)
    drawn = data.draw(renamed | near_misses(index).map(as_json) | JSON.map(as_json) | damaged(as_json(index)))
    answered(folder, INDEX, drawn, lambda folder: check_names(folder, skeleton, "team/model"))
    answered(folder, INDEX, drawn, whole)


@functools.cache
def shards(base: str) -> Path:
    folder = sharded(llama(Path(tempfile.mkdtemp(dir=base))))
    shutil.copy(folder / INDEX, folder / "kept.json")
    return folder
