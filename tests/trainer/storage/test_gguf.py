"""Base models in GGUF files: where they may lie, what becomes of them, and what is said of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.job import FineTuneJobSpec
from finetune_api.outcome import Reason
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import load_model
from finetune_trainer.storage import fetch_model, fetch_tokenizer
from finetune_trainer.storage.content import content_of
from finetune_trainer.storage.model_files import model_files, tokenizer_files
from finetune_trainer.tokenizer_at_hand import template_warnings
from tests.gguf_file import write_gguf
from tests.hub_server import COMMIT, Hub, Repo
from tests.s3_server import S3Server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A float32 file and the model in it."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return path, write_gguf(path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the folders are made."""
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: Any) -> torch.Tensor:
    """What a model says of some ids: float32 [1, 40, vocabulary]."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=(torch.arange(40) * 7 % 260)[None]).logits
    return found


def test_a_float_file_is_the_model_that_it_was_made_of(plain: tuple[Path, Any]) -> None:
    """Weights, configuration, tokenizer and template; nothing is approximate, so nothing is said."""
    path, original = plain
    fetched = fetch_model(str(path))
    assert fetched.warnings == ()
    model = load_model(fetched.path, dtype=torch.float32, trust_remote_code=False)
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-6)
    tokenizer = load_tokenizer(fetch_tokenizer(str(path)).path, trust_remote_code=False)
    assert tokenizer.ids("hell<|im_end|>") == [258, 260]
    assert tokenizer.tokenizer.eos_token == "<|im_end|>"
    assert "im_start" in tokenizer.tokenizer.chat_template


def test_a_quantized_file_is_dequantized_and_said_to_be_approximate(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = write_gguf(tmp_path / "small.gguf", quantize=True, pre="smollm")
    fetched = fetch_model(str(tmp_path))
    said = " ".join(fetched.warnings)
    assert "small.gguf is quantized (Q8_0)" in said
    assert "'smollm'" in said
    model = load_model(fetched.path, dtype=torch.float32, trust_remote_code=False)
    straight = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    assert torch.equal(logits(model), logits(straight))
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=0.05)
    assert not torch.equal(logits(model), logits(original))


def test_a_tokenizer_beside_the_file_is_taken(tmp_path: Path, plain: tuple[Path, Any]) -> None:
    write_gguf(tmp_path / "model.gguf", pre="unheard-of")
    for file in fetch_tokenizer(str(plain[0])).path.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b'"hell": 258', b'"hell": 257'))
    fetched = fetch_tokenizer(str(tmp_path))
    assert fetched.warnings == ()
    assert (fetched.path / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_folder_is_made_once_per_content(tmp_path: Path, plain: tuple[Path, Any]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(plain[0].read_bytes())
    first = fetch_model(str(path))
    made = (first.path / "config.json").stat().st_mtime_ns
    assert fetch_model(str(tmp_path)) == first
    assert (first.path / "config.json").stat().st_mtime_ns == made
    write_gguf(path, quantize=True)
    assert fetch_model(str(path)).path != first.path


def test_a_file_in_a_claim_or_a_folder_by_a_relative_path(
    tmp_path: Path, plain: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(plain[0].parent.parent))
    monkeypatch.chdir(plain[0].parent)
    expected = fetch_tokenizer(str(plain[0])).path
    for name in (f"pvc://{plain[0].parent.name}/model.gguf", "model.gguf", "./model.gguf", f"file://{plain[0]}"):
        assert fetch_tokenizer(name).path == expected


def test_a_file_on_the_hub(hub: Hub, plain: tuple[Path, Any], tmp_path: Path) -> None:
    """The only one of a repository, or one of several that is named."""
    data = plain[0].read_bytes()
    hub.repos["team/one"] = Repo({"README.md": b"", "sub/model.gguf": data, "mmproj-model.gguf": b"a tower"})
    hub.repos["team/two"] = Repo({"m-Q4_K_M.gguf": b"", "m-Q8_0.gguf": data})
    for name, file in (("team/one", "sub/model.gguf"), ("team/two/m-Q8_0.gguf", "m-Q8_0.gguf")):
        hub.requests.clear()
        assert fetch_tokenizer(name).resolved_revision == COMMIT
        assert (fetch_model(name).path / "model.safetensors").is_file()
        assert hub.downloads() == {file}
    with pytest.raises(JobError, match=r"write team/two/ and one of m-Q4_K_M\.gguf, m-Q8_0\.gguf\."):
        fetch_tokenizer("team/two")
    with pytest.raises(JobError, match=r"team/two has no file other\.gguf among m-Q4_K_M\.gguf"):
        fetch_tokenizer("team/two/other.gguf")


def test_a_file_in_an_object_store(s3_environment: S3Server, plain: tuple[Path, Any]) -> None:
    bucket = s3_environment.new_bucket()
    s3_environment.client().put_object(Bucket=bucket, Key="models/m/model.gguf", Body=plain[0].read_bytes())
    for uri in (f"s3://{bucket}/models/m", f"s3://{bucket}/models/m/model.gguf"):
        assert (fetch_model(uri).path / "model.safetensors").is_file()


def test_another_content_is_another_base(tmp_path: Path, plain: tuple[Path, Any], s3_environment: S3Server) -> None:
    """Whatever else lies beside the file, and although its weights are in no folder yet."""
    bucket = s3_environment.new_bucket()
    client = s3_environment.client()
    (tmp_path / "other.gguf").touch()
    client.put_object(Bucket=bucket, Key="m/other.gguf", Body=b"")
    found: dict[str, list[str]] = {}
    for data in (plain[0].read_bytes(), plain[0].read_bytes()[:-1] + b"\x01"):
        (tmp_path / "model.gguf").write_bytes(data)
        client.put_object(Bucket=bucket, Key="m/model.gguf", Body=data)
        for address in (str(tmp_path / "model.gguf"), f"s3://{bucket}/m/model.gguf"):
            for fetch in (fetch_tokenizer, fetch_model):
                found.setdefault(address, []).append(content_of(address, fetch(address)).value)
    for first, same, second, also in found.values():
        assert first == same != second == also


def test_validate_does_not_stumble_over_a_file_on_the_hub() -> None:
    generation = {"prompt_format": {"use_hugging_face_chat_template": True}}
    spec = FineTuneJobSpec.model_validate(
        {"model_id": "team/two/m-Q8_0.gguf", "train_path": "train.jsonl", "generation_config": generation}
    )
    assert template_warnings(spec) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"no GGUF", "magic bytes", id="another file"),
        pytest.param(b"GGUF\3\0\0\0" + b"\1" * 40, r"cannot be read by transformers", id="damaged"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(JobError, match=said) as failure:
        fetch_tokenizer(str(tmp_path))
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED
    assert "name the original model" in failure.value.message
    assert "\n" not in failure.value.message


def test_an_architecture_that_transformers_cannot_read_is_named(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf", architecture="plamo")
    with pytest.raises(JobError, match="architecture plamo is not supported") as failure:
        fetch_tokenizer(str(tmp_path))
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED
    assert [path.name for path in (cache / "gguf").iterdir()] == ["m.gguf.lock"]


def test_weights_that_are_not_in_the_file_are_not_made_up(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", leave_out="1.ffn_down.weight")
    with pytest.raises(JobError, match=r"lacks 1 of the weights .*layers\.1\.mlp\.down_proj\.weight") as failure:
        fetch_model(str(tmp_path))
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize(
    ("files", "named", "said"),
    [
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], None, "llama-gguf-split"),
        (["a.gguf", "m-00001-of-00002.gguf"], "m-00001-of-00002.gguf", "llama-gguf-split"),
        (["a.gguf", "b.gguf"], None, r"one of a\.gguf, b\.gguf"),
        ([f"{number:02}.gguf" for number in range(30)], None, r"19\.gguf and 10 more"),
    ],
)
def test_one_file_must_be_meant(files: list[str], named: str | None, said: str) -> None:
    for select in (model_files, tokenizer_files):
        with pytest.raises(JobError, match=said):
            select(files, source="team/m", gguf=named)


def test_other_formats_go_before(tmp_path: Path) -> None:
    files = ["config.json", "model.safetensors", "m.gguf"]
    assert model_files(files, source="m") == files[:2]
    assert tokenizer_files(files, source="m") == files[:1]
    assert model_files(files, source="m", gguf="m.gguf") == ["config.json", "m.gguf"]
