"""The base model is what it was when the run began: on every node, for tokenizer and weights, and on every attempt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import FineTuneJobSpec
from finetune_api.outcome import Reason
from finetune_trainer import pins as pins_module
from finetune_trainer.data.dataset import prepare
from finetune_trainer.errors import JobError
from finetune_trainer.inputs import data_source, load_model_inputs
from finetune_trainer.launch.elastic import find_free_port
from finetune_trainer.pins import Pins, check_node, fetch_initial_adapter, fetch_weights
from finetune_trainer.storage.content import content_of
from finetune_trainer.storage.fetch import FetchedModel
from tests.hub_server import COMMIT, Hub, Repo
from tests.models import random_llama
from tests.s3_server import S3Server
from tests.trainer.forked_job import ForkedJob
from tests.trainer.run.launched_job import LaunchedJob
from tests.trainer.run.tiny_job import TinyJob, rows, tiny_model, write_rows

NAME = "team/model"
LATER = "89abcdef" * 5
OLD = {"config.json": b"{}", "tokenizer.json": b"old", "model.safetensors": b"old weights"}
NEW = {"config.json": b"{}", "tokenizer.json": b"new", "model.safetensors": b"new weights"}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"old adapter"}


def spec(model: str = NAME, **more: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate({"model_id": model, "train_path": "/data", **more})


TODAY = date(2026, 11, 29)


def resolve(spec: FineTuneJobSpec, recorded: Mapping[str, Any], today: date = TODAY) -> Pins:
    """What the addresses stand for, asked on a certain day."""
    return pins_module.resolve(spec, recorded, today=today)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def refusal(mismatch: pytest.ExceptionInfo[JobError]) -> str:
    assert mismatch.value.reason is Reason.CHECKPOINT_MISMATCH
    return mismatch.value.message


def test_weights_are_those_of_the_tokenizers_commit(hub: Hub) -> None:
    hub.repos[NAME] = Repo(OLD, next_push=(LATER, NEW))
    pins = resolve(spec(), {})
    assert hub.repos[NAME].commit == LATER
    assert pins.base.commit == COMMIT
    assert weights(fetch_weights(spec(), pins)) == b"old weights"


def test_another_attempt_goes_on_with_the_checkpoints_commit(hub: Hub) -> None:
    hub.repos[NAME] = Repo(OLD)
    recorded = resolve(spec(), {}).run()
    hub.repos[NAME].move(LATER, NEW)
    assert resolve(spec(), {}).base.commit == LATER
    again = resolve(spec(), json.loads(json.dumps(recorded)))
    assert again.run() == recorded
    assert weights(fetch_weights(spec(), again)) == b"old weights"


def test_another_attempt_goes_on_with_the_date_on_which_the_run_began(hub: Hub) -> None:
    hub.repos[NAME] = Repo(OLD)
    recorded = json.loads(json.dumps(resolve(spec(), {}).run()))
    again = resolve(spec(), recorded, date(2026, 12, 1))
    assert again.began == TODAY
    assert again.run() == recorded


def test_a_commit_that_the_hub_no_longer_has_is_named_with_the_one_it_has(hub: Hub, tmp_path: Path) -> None:
    hub.repos[NAME] = Repo(OLD)
    recorded = resolve(spec(), {}).run()
    shutil.rmtree(tmp_path / "hub-cache")
    hub.repos[NAME] = Repo(NEW, commit=LATER)
    with pytest.raises(JobError) as caught:
        resolve(spec(), recorded)
    assert f"trained on team/model with commit {COMMIT}, and there is now team/model with commit {LATER}" in refusal(
        caught
    )


def test_another_node_gets_the_first_ones_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(OLD)
    pins = resolve(spec(), {})
    hub.repos[NAME].move(LATER, NEW)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another-node"))
    check_node(spec(), pins)
    assert weights(fetch_weights(spec(), pins)) == b"old weights"


def test_a_prefix_that_is_written_again_is_noticed(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path))
    bucket, client = s3_environment.new_bucket(), s3_environment.client()

    def put(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            client.put_object(Bucket=bucket, Key=f"m/{name}", Body=data)

    job = spec(f"s3://{bucket}/m")
    put(OLD)
    pins = resolve(job, {})
    put({"README.md": b"# of no effect"})
    assert weights(fetch_weights(job, pins)) == b"old weights"
    assert resolve(job, pins.run()) == pins
    put({"model.safetensors": NEW["model.safetensors"]})
    now = resolve(job, {}).base.value
    with pytest.raises(JobError, match=f"etags {pins.base.value}, and there is now .* etags {now}") as caught:
        resolve(job, pins.run())
    refusal(caught)
    with pytest.raises(JobError, match=r"began on .*, and here or by now there is") as caught:
        fetch_weights(job, pins)
    refusal(caught)


def test_a_folder_that_is_changed_is_noticed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", OLD)
    job = spec(str(folder))
    pins = resolve(job, {})
    folder_of(folder, {"metrics.jsonl": b"of no effect"})
    assert resolve(job, pins.run()) == pins
    folder_of(folder, {"model.safetensors": b"new weight!"})
    with pytest.raises(JobError, match=r"with files \w+, and there is now .* with files") as caught:
        resolve(job, pins.run())
    refusal(caught)
    with pytest.raises(JobError, match="give every node the same files") as caught:
        check_node(job, pins)
    refusal(caught)


def test_a_file_is_told_apart_by_itself_not_by_what_is_made_of_it(s3_environment: S3Server, tmp_path: Path) -> None:
    """GGUF files are fetched as a folder that was made of them, at first without weights."""
    fetched = FetchedModel(folder_of(tmp_path / "made", {"config.json": b"{}"}), None)
    bucket, client = s3_environment.new_bucket(), s3_environment.client()
    addresses = (str(tmp_path / "model.gguf"), f"s3://{bucket}/m/model.gguf")
    found = []
    for data in (b"old", b"old", b"new"):
        (tmp_path / "model.gguf").write_bytes(data)
        client.put_object(Bucket=bucket, Key="m/model.gguf", Body=data)
        found.append([content_of(address, fetched) for address in addresses])
    assert found[0] == found[1]
    assert all(was != now for was, now in zip(found[1], found[2], strict=True))


@pytest.mark.parametrize("position", [0, 70 << 20, (80 << 20) - 1])
def test_of_a_large_file_only_samples_are_read_but_they_tell(tmp_path: Path, position: int) -> None:
    file = folder_of(tmp_path, OLD) / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(80 << 20)
    fetched = FetchedModel(tmp_path, None)
    before = content_of(str(tmp_path), fetched)
    with file.open("r+b") as stream:
        # As long as the smallest matrix that matters.
        start = max(0, position - (8 << 20))
        stream.seek(start)
        stream.write(b"\1" * (8 << 20))
        stream.truncate(80 << 20)
    assert content_of(str(tmp_path), fetched) != before


def test_an_adapter_that_is_continued_is_pinned_too(hub: Hub) -> None:
    hub.repos[NAME] = Repo(OLD)
    hub.repos["team/adapter"] = Repo(ADAPTER)
    job = spec(initial_adapter_model_ckpt_path={"repo_id": "team/adapter"})
    recorded = resolve(job, {}).run()
    hub.repos["team/adapter"].move(LATER, ADAPTER | {"adapter_model.safetensors": b"new adapter"})
    pin = resolve(job, recorded).initial_adapter
    assert pin is not None
    assert (fetch_initial_adapter(pin) / "adapter_model.safetensors").read_bytes() == b"old adapter"
    newest = resolve(job, {}).initial_adapter
    assert newest is not None
    assert newest.commit == LATER


def published(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


def adapter_revision(job: TinyJob) -> Any:
    return json.loads((job.output / "adapter" / "adapter_config.json").read_text())["revision"]


def test_a_run_ends_on_the_commit_it_began_on_and_stays_finished(hub: Hub, tmp_path: Path) -> None:
    hub.repos[NAME] = Repo(published(tiny_model()))
    later = published(random_llama(tmp_path / "later", seed=1))
    job = TinyJob(tmp_path / "job", model_id=NAME)
    first = job.run()
    assert first.adapter is not None
    assert first.adapter.base_model_revision == COMMIT
    assert adapter_revision(job) == COMMIT
    hub.repos[NAME].move(LATER, later)
    hub.requests.clear()
    assert "nothing was trained" in job.run().message
    assert hub.requests == []

    # As if it had been killed while it published.
    shutil.rmtree(job.output / "adapter")
    for checkpoint in sorted((job.output / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    losses = job.eval_losses()
    again = job.run()
    assert again.adapter is not None
    assert again.adapter.base_model_revision == COMMIT
    assert adapter_revision(job) == COMMIT
    assert job.eval_losses() == pytest.approx(losses, abs=1e-6)
    assert not [path for _, path in hub.requests if LATER in path]


def test_a_resume_on_another_base_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model(), model)
    job = TinyJob(tmp_path / "job", model_id=str(model))
    job.run()
    shutil.rmtree(job.output / "adapter")
    random_llama(model, seed=1)
    with pytest.raises(
        JobError, match=r"checkpoint was trained on .*/model with files \w+, and there is now"
    ) as caught:
        job.run()
    refusal(caught)


def node(rank: int) -> dict[str, str]:
    """Variables of the one process on each of two nodes, but for the port at which they meet."""
    return {
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def test_two_nodes_train_on_one_commit_though_main_moves_between_them(hub: Hub, tmp_path: Path) -> None:
    old, new = published(tiny_model()), published(random_llama(tmp_path / "later", seed=1))
    hub.repos[NAME] = Repo(old, next_push=(LATER, new))
    first = TinyJob(tmp_path / "0", model_id=NAME, num_epochs=1, train_batch_size_per_device=2)
    second = TinyJob(tmp_path / "1")
    second.spec = first.spec
    port = {"PET_MASTER_PORT": str(find_free_port())}
    nodes = [
        LaunchedJob(job, processes=1, environ={**node(rank), **port, "HF_HUB_CACHE": str(tmp_path / f"cache-{rank}")})
        for rank, job in enumerate((first, second))
    ]
    assert [each.end() for each in nodes] == [0, 0], "".join(each.log() for each in nodes)
    assert hub.repos[NAME].commit == LATER
    assert adapter_revision(first) == COMMIT
    assert not [path for _, path in hub.requests if LATER in path]
    for rank in range(2):
        assert [path.name for path in (tmp_path / f"cache-{rank}").glob("models--*/snapshots/*")] == [COMMIT]


@pytest.mark.parametrize(
    ("count", "changed", "sentence"),
    [
        (25, {}, "The nodes read different files at {train_path}:"),
        (24, {"learning_rate": 0.1}, "The nodes read different jobs:"),
        (24, {}, None),
    ],
    ids=["data", "job", "the same"],
)
def test_nodes_with_different_inputs_are_refused_before_a_step(
    count: int, changed: dict[str, Any], sentence: str | None, tmp_path: Path
) -> None:
    jobs = first, second = TinyJob(tmp_path / "0", num_epochs=1), TinyJob(tmp_path / "1")
    write_rows(second.folder / "train.jsonl", rows(count))
    second.spec = first.spec | {"train_path": second.spec["train_path"]} | changed
    port = {"PET_MASTER_PORT": str(find_free_port())}
    nodes = [ForkedJob(job, environ=node(rank) | port) for rank, job in enumerate(jobs)]
    for each, job in zip(nodes, jobs, strict=True):
        each.end()
        message = each.message()
        assert message is not None
        assert message.succeeded == (sentence is None)
        if sentence is not None:
            assert message.reason is Reason.DATA_INVALID
            assert sentence.format(**job.spec) in message.message
    assert (first.output / "metrics.jsonl").exists() == (sentence is None)


@pytest.mark.parametrize(("asks", "folders"), [(True, 2), (False, 1)])
def test_tokens_are_kept_for_each_date_only_where_the_template_asks_for_it(
    asks: bool, folders: int, tmp_path: Path
) -> None:
    """What is trained on is what the run's date makes of the template, on whatever day it is made."""
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_model(), tmp_path / "model")
    template = "{%- for m in messages -%}[{{ m.content }}]{%- endfor -%}{%- if add_generation_prompt -%}[{%- endif -%}"
    dated = "{{- strftime_now('%d %b %Y') -}}" if asks else ""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = dated + template
    tokenizer.save_pretrained(model)
    job = TinyJob(
        tmp_path / "job",
        model_id=str(model),
        generation_config={"prompt_format": {"use_hugging_face_chat_template": True}},
    ).job()
    found = []
    for day in (TODAY, date(2026, 12, 1), TODAY):
        inputs = load_model_inputs(job.spec, resolve(job.spec, {}, day))
        found.append(prepare(data_source(job.spec, inputs, job.spec.train_path), tmp_path / "cache"))
        text = inputs.tokenizer.tokenizer.decode(found[-1].sequences(0)[0][0])
        assert text.startswith(f"{day:%d %b %Y}" if asks else "[")
    assert len({data.folder for data in found}) == folders
    assert found[0].folder == found[2].folder
