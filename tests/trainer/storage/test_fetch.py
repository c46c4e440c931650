"""Inputs from folders, volumes and object stores; the Hub has a file of its own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage import fetch_adapter, fetch_file, fetch_model, fetch_tokenizer, open_store
from finetune_trainer.storage.model_files import adapter_files, model_files, tokenizer_files
from tests.s3_server import S3Server

MODEL = {"config.json": b"{}", "model.safetensors": b"1" * 100, "tokenizer.json": b"{}", "model.gguf": b"2"}


def upload(server: S3Server, bucket: str, files: dict[str, bytes], prefix: str = "models/m") -> str:
    """Put `files` below a prefix; returns its address."""
    for path, data in files.items():
        server.client().put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=data)
    return f"s3://{bucket}/{prefix}"


def test_a_local_file_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"{}")
    assert fetch_file(str(tmp_path / "train.jsonl")) == tmp_path / "train.jsonl"
    assert fetch_file(f"file://{tmp_path}/train.jsonl") == tmp_path / "train.jsonl"
    monkeypatch.chdir(tmp_path)
    assert fetch_file("train.jsonl") == Path("train.jsonl")


def test_a_claim_is_found_where_the_pod_mounts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(tmp_path))
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "train.jsonl").write_bytes(b"{}")
    assert fetch_file("pvc://data/sub/train.jsonl").read_bytes() == b"{}"
    open_store("pvc://data/out").write_bytes("a", b"1")
    assert (tmp_path / "data" / "out" / "a").read_bytes() == b"1"
    assert open_store("pvc://data/out").uri == "pvc://data/out"
    for use in (fetch_file, fetch_model, open_store):
        with pytest.raises(JobError, match="is not mounted") as failure:
            use("pvc://other/x")
        assert failure.value.reason is Reason.STORAGE_NOT_FOUND


@pytest.mark.parametrize(
    ("uri", "reason", "said"),
    [
        ("{tmp}/none.jsonl", Reason.STORAGE_NOT_FOUND, "There is no"),
        ("{tmp}", Reason.STORAGE_NOT_FOUND, "is a folder"),
        ("gs://bucket/x.jsonl", Reason.INVALID_SPEC, "s3://bucket/key"),
        ("hf://team/model", Reason.INVALID_SPEC, "hf://datasets/"),
    ],
)
def test_what_is_no_data_file_is_refused(tmp_path: Path, uri: str, reason: Reason, said: str) -> None:
    with pytest.raises(JobError, match=said) as failure:
        fetch_file(uri.format(tmp=tmp_path))
    assert failure.value.reason is reason


def test_a_model_folder_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "team" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    assert fetch_model(str(folder)).path == folder
    assert fetch_tokenizer("team/model").path == Path("team/model")
    assert fetch_model("./team/model").resolved_revision is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/no/such/folder", "There is no folder"),
        ("./none", "There is no folder"),
        ("file:///no/such/folder", "There is no folder"),
        ("empty", "has no config.json"),
        ("file", "is a file"),
    ],
)
def test_what_is_no_model_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=said) as failure:
        fetch_model(name)
    assert failure.value.reason is Reason.MODEL_NOT_FOUND
    assert "correct model_id" in failure.value.message
    with pytest.raises(JobError, match="correct initial_base_model_ckpt_path"):
        fetch_model(name, key="initial_base_model_ckpt_path")


def test_a_model_prefix_is_fetched_once_per_content(s3_environment: S3Server, tmp_path: Path) -> None:
    bucket = s3_environment.new_bucket()
    uri = upload(s3_environment, bucket, MODEL)
    model = fetch_model(uri, cache_dir=tmp_path)
    assert {path.name for path in model.path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert fetch_model(uri + "/", cache_dir=tmp_path) == model
    tokenizer = fetch_tokenizer(uri, cache_dir=tmp_path)
    assert {path.name for path in tokenizer.path.iterdir()} == {"config.json", "tokenizer.json"}
    upload(s3_environment, bucket, {"model.safetensors": b"3" * 100})
    assert fetch_model(uri, cache_dir=tmp_path).path != model.path


def test_an_empty_prefix_is_refused(s3_environment: S3Server, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="nothing at"):
        fetch_model(f"s3://{s3_environment.new_bucket()}/none", cache_dir=tmp_path)


def test_an_adapter_that_was_published_is_verified(s3_environment: S3Server, tmp_path: Path) -> None:
    from finetune_trainer.storage import write_manifest

    source = tmp_path / "adapter"
    source.mkdir()
    (source / "adapter_config.json").write_bytes(b"{}")
    (source / "adapter_model.safetensors").write_bytes(b"1" * 10)
    write_manifest(source)
    uri = f"s3://{s3_environment.new_bucket()}/out"
    open_store(uri).upload_tree(source, "adapter")
    adapter = fetch_adapter(f"{uri}/adapter", cache_dir=tmp_path / "cache")
    assert (adapter.path / "adapter_model.safetensors").read_bytes() == b"1" * 10
    open_store(uri).write_bytes("adapter/adapter_model.safetensors", b"2" * 10)
    with pytest.raises(JobError, match="differs from its manifest"):
        fetch_adapter(f"{uri}/adapter", cache_dir=tmp_path / "cache")


def test_two_that_want_the_same_object_download_it_once(
    s3_environment: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = s3_environment.new_bucket()
    s3_environment.client().put_object(Bucket=bucket, Key="train.jsonl", Body=b"1" * 1_000_000)
    paths: list[Path] = []
    with caplog.at_level("INFO"):
        threads = [
            threading.Thread(target=lambda: paths.append(fetch_file(f"s3://{bucket}/train.jsonl", tmp_path)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert caplog.text.count("Downloading") == 1


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "training_args.bin"],
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
        (
            ["model.safetensors.index.json", "model-1.safetensors", "consolidated.safetensors", "adapter.safetensors"],
            ["model-1.safetensors", "model.safetensors.index.json"],
        ),
        (["model.safetensors", "model.fp16.safetensors", "sub/model.safetensors"], ["model.safetensors"]),
        (
            ["model.safetensors", "tekken.json", "vocab.txt", "merges.txt", "additional_chat_templates/tool.jinja"],
            ["additional_chat_templates/tool.jinja", "merges.txt", "model.safetensors", "tekken.json", "vocab.txt"],
        ),
        (["model.safetensors", "LICENSE", "USE_POLICY.md", ".gitattributes", "custom.py"], ["model.safetensors"]),
    ],
)
def test_weights_are_taken_in_one_format_only(files: list[str], needed: list[str]) -> None:
    assert model_files(files, source="m") == needed


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "base model"),
        (["README.md"], r"model\.safetensors"),
    ],
)
def test_a_repository_without_weights_says_what_it_is(files: list[str], said: str) -> None:
    with pytest.raises(JobError, match=said) as failure:
        model_files(files, source="team/m")
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED


def test_tokenizer_files_are_small_ones() -> None:
    """The list of the weights is one of them, since it tells which are missing."""
    paths = ["config.json", "model.safetensors.index.json", "tf.index.json", "model.safetensors", "x.py"]
    assert tokenizer_files(paths) == ["config.json", "model.safetensors.index.json"]


def test_an_adapter_needs_both_of_its_files() -> None:
    assert adapter_files(["adapter_config.json", "adapter_model.bin", "x"], source="a") == [
        "adapter_config.json",
        "adapter_model.bin",
    ]
    with pytest.raises(JobError, match="no PEFT adapter"):
        adapter_files(["adapter_config.json", "model.safetensors"], source="a")


@pytest.mark.parametrize("damage", [b"1" * 99, b"1" * 99 + b"2", None], ids=["cut", "changed", "removed"])
def test_a_damaged_copy_of_an_object_is_fetched_again(
    s3_environment: S3Server, tmp_path: Path, damage: bytes | None
) -> None:
    uri = upload(s3_environment, s3_environment.new_bucket(), {**MODEL, "train.jsonl": b"1" * 100})

    def model() -> Path:
        return fetch_model(uri, cache_dir=tmp_path).path / "model.safetensors"

    def data() -> Path:
        return fetch_file(f"{uri}/train.jsonl", tmp_path)

    for fetch in (model, data):
        copy = fetch()
        copy.unlink() if damage is None else copy.write_bytes(damage)
        assert fetch() == copy
        assert copy.read_bytes() == b"1" * 100
    assert not list(tmp_path.rglob("*.partial"))
