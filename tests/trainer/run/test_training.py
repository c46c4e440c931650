"""What a whole run promises, on a random model small enough to train in a moment."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch.nn import functional

from finetune_api.outcome import Reason, TerminationMessage
from finetune_trainer.errors import JobError
from finetune_trainer.inputs import data_source, load_model_inputs
from finetune_trainer.model.adapter_state import adapter_tensors
from finetune_trainer.storage import MANIFEST_NAME, open_store, read_manifest
from finetune_trainer.train import plan
from finetune_trainer.train import state as saved
from tests.s3_server import S3Server
from tests.trainer.run.tiny_job import TinyJob, rows, tiny_model, write_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized data of one test must not help another."""
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))


def manifest(job: TinyJob, folder: str = "adapter") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((job.output / folder / MANIFEST_NAME).read_text())
    return content


def test_a_run_ends_with_a_complete_adapter_and_says_where_it_is(tmp_path: Path) -> None:
    # A scale that is no power of two, which fused layers and PEFT's round differently.
    job = TinyJob(tmp_path, lora_config={"r": 4, "lora_alpha": 9, "lora_dropout": 0.0})
    message = job.run()
    assert message.succeeded
    assert message.adapter is not None
    assert message.adapter.uri == f"{job.output}/adapter"
    published = read_manifest(open_store(str(job.output)), "adapter")
    assert published is not None
    assert message.adapter.sha256 == published.sha256()
    assert message.adapter.size_bytes == published.size_bytes
    assert message.adapter.verified is not None
    assert message.adapter.verified.rows == 4
    assert message.adapter.verified.difference_from_training == 0
    assert published.details["verified"]["tensors"] == message.adapter.verified.moved_tensors == 28
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "prompt_format.yaml",
        "report.html",
        "SERVING.md",
    } <= set(published.files)
    assert "--lora-modules tiny=ADAPTER_DIR" in (job.output / "adapter" / "SERVING.md").read_text()
    assert published.details["job"] == "tiny"
    assert message.dataset is not None
    assert message.dataset.rows == 24
    assert message.metrics is not None
    assert message.metrics.train_loss is not None
    assert message.metrics.eval_loss == pytest.approx(min(job.eval_losses().values()))
    assert len(message.to_bytes()) <= 4096
    assert (job.output / "report.html").read_bytes() == (job.output / "adapter" / "report.html").read_bytes()


