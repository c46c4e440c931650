"""Whole jobs over a base model in 4 and 8 bits: trained, opened by others, merged."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune_api.outcome import Reason
from finetune_api.training import Quantization
from finetune_trainer.chat import ChatModel
from finetune_trainer.errors import JobError
from finetune_trainer.merge.merge import merge
from finetune_trainer.model.quantized import is_quantized
from tests.architectures.examine import loss_of, validation_rows
from tests.trainer.forked_job import run_to_end
from tests.trainer.run.tiny_job import TinyJob

KINDS = get_args(Quantization)
PLAIN = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
"""As SERVING.md has it."""
AS_TRAINED = {"nf4": 1e-5, "int8": 2e-2}
"""Relative, of a loss in plain transformers; LLM.int8() rounds what goes into a layer besides."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Quantization:
    found: Quantization = request.param
    return found


@pytest.fixture(scope="module")
def trained(kind: Quantization, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyJob, str]:
    """A job that has run, and what it said."""
    job = TinyJob(tmp_path_factory.mktemp(kind) / "job", quantization=kind)
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        assert job.run().succeeded
    return job, console.getvalue()


def folder_of(job: TinyJob) -> Path:
    return job.output / "adapter"


def test_rows_are_packed_and_the_model_learns(trained: tuple[TinyJob, str]) -> None:
    job, console = trained
    assert "Rows lie in packs" in console
    losses = job.eval_losses()
    assert losses[max(losses)] < losses[min(losses)]


def test_the_adapter_says_what_base_it_was_trained_on(trained: tuple[TinyJob, str], kind: Quantization) -> None:
    folder = folder_of(trained[0])
    assert json.loads((folder / "manifest.json").read_text())["quantization"] == kind
    assert f"trained on it in `{kind}`" in (folder / "README.md").read_text()
    assert f"in `{json.dumps(kind)}` (bitsandbytes) as it was trained" in (folder / "SERVING.md").read_text()


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_plain_peft_finds_the_trained_loss_on_the_same_base(trained: tuple[TinyJob, str], kind: Quantization) -> None:
    job, _ = trained
    base: Any = AutoModelForCausalLM.from_pretrained(
        job.spec["model_id"], dtype=torch.float32, quantization_config=PLAIN[kind], device_map={"": "cpu"}
    )
    for layer in base.modules():
        # On processors with bfloat16 bitsandbytes packs weights for a kernel of its own where nothing is trained: it
        # rounds their scales, and fails with layers as small as these.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    opened = PeftModel.from_pretrained(base, str(folder_of(job))).eval()
    found = loss_of(opened, validation_rows(job.file()))
    assert found == pytest.approx(min(job.eval_losses().values()), rel=AS_TRAINED[kind])


def test_chat_takes_the_base_as_it_was_trained(trained: tuple[TinyJob, str]) -> None:
    model = ChatModel.load(folder_of(trained[0]), base_model=trained[0].spec["model_id"])
    assert sum(is_quantized(layer) for layer in model._model.modules()) == 14
    assert model.answer([{"role": "user", "content": "What is 1 plus 1?"}], max_new_tokens=2).tokens


def test_a_merge_says_how_far_it_is_from_what_was_trained(
    trained: tuple[TinyJob, str], kind: Quantization, tmp_path: Path
) -> None:
    job, _ = trained
    merged = merge(str(folder_of(job)), tmp_path / "merged", base_model=job.spec["model_id"])
    (told,) = [notice for notice in merged.notices if "was trained on" in notice]
    assert f"in {kind} and is merged into the weights as published" in told
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(is_quantized(layer) for layer in plain.modules())


@pytest.mark.parametrize(
    ("processes", "more"),
    [(1, {"gradient_checkpointing": True}), (2, {"train_batch_size_per_device": 2})],
    ids=["activations computed again", "two processes"],
)
def test_it_is_the_same_run_however_the_work_is_laid_out(
    trained: tuple[TinyJob, str], kind: Quantization, tmp_path: Path, processes: int, more: dict[str, Any]
) -> None:
    found = run_to_end(tmp_path / "job", processes=processes, quantization=kind, **more)
    assert found.job.losses() == pytest.approx(trained[0].losses(), rel=1e-4)


def test_a_base_that_was_published_quantized_trains_as_it_is(
    trained: tuple[TinyJob, str], kind: Quantization, tmp_path: Path
) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(
        trained[0].spec["model_id"], quantization_config=PLAIN[kind], device_map={"": "cpu"}
    )
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(trained[0].spec["model_id"]).save_pretrained(tmp_path / "base")
    job = TinyJob(tmp_path / "job", model_id=str(tmp_path / "base"))
    assert job.run().succeeded
    assert job.losses() == pytest.approx(trained[0].losses(), rel=1e-4)


def test_another_quantization_is_another_job(trained: tuple[TinyJob, str]) -> None:
    job = TinyJob(trained[0].folder)
    with pytest.raises(JobError, match="it differs in quantization") as raised:
        job.run()
    assert raised.value.reason is Reason.OUTPUT_CONFLICT
