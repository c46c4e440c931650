"""Whatever lies where a job's checkpoints belong, it is gone on from, left out with a word, or refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_trainer.errors import JobError
from finetune_trainer.publish.adapter import finished_adapter, published_results
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.storage.manifest import MANIFEST_NAME, parse_manifest, write_manifest
from finetune_trainer.train.checkpoint import recorded_run
from finetune_trainer.train.checkpoint_files import ADAPTER, OPTIMIZER, RANDOM
from tests.hostile.samples import JSON, as_json, damaged, is_sentence, near_misses, some
from tests.trainer.train.test_checkpoint import Output

FILES = (ADAPTER, OPTIMIZER, RANDOM)
ENTRY = {"sha256": "0" * 64, "sizeBytes": 1}
MANIFEST = {"version": 1, "step": 1, "evalLoss": 0.5, "run": {"seed": 1}, "files": {"a": ENTRY, "b/c": ENTRY}}

MANIFESTS = st.one_of(near_misses(MANIFEST).map(as_json), JSON.map(as_json), damaged(as_json(MANIFEST)))


@some(200)
@given(MANIFESTS)
@example(b'{"version": 1, "files": {"a": {"sha256": "", "sizeBytes": 1e400}}}')
@example(b"[" * 100_000)
@example(b'{"version": 1, "files": {"a\\u0000b": {"sha256": "", "sizeBytes": 1}}}')
def test_a_manifest_is_read_or_refused_in_a_sentence(data: bytes) -> None:
    try:
        found = parse_manifest(data, "s3://b/adapter")
    except JobError as error:
        refusal = error
    else:
        assert all(isinstance(entry.size_bytes, int) for entry in found.files.values())
        found.sha256()
        return
    assert refusal.message.startswith("s3://b/adapter is not a manifest that this version reads")


ADAPTER_MANIFEST = {
    **MANIFEST,
    "baseModel": "team/model",
    "dataset": {"rows": 1},
    "metrics": {},
    "targets": None,
    "verified": None,
}


@some(100)
@given(near_misses(ADAPTER_MANIFEST, most=4).map(as_json))
@example(as_json({key: value for key, value in ADAPTER_MANIFEST.items() if key != "baseModel"}))
@example(as_json(ADAPTER_MANIFEST | {"dataset": 1}))
def test_what_an_adapters_manifest_says_is_told_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        store.write_bytes(f"adapter/{MANIFEST_NAME}", data)
        refusal = None
        try:
            manifest = finished_adapter(store, {"seed": 1})
            if manifest is not None:
                published_results(store, manifest)
        except JobError as error:
            refusal = error
        assert refusal is None or is_sentence(refusal, 5000)


def chosen(output: Output) -> None:
    """Both ways of choosing a checkpoint end with one, with none, or with a sentence; and leave what is whole."""
    for choose in (output.newest, output.best):
        for name in ("resume", "best"):
            shutil.rmtree(output.folder / name, ignore_errors=True)
        refusal, step = None, None
        try:
            recorded_run(LocalStore(output.folder / "out"))
            step = choose()
        except JobError as error:
            refusal = error
        assert is_sentence(refusal, 5000) if refusal else step in (1, 2, None)
    for warning in output.warnings:
        assert warning.endswith(".")
        assert warning.isprintable()


@some(30)
@given(MANIFESTS | near_misses({**MANIFEST, "files": {}}).map(as_json))
@example(as_json({**MANIFEST, "evalLoss": "low"}))
@example(as_json({**MANIFEST, "evalLoss": [1]}))
@example(as_json({**MANIFEST, "evalLoss": 10**400}))
@example(as_json({**MANIFEST, "files": {"a" * 300: ENTRY}}))
@example(as_json({**MANIFEST, "files": {"a": ENTRY, "a/b": ENTRY}}))
def test_a_checkpoint_with_any_manifest_is_used_left_out_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Output(Path(folder), {1: 1.0, 2: 0.5})
        output.file(2, MANIFEST_NAME).write_bytes(data)
        chosen(output)


def replaced(output: Output, name: str, content: bytes) -> None:
    """Another file, which the manifest lists as if the run had written it."""
    output.file(2, name).write_bytes(content)
    manifest = json.loads(output.file(2, MANIFEST_NAME).read_bytes())
    details = {key: manifest[key] for key in manifest if key not in ("version", "files")}
    write_manifest(output.file(2, name).parent, details)


@some(30)
@given(st.sampled_from(FILES), st.data())
def test_whole_files_that_no_run_wrote_are_left_out(name: str, data: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Output(Path(folder), {1: 1.0, 2: 0.5})
        whole = output.file(2, name).read_bytes()
        replaced(output, name, data.draw(damaged(whole) | JSON.map(as_json) | st.binary(max_size=40)))
        chosen(output)


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._place),)


@pytest.mark.parametrize("name", [OPTIMIZER, RANDOM])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_of_a_malicious_pickle_is_run(tmp_path: Path, name: str, zipped: bool) -> None:
    output = Output(tmp_path, {1: None, 2: None})
    file, place = tmp_path / "bomb", tmp_path / "went off"
    if zipped:
        torch.save([Bomb(place)], file)
    else:
        file.write_bytes(pickle.dumps([Bomb(place)]))
    replaced(output, name, file.read_bytes())
    assert output.newest() == 1
    assert not place.exists()
    (warning,) = output.warnings
    assert f"is not used, because it is damaged: {name} cannot be read (" in warning


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lists_less_than_a_run_needs_is_left_out(tmp_path: Path, name: str) -> None:
    output = Output(tmp_path, {1: None, 2: None})
    replaced(output, name, b"")
    output.file(2, name).unlink()
    manifest = json.loads(output.file(2, MANIFEST_NAME).read_bytes())
    del manifest["files"][name]
    output.file(2, MANIFEST_NAME).write_bytes(as_json(manifest))
    assert output.newest() == 1
    assert f"{name} is missing." in output.warnings[0]
