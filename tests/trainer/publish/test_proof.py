"""An adapter that is not what was trained, or does nothing, is never a success."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.outcome import Reason, VerifiedResult
from finetune_trainer.errors import JobError
from finetune_trainer.model.adapter_state import adapter_tensors, digests
from finetune_trainer.model.loss import target_logits
from finetune_trainer.publish.adapter import FOLDER, publish_adapter
from finetune_trainer.publish.proof import Movement, movement, prove, sentence
from finetune_trainer.storage import read_manifest
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.train.checkpoint_files import ADAPTER

CONFIG = "adapter_config.json"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
ROWS = [(np.arange(length), np.ones(length, dtype=bool)) for length in (2, 7, 40)]


class Trained:
    """A model whose adapter has been trained, and the folder in which it was published."""

    def __init__(self, folder: Path, *, scale: float = 1.0, alpha: int = 8) -> None:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
        layers = ["q_proj", "up_proj"]
        config = LoraConfig(target_modules=layers, r=2, lora_alpha=alpha, lora_dropout=0.5, task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(base, config)
        self.model.train()
        start = adapter_tensors(self.model)
        self.start = digests(start)
        self.tensors = {name: tensor + scale * torch.randn_like(tensor) for name, tensor in start.items()}
        self.folder = folder
        folder.mkdir(parents=True)
        self.model.peft_config["default"].save_pretrained(str(folder))
        save_file(self.tensors, folder / ADAPTER)

    def prove(self, *, sharded: bool = False) -> VerifiedResult:
        moved = movement(self.start, self.tensors, learning_rate=1e-4)
        return prove(self.folder, model=self.model, trained=self.tensors, moved=moved, rows=ROWS, sharded=sharded)

    def rewrite(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.folder / ADAPTER)
        change(tensors)
        save_file(tensors, self.folder / ADAPTER)

    def configure(self, **keys: object) -> None:
        content = json.loads((self.folder / CONFIG).read_text())
        (self.folder / CONFIG).write_text(json.dumps(content | keys))


def test_a_trained_adapter_is_proven_and_the_figures_say_how(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    found = trained.prove()
    assert (found.tensors, found.moved_tensors, found.rows) == (8, 8, 3)
    assert found.difference_from_training == 0
    assert found.difference_from_base is not None
    assert found.difference_from_base > 0.01
    assert "8 tensors as trained, 8 of them moved; on 3 rows" in sentence(found)


def test_the_model_is_left_with_the_published_tensors_and_its_one_adapter(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    trained.prove()
    assert list(trained.model.peft_config) == ["default"]
    assert digests(adapter_tensors(trained.model)) == digests(trained.tensors)
    assert trained.model.training


def test_logits_of_a_model_that_gpus_share_are_not_compared_and_that_is_said(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    found = trained.prove(sharded=True)
    assert (found.tensors, found.rows, found.difference_from_base) == (8, 0, None)
    assert "logits were not compared" in sentence(found)
    trained.rewrite(lambda tensors: tensors.pop(B))
    with pytest.raises(JobError, match="does not hold the tensors"):
        trained.prove(sharded=True)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda trained: trained.rewrite(lambda tensors: tensors.pop(B)), "does not hold the tensors"),
        (lambda trained: trained.rewrite(lambda tensors: tensors.update({B: tensors[B] * 1.0000001})), "not hold"),
        (lambda trained: trained.rewrite(lambda tensors: tensors.update({B: tensors[B].double()})), "not hold"),
        (lambda trained: trained.configure(lora_alpha=16), "its logits differ by up to"),
        (lambda trained: trained.configure(use_rslora=True), "its logits differ by up to"),
        (lambda trained: trained.configure(target_modules=["q_proj"]), "are in the file and not in the model"),
        (lambda trained: trained.configure(target_modules=["q_proj", "up_proj", "v_proj"]), "no tensor in the file"),
        (lambda trained: trained.configure(r=3), "PEFT cannot open it"),
        (lambda trained: (trained.folder / CONFIG).unlink(), "PEFT cannot open it"),
    ],
)
def test_what_reopens_as_something_else_is_refused(
    tmp_path: Path, damage: Callable[[Trained], object], fault: str
) -> None:
    trained = Trained(tmp_path / "adapter")
    damage(trained)
    with pytest.raises(JobError, match=fault) as caught:
        trained.prove()
    assert caught.value.reason is Reason.ADAPTER_UNPROVEN
    assert list(trained.model.peft_config) == ["default"]


def test_an_adapter_too_weak_to_change_a_logit_is_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    trained.tensors = {name: tensor * 1e-30 if "lora_B" in name else tensor for name, tensor in trained.tensors.items()}
    save_file(trained.tensors, trained.folder / ADAPTER)
    with pytest.raises(JobError, match=r"changes no logit on 3 rows .*raise learning_rate") as caught:
        trained.prove()
    assert caught.value.reason is Reason.ADAPTER_UNPROVEN


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda name, start, end: start, "none of the adapter's 8 tensors moved: raise learning_rate"),
        (lambda name, start, end: torch.zeros_like(end) if "lora_B" in name else end, "every lora_B is zero"),
        (lambda name, start, end: end.fill_(torch.inf) if name == B else end, "values that are no numbers"),
    ],
)
def test_training_that_changed_nothing_is_no_success(
    tmp_path: Path, change: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor], fault: str
) -> None:
    trained = Trained(tmp_path / "adapter")
    start = adapter_tensors(trained.model)
    tensors = {name: change(name, start[name], tensor) for name, tensor in trained.tensors.items()}
    with pytest.raises(JobError, match=fault) as caught:
        movement(trained.start, tensors, learning_rate=1e-4)
    assert caught.value.reason is Reason.ADAPTER_UNPROVEN


def test_tensors_that_come_or_go_in_training_are_a_fault(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    del trained.tensors[B]
    with pytest.raises(JobError, match="were not there at the start or are no more"):
        movement(trained.start, trained.tensors, learning_rate=1e-4)


def test_a_layer_that_no_row_reached_is_named_and_no_fault(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    start = adapter_tensors(trained.model)
    # After one step only B has moved; the other layer has received nothing.
    tensors = {
        name: tensor if "layers.0.self_attn" not in name and "lora_B" in name else start[name]
        for name, tensor in trained.tensors.items()
    }
    found = movement(trained.start, tensors, learning_rate=1e-4)
    assert found == Movement(8, 3, ["model.layers.0.self_attn.q_proj"])
    (notice,) = found.notice()
    assert "has not changed model.layers.0.self_attn.q_proj:" in notice


def test_noise_of_the_device_is_not_taken_for_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = target_logits

    def noisy(*args: Any, **others: Any) -> Any:
        logits, targets = exact(*args, **others)
        return logits + 1e-4 * torch.rand_like(logits), targets

    monkeypatch.setattr("finetune_trainer.publish.proof.target_logits", noisy)
    trained = Trained(tmp_path / "adapter")
    found = trained.prove()
    assert found.difference_from_training is not None
    assert 0 < found.difference_from_training < 1e-3
    trained.configure(lora_alpha=16)
    with pytest.raises(JobError, match="its logits differ"):
        trained.prove()


class LossyStore(LocalStore):
    """Changes one byte of every file of tensors that goes through it."""

    def download_file(self, key: str, file: Path) -> None:
        super().download_file(key, file)
        if key.endswith(ADAPTER):
            file.write_bytes(file.read_bytes()[:-1] + b"\x55")


DETAILS = {"run": {}, "baseModel": "base"}


def test_the_manifest_is_written_after_the_proof_and_says_what_was_checked(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    store = LocalStore(tmp_path / "out")

    def verify(copy: Path) -> VerifiedResult:
        assert not store.exists(f"{FOLDER}/manifest.json")
        assert copy != trained.folder
        return trained.prove()

    result = publish_adapter(store, trained.folder, DETAILS, verify)
    assert result.verified == trained.prove()
    manifest = read_manifest(store, FOLDER)
    assert manifest is not None
    assert manifest.details["verified"]["differenceFromTraining"] == 0
    assert result.sha256 == manifest.sha256()


def test_bytes_that_come_back_changed_are_no_adapter(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    store = LossyStore(tmp_path / "out")
    with pytest.raises(JobError, match=rf"{ADAPTER} came back other than it was written") as caught:
        publish_adapter(store, trained.folder, DETAILS, lambda _: trained.prove())
    # Another attempt publishes the same checkpoint again.
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
    assert store.list() == []


def test_an_adapter_that_fails_its_proof_is_not_left_for_servers_to_find(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "adapter")
    trained.configure(lora_alpha=16)
    store = LocalStore(tmp_path / "out")
    with pytest.raises(JobError, match="is not published"):
        publish_adapter(store, trained.folder, DETAILS, lambda _: trained.prove())
    assert store.list() == []
