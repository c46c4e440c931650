"""An adapter on this machine: whole, of these weights, on that base, with the trained answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_trainer.errors import JobError
from finetune_trainer.launch.environment import TERMINATION_MESSAGE_PATH
from finetune_trainer.published.base import Base
from finetune_trainer.published.folder import open_adapter
from finetune_trainer.storage import write_manifest
from finetune_trainer.verify.command import main
from finetune_trainer.verify.golden import read_golden
from finetune_trainer.verify.local import verify_locally
from finetune_trainer.verify.report import Report
from tests.models import random_llama
from tests.s3_server import S3Server
from tests.trainer.run.tiny_job import TinyJob, tiny_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """A finished job whose adapter answers otherwise than its base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        job = TinyJob(tmp_path_factory.mktemp("job"), golden=True, num_epochs=4, learning_rate=2e-2)
        job.run()
    golden = job.output / "adapter" / "golden.jsonl"
    golden.write_bytes(b"".join(golden.read_bytes().splitlines(keepends=True)[:2]))
    publish_again(golden.parent)
    return job


@pytest.fixture
def copy(job: TinyJob, tmp_path: Path) -> Path:
    """A copy of its adapter."""
    shutil.copytree(job.output / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def verify(folder: Path, tmp_path: Path, base: Base | None = None) -> Report:
    return verify_locally(open_adapter(str(folder), tmp_path, weights=True), base=base or Base(str(tiny_model())))


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Other tensors, under a manifest of their own."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    publish_again(folder)


def publish_again(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("Hello")
    publish_again(folder)


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    publish_again(path.parent)


def test_a_published_adapter_is_as_trained(job: TinyJob, tmp_path: Path) -> None:
    report = verify(job.output, tmp_path)
    assert report.verified, report.message
    assert report.message.startswith("The adapter is as trained: its ")
    assert "it gives the 2 trained answers, log-probs within 0" in report.message
    assert report.notes == []


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "there is no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json is no manifest"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing: copy the adapter again"),
        (lambda folder: (folder / "chat_template.jinja").write_text("x"), "chat_template.jinja is not as published"),
        (lambda folder: rewrite(folder, lambda name, tensor: tensor * ("lora_B" not in name)), "every lora_B is zero"),
        (lambda folder: rewrite(folder, lambda name, tensor: tensor * torch.nan), "values that are no numbers"),
        (
            lambda folder: rewrite(folder, lambda name, tensor: -tensor if "lora_B" in name else tensor),
            "while its base model is the right one: its weights or settings are another adapter's",
        ),
        (
            lambda folder: rewrite(folder, lambda name, tensor: tensor * (1e-6 if "lora_B" in name else 1)),
            "it answers as its base model does: the adapter does nothing",
        ),
        (lambda folder: edit(folder / "adapter_config.json", target_modules=["q_proj"]), "does not fit"),
        (lambda folder: edit(folder / "adapter_config.json", r=7), "PEFT cannot open it"),
        (
            other_template,
            "its chat template renders 2 of 2 prompts otherwise, 'Hello' where training had '<|im_start|>",
        ),
    ],
)
def test_what_is_wrong_is_named(copy: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(copy)
    report = verify(copy, tmp_path)
    assert sentence in report.message
    assert report.verified is False


def test_what_people_edit_is_a_note(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("Ours.")
    (copy / "more.txt").write_text("x")
    report = verify(copy, tmp_path)
    assert report.verified
    assert report.notes == [
        "README.md is not as published; servers do not read it.",
        "more.txt is not among the published files.",
    ]


def test_a_wrong_base_is_told_from_a_wrong_adapter(job: TinyJob, tmp_path: Path) -> None:
    report = verify(job.output, tmp_path, Base(str(random_llama(tmp_path / "other", seed=5))))
    assert "does not answer as the base model that was trained: give that one with --base-model" in report.message
    report = verify(job.output, tmp_path, Base(str(random_llama(tmp_path / "wider", hidden=48))))
    assert "does not fit" in report.message
    assert report.verified is False


def test_without_golden_prompts_nothing_is_claimed_of_answers(copy: Path, tmp_path: Path) -> None:
    (copy / "golden.jsonl").unlink()
    publish_again(copy)
    report = verify(copy, tmp_path)
    assert report.verified is None
    assert "It has no golden.jsonl, so its answers could not be compared: its" in report.message


def test_a_base_that_cannot_be_had_is_no_verdict(job: TinyJob, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="There is no folder /none"):
        verify(job.output, tmp_path, Base("/none"))


def test_the_pod_verifies_on_the_jobs_model_and_leaves_its_words(
    job: TinyJob, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words"
    monkeypatch.setenv(TERMINATION_MESSAGE_PATH, str(words))
    edit(copy / "adapter_config.json", base_model_name_or_path="/another/machine")
    arguments = ["--job", str(job.file()), "--adapter"]
    assert main([*arguments, str(copy)]) == 0
    assert json.loads(words.read_text())["verified"] is True
    rewrite(copy, lambda name, tensor: tensor * ("lora_B" not in name))
    assert main([*arguments, str(copy)]) == 1
    assert json.loads(words.read_text()) == {
        "verified": False,
        "message": "The adapter is not as trained: every lora_B is zero, so the adapter does nothing: it was not "
        "trained.",
    }
    assert main([*arguments, str(tmp_path / "none")]) == 2
    assert json.loads(words.read_text())["verified"] is None


def test_an_adapter_in_an_object_store_is_verified_where_it_lies(
    job: TinyJob, tmp_path: Path, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.storage import open_store

    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    address = f"s3://{s3_environment.new_bucket()}/job"
    open_store(address).upload_tree(job.output / "adapter", "adapter")
    fetched = open_adapter(address, tmp_path / "scratch", weights=True)
    assert verify_locally(fetched, base=Base(str(tiny_model()))).verified
    light = open_adapter(f"{address}/adapter", tmp_path / "light", weights=False)
    assert read_golden(light.path)
    assert not (light.path / WEIGHTS).exists()


def test_the_base_model_is_found_in_the_job_beside_the_adapter(job: TinyJob, copy: Path, tmp_path: Path) -> None:
    """The adapter itself names none: a path of the machine that trained means nothing to others."""
    with pytest.raises(JobError, match="names no base model: give one with --base-model"):
        verify_locally(open_adapter(str(copy), tmp_path, weights=True))
    shutil.copyfile(job.file(), tmp_path / "job.yaml")
    assert verify_locally(open_adapter(str(copy), tmp_path, weights=True)).verified
