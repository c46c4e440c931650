"""Models whose parts do not belong together, in a whole run: refused early and for good, or trained with a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from tests.hub_server import Hub, Repo
from tests.trainer.run.tiny_job import TinyJob, tiny_model


def copied(folder: Path) -> Path:
    shutil.copytree(tiny_model(), folder)
    return folder


def test_a_model_without_some_weights_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    model = copied(tmp_path / "model")
    held = load_file(model / "model.safetensors")
    save_file({name: held[name] for name in held if "layers.1.mlp" not in name}, model / "model.safetensors")
    job = TinyJob(tmp_path / "job", model_id=str(model))
    (job.folder / "train.jsonl").write_text("not json\n")
    with pytest.raises(JobError, match=rf"^{model} lacks 3 of its \d+ weights") as caught:
        job.run()
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_weights_that_the_model_has_no_place_for_are_counted_in_the_report(tmp_path: Path) -> None:
    model = copied(tmp_path / "model")
    held = load_file(model / "model.safetensors")
    save_file(held | {"vision.weight": held["model.norm.weight"].clone()}, model / "model.safetensors")
    job = TinyJob(tmp_path / "job", model_id=str(model))
    assert job.run().succeeded
    assert "has no place for, they are not used (1: vision.weight)" in (job.output / "report.html").read_text()


def test_data_with_a_token_that_the_model_has_no_embedding_for_are_refused(tmp_path: Path) -> None:
    model = copied(tmp_path / "model")
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    job = TinyJob(tmp_path / "job", model_id=str(model))
    with pytest.raises(
        JobError, match=r"The data have token \d+ \('.+'\), but .* embeddings for 1000 tokens"
    ) as caught:
        job.run()
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_a_tokenizer_may_hold_tokens_that_no_text_makes_not_even_padding(tmp_path: Path) -> None:
    """Llama 2 with the [PAD] that many added to its tokenizer and never to its embedding; Gemma 3's image token."""
    from transformers import AutoTokenizer

    model = copied(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    assert tokenizer.pad_token_id == json.loads((model / "config.json").read_text())["vocab_size"]
    job = TinyJob(tmp_path / "job", model_id=str(model), padding="max_length", context_length=128)
    assert job.run().succeeded


def test_of_a_sharded_model_on_the_hub_no_shard_is_downloaded_when_some_weight_is_missing(
    hub: Hub, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = copied(tmp_path / "model")
    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model()).save_pretrained(model, max_shard_size="1MB")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.repos["team/model"] = Repo({path.name: path.read_bytes() for path in model.iterdir()})
    job = TinyJob(tmp_path / "job", model_id="team/model")
    with pytest.raises(
        JobError, match=r"^team/model lacks 1 of its \d+ weights \(model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        job.run()
    assert "model.safetensors.index.json" in hub.downloads()
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]
