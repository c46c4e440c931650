"""A job whose base model is a GGUF file, from its fetch to its published adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_trainer.chat import ChatModel
from finetune_trainer.storage import fetch_model, open_store, read_manifest
from tests.gguf_file import write_gguf
from tests.trainer.run.tiny_job import TinyJob


def test_a_quantized_file_is_trained_and_its_adapter_fits_the_dequantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "models" / "tiny-q8_0.gguf"
    file.parent.mkdir()
    write_gguf(file, quantize=True)
    job = TinyJob(tmp_path / "job", model_id=str(file), num_epochs=3, learning_rate=0.02)
    assert job.run().succeeded
    losses = job.losses()
    assert losses[max(losses)] < losses[min(losses)] - 0.2
    assert "is quantized (Q8_0)" in capsys.readouterr().out
    published = read_manifest(open_store(str(job.output)), "adapter")
    assert published is not None
    assert published.details["baseModel"] == file.name
    assert "is quantized (Q8_0)" in (job.output / "adapter" / "report.html").read_text()

    straight = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    made = AutoModelForCausalLM.from_pretrained(fetch_model(str(file)).path, dtype=torch.float32)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        found = [
            PeftModel.from_pretrained(model, str(job.output / "adapter"))(input_ids=ids).logits
            for model in (straight, made)
        ]
    assert torch.equal(*found)
    answer = ChatModel.load(job.output / "adapter", base_model=str(file)).answer(
        [{"role": "user", "content": "Hello"}], max_new_tokens=4
    )
    assert answer.text is not None