@pytest.mark.parametrize("settings", [{}, {"num_warmup_steps": 10}])
def test_a_run_of_one_step_trains(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Three rows in one epoch, with the default warm-up and with one ten times as long as the run."""
    job = TinyJob(tmp_path, num_epochs=1)
    del job.spec["num_warmup_steps"], job.spec["checkpoint_and_evaluation_frequency"]
    job.spec |= settings
    write_rows(tmp_path / "train.jsonl", rows(3))
    assert job.run().succeeded
    weights = load_file(job.output / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("model_id", ["acme/tiny", None])
def test_the_adapter_names_its_base_by_a_name_that_others_know_or_not_at_all(
    tmp_path: Path, model_id: str | None
) -> None:
    """Not by a path of the machine that trained, wherever the weights came from."""
    job = TinyJob(tmp_path)
    if model_id is not None:
        job.spec |= {"model_id": model_id, "initial_base_model_ckpt_path": str(tiny_model())}
    message = job.run()
    adapter = job.output / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (model_id, None)
    assert message.adapter is not None
    assert message.adapter.base_model == (model_id or tiny_model().name)
    for file in adapter.iterdir():
        if file.name != "report.html":  # It shows the whole job.
            assert str(tiny_model()).encode() not in file.read_bytes(), file.name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(str(adapter)).r == 4


def test_the_adapter_says_how_long_a_context_it_saw_and_where_answers_end(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, context_length=40)
    job.run()
    assert json.loads((job.output / "adapter" / "manifest.json").read_text())["contextLength"] == 40
    assert json.loads((job.output / "adapter" / "adapter_config.json").read_text())["inference_mode"] is True
    generation = json.loads((job.output / "adapter" / "generation_config.json").read_text())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.output / "adapter")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation["eos_token_id"]
    assert "stop_strings" not in generation


def test_the_stop_that_a_chat_template_trains_is_written_beside_another_eos(tmp_path: Path) -> None:
    """As base models are published: a ChatML template, and <|endoftext|> as the eos that no answer is trained with."""
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    own = {"eos_token_id": tokenizer.eos_token_id, "repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6}
    (base / "generation_config.json").write_text(json.dumps(own))
    prompt_format = {"use_hugging_face_chat_template": True}
    job = TinyJob(tmp_path, model_id=str(base), generation_config={"prompt_format": prompt_format}, num_epochs=1)
    job.run()
    generation = json.loads((job.output / "adapter" / "generation_config.json").read_text())
    stops = ["<|endoftext|>", "<|im_end|>"]
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(stops)
    assert generation["temperature"] == 0.6
    assert not {"stop_strings", "repetition_penalty"} & set(generation)


def test_a_stop_that_no_token_ends_is_written_as_text(tmp_path: Path) -> None:
    prompt_format = {"system": "{instruction}", "user": "{instruction}\n", "assistant": "{instruction}</s>"}
    job = TinyJob(
        tmp_path, generation_config={"prompt_format": prompt_format, "stopping_sequences": ["</s>"]}, num_epochs=1
    )
    job.run()
    assert json.loads((job.output / "adapter" / "generation_config.json").read_text())["stop_strings"] == ["</s>"]


def test_a_finished_job_started_again_trains_nothing(tmp_path: Path) -> None:
    job = TinyJob(tmp_path)
    first = job.run()
    before = {path: path.stat().st_mtime_ns for path in job.output.rglob("*") if path.is_file()}
    second = job.run()
    assert second.succeeded
    assert second.adapter == first.adapter
    assert second.metrics == first.metrics
    assert "nothing was trained" in second.message
    after = {path: path.stat().st_mtime_ns for path in job.output.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != ".finetune.lock"} == {
        path: time for path, time in before.items() if path.name != ".finetune.lock"
    }


def test_an_output_with_another_jobs_adapter_is_refused(tmp_path: Path) -> None:
    TinyJob(tmp_path).run()
    other = TinyJob(tmp_path, learning_rate=1e-4)
    with pytest.raises(JobError, match=r"learning_rate.*choose another output") as caught:
        other.run()
    assert caught.value.reason is Reason.OUTPUT_CONFLICT


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-4}, "learning_rate was 0.005 and is now 0.0001"),
        ({"seed": 7}, "seed was 42 and is now 7"),
        ({"lora_config": {"r": 2, "lora_dropout": 0.0}}, "lora_config"),
        ({"train_batch_size_per_device": 2}, "rows_per_batch was 4 and is now 2"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    job = TinyJob(tmp_path)
    job.run()
    # As after a crash before publishing.
    open_store(str(job.output)).delete_tree("adapter")
    other = TinyJob(tmp_path, **change)
    with pytest.raises(JobError) as caught:
        other.run()
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    assert named in caught.value.message


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    job = TinyJob(tmp_path)
    job.run()
    open_store(str(job.output)).delete_tree("adapter")
    write_rows(tmp_path / "train.jsonl", rows(23))
    with pytest.raises(JobError, match="train_data_sha256") as caught:
        job.run()
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH


def test_a_checkpoint_without_manifest_does_not_count(tmp_path: Path) -> None:
    job = TinyJob(tmp_path)
    job.run()
    losses = job.losses()
    open_store(str(job.output)).delete_tree("adapter")
    for path in job.output.glob(f"checkpoints/*/{MANIFEST_NAME}"):
        path.unlink()
    assert job.run().succeeded
    assert job.losses() == pytest.approx(losses, abs=1e-5)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_more(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, num_checkpoints_to_keep=9)
    first = job.run()
    losses, evaluated = job.losses(), job.eval_losses()
    open_store(str(job.output)).delete_tree("adapter")
    path = job.output / "checkpoints" / "step-00000012" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    second = job.run()
    assert second.succeeded
    assert second.metrics == first.metrics
    assert job.losses() == losses
    assert job.eval_losses() == evaluated


def test_a_run_that_ended_before_it_was_published_trains_no_more_and_is_published(tmp_path: Path) -> None:
    job = TinyJob(tmp_path)
    first = job.run()
    weights = job.output / "adapter" / "adapter_model.safetensors"
    losses, published = job.losses(), weights.read_bytes()
    open_store(str(job.output)).delete_tree("adapter")
    second = job.run()
    assert second.succeeded
    assert second.adapter is not None
    assert first.adapter is not None
    assert second.adapter.verified == first.adapter.verified
    assert job.losses() == losses
    assert weights.read_bytes() == published


def test_an_adapter_that_is_no_number_is_not_saved_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the loss is looked at every few steps only."""
    job = TinyJob(tmp_path)
    exact = adapter_tensors
    made: list[dict[str, torch.Tensor]] = []

    def broken(model: Any) -> dict[str, torch.Tensor]:
        found = exact(model)
        if made:
            found |= {name: torch.full_like(tensor, torch.nan) for name, tensor in found.items()}
        made.append(found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(saved, "adapter_tensors", broken)
        with pytest.raises(JobError, match="After step 8 the adapter has values that are no numbers") as caught:
            job.run()
    assert caught.value.reason is Reason.LOSS_DIVERGED
    assert [path.name for path in (job.output / "checkpoints").iterdir()] == ["step-00000004"]


def test_an_adapter_that_changes_nothing_is_no_success(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, learning_rate=1e-30, num_epochs=1)
    with pytest.raises(JobError, match="raise learning_rate") as caught:
        job.run()
    assert caught.value.reason is Reason.ADAPTER_UNPROVEN
    assert not (job.output / "adapter").exists()


def rising_job(folder: Path, learning_rate: float) -> tuple[TinyJob, TerminationMessage]:
    """What is learnt from the training rows makes the answers of validation less likely, so their loss soon rises."""
    job = TinyJob(
        folder,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        num_epochs=8,
        num_checkpoints_to_keep=2,
        lora_config={"r": 8, "lora_alpha": 64, "lora_dropout": 0.0},
    )
    odd = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Purple elephants dance quietly."}]
    write_rows(folder / "valid.jsonl", [{"messages": odd}])
    return job, job.run()


def lowest(job: TinyJob) -> int:
    """The step with the lowest validation loss."""
    losses = job.eval_losses()
    return min(losses, key=lambda step: losses[step])


def test_the_published_adapter_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    # That the last loss is not by chance the lowest after all depends on how a machine rounds.
    runs = (rising_job(tmp_path / str(rate), rate) for rate in (0.005, 0.01, 0.02, 0.05))
    job, message = next((job, message) for job, message in runs if lowest(job) != max(job.eval_losses()))
    losses, best = job.eval_losses(), lowest(job)
    assert message.metrics is not None
    assert message.metrics.eval_loss == pytest.approx(losses[best])
    assert manifest(job)["step"] == best
    checkpoint = job.output / "checkpoints" / f"step-{best:08d}" / "adapter_model.safetensors"

    kept, published = load_file(checkpoint), load_file(job.output / "adapter" / "adapter_model.safetensors")
    assert kept.keys() == published.keys()
    assert all(torch.equal(kept[name], published[name]) for name in kept)


def test_only_the_best_checkpoints_and_the_newest_are_kept(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, checkpoint_and_evaluation_frequency={"strategy": "steps", "value": 2})
    job.run()
    losses = job.eval_losses()
    kept = {int(path.name.removeprefix("step-")) for path in (job.output / "checkpoints").iterdir()}
    assert kept == {min(losses, key=lambda step: losses[step]), max(losses)}


@pytest.mark.parametrize("task", ["instruction_tuning", "causal_lm"])
def test_the_loss_is_the_mean_over_all_trained_tokens_of_a_step(tmp_path: Path, task: str) -> None:
    """Recomputed by hand, row by row, without padding."""
    job = TinyJob(tmp_path, task=task, gradient_accumulation_steps=3, train_batch_size_per_device=2, num_epochs=1)
    job.run()
    spec = job.job().spec
    model_inputs = load_model_inputs(spec)
    from finetune_trainer.data.dataset import prepare
    from finetune_trainer.model.load import load_model
    from finetune_trainer.train.plan import make_plan

    data = prepare(data_source(spec, model_inputs, spec.train_path), tmp_path / "cache")
    plan = make_plan(rows=len(data), rows_per_step=6, num_epochs=1, min_update_steps=1, seed=spec.seed)
    model = load_model(Path(spec.model_id), dtype=torch.float32, trust_remote_code=False).eval()
    total, count = 0.0, 0
    for row in plan.rows_of_step(0):
        for ids, trained in data.sequences(int(row)):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
            wanted = torch.from_numpy(trained)[1:]
            total += functional.cross_entropy(logits[wanted], torch.from_numpy(ids)[1:][wanted], reduction="sum").item()
            count += int(wanted.sum())
    # Before the first step the adapter changes nothing.
    assert job.losses()[1] == pytest.approx(total / count, rel=1e-5)


def test_padding_does_not_change_the_losses(tmp_path: Path) -> None:
    longest = TinyJob(tmp_path / "longest", context_length=96)
    longest.run()
    padded = TinyJob(tmp_path / "max_length", context_length=96, padding="max_length")
    padded.run()
    assert padded.losses() == pytest.approx(longest.losses(), rel=1e-5)


def test_accumulation_does_not_change_the_losses(tmp_path: Path) -> None:
    whole = TinyJob(tmp_path / "whole", train_batch_size_per_device=6, num_epochs=1)
    whole.run()
    parts = TinyJob(tmp_path / "parts", train_batch_size_per_device=2, gradient_accumulation_steps=3, num_epochs=1)
    parts.run()
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_without_num_epochs_the_data_are_repeated_until_min_update_steps(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, num_epochs=None, min_update_steps=14, valid_path=None)
    job.spec = {key: value for key, value in job.spec.items() if value is not None}
    job.run()
    assert max(job.losses()) == 18  # three epochs of six steps


def test_a_job_without_a_batch_size_gets_one_by_its_tokens_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row in 24 is long. What is to be had by a step may be another when a later version resumes."""
    monkeypatch.setattr(plan, "DEFAULT_TOKENS_PER_STEP", 8 * 40)
    job = TinyJob(tmp_path, num_epochs=1, context_length=400)
    del job.spec["train_batch_size_per_device"]
    long = [{"role": "user", "content": "Please. " * 60}, {"role": "assistant", "content": "No."}]
    write_rows(tmp_path / "train.jsonl", [*rows(23), {"messages": long}])
    job.run()
    assert max(job.losses()) == 3
    assert "train_batch_size_per_device: 8" in (job.output / "report.html").read_text()
    open_store(str(job.output)).delete_tree("adapter")
    monkeypatch.setattr(plan, "DEFAULT_TOKENS_PER_STEP", 1)
    assert job.run().succeeded
    assert max(job.losses()) == 3


def test_eval_first_measures_the_untrained_model(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, eval_first=True, num_epochs=1)
    job.run()
    assert 0 in job.eval_losses()


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, learning_rate=10.0, max_grad_norm=0, num_epochs=40, num_warmup_steps=0)
    job.spec["lora_config"] = {"r": 4, "lora_alpha": 60000, "lora_dropout": 0.0}
    with pytest.raises(JobError, match=r"(loss|gradient) became (nan|inf) at step \d+") as caught:
        job.run()
    assert caught.value.reason is Reason.LOSS_DIVERGED
    assert not (job.output / "adapter").exists()


def test_training_continues_an_adapter(tmp_path: Path) -> None:
    first = TinyJob(tmp_path / "first", learning_rate=5e-2)
    first.run()
    second = TinyJob(
        tmp_path / "second", initial_adapter_model_ckpt_path=str(first.output / "adapter"), learning_rate=1e-6
    )
    second.run()
    assert second.eval_losses()[4] == pytest.approx(min(first.eval_losses().values()), rel=1e-3)


def test_a_named_target_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, lora_config={"r": 4, "target_modules": ["q_proj", "c_attn"]})
    with pytest.raises(JobError, match=r"names c_attn, .*q_proj") as caught:
        job.run()
    assert caught.value.reason is Reason.INVALID_SPEC


def test_a_context_longer_than_the_models_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    job = TinyJob(tmp_path, context_length=1024)
    (tmp_path / "train.jsonl").write_text("not json\n")
    with pytest.raises(JobError, match="supports at most 512") as caught:
        job.run()
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG


def test_bad_rows_end_the_run_before_the_weights_are_read(tmp_path: Path) -> None:
    job = TinyJob(tmp_path)
    job.spec["initial_base_model_ckpt_path"] = str(_without_weights(Path(job.spec["model_id"]), tmp_path / "model"))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": ""}]}\n')
    with pytest.raises(JobError, match=r"1 of 25 rows are invalid.*line 25: message 1 \(user\) has an empty content"):
        job.run()


def test_two_runs_cannot_use_one_folder_at_once(tmp_path: Path) -> None:
    from filelock import FileLock

    job = TinyJob(tmp_path)
    job.output.mkdir()
    with FileLock(job.output / ".finetune.lock"), pytest.raises(JobError, match="Another run is using"):
        job.run()


def test_results_go_to_s3_and_a_second_run_finds_them_there(tmp_path: Path, s3_environment: S3Server) -> None:
    bucket = s3_environment.new_bucket()
    client = s3_environment.client()
    local = TinyJob(tmp_path)
    for name in ("train.jsonl", "valid.jsonl"):
        client.upload_file(str(tmp_path / name), bucket, f"data/{name}")
    job = TinyJob(
        tmp_path,
        train_path=f"s3://{bucket}/data/train.jsonl",
        valid_path=f"s3://{bucket}/data/valid.jsonl",
        output={"uri": f"s3://{bucket}/team"},
    )
    message: TerminationMessage = job.run()
    assert message.adapter is not None
    assert message.adapter.uri == f"s3://{bucket}/team/adapter"
    assert not local.output.exists()
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket=bucket, Prefix="team/")["Contents"]}
    assert {"team/adapter/manifest.json", "team/report.html", "team/metrics.jsonl"} <= keys
    assert any(key.startswith("team/checkpoints/step-") for key in keys)
    assert "nothing was trained" in job.run().message


def _without_weights(model: Path, folder: Path) -> Path:
    import shutil

    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder
