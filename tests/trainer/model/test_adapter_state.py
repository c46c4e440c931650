"""No tensor of an adapter is lost between a model and a file, whatever PEFT makes of its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.adapter_state import (
    adapter_tensors,
    cannot_be_reloaded,
    digests,
    not_finite,
    put_tensors,
)
from finetune_trainer.model.lora import continue_lora
from finetune_trainer.train.state import load_adapter_state

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def base_model(model_type: str) -> Any:
    # Only layers of these kinds have the projections that PEFT cannot find again.
    kinds: dict[str, Any] = (
        {"layer_types": ["sliding_attention", "full_attention"]} if model_type == "inkling2_text" else {}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES, **kinds)).eval()


def linear_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"]


def adapted(model: Any, layers: list[str]) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=layers, r=2, task_type="CAUSAL_LM"))


def published(model: Any, folder: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """`model`'s adapter with random tensors, in `folder`; those in `tensors` are put in their place or added."""
    drawn = {name: torch.randn_like(tensor) for name, tensor in adapter_tensors(model).items()}
    assert put_tensors(model, drawn) is None
    folder.mkdir(exist_ok=True)
    model.peft_config["default"].save_pretrained(str(folder))
    save_file(drawn | tensors, folder / "adapter_model.safetensors")
    return drawn


# laguna's checkpoints have other names than its model, and PEFT reads the model's own as if they were a checkpoint's.
@pytest.mark.parametrize("model_type", ["llama", "laguna", "mixtral", "qwen2_moe"])
def test_plain_peft_opens_the_file_and_answers_as_the_model_in_memory(model_type: str, tmp_path: Path) -> None:
    base = base_model(model_type)
    layers = linear_layers(base)
    assert cannot_be_reloaded(base, layers) == []
    model = adapted(base, layers)
    drawn = published(model, tmp_path)
    reopened = PeftModel.from_pretrained(base_model(model_type), str(tmp_path)).eval()
    assert digests(adapter_tensors(reopened)) == digests(drawn)
    tokens = torch.arange(10)[None]
    assert torch.equal(reopened(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_a_layer_that_peft_cannot_find_again_is_named_before_it_is_trained() -> None:
    base = base_model("inkling2_text")
    layers = linear_layers(base)
    lost = cannot_be_reloaded(base, layers)
    assert lost
    assert {layer.rpartition(".")[2] for layer in lost} == {"weight_proj"}
    with pytest.raises(JobError, match=r"weight_proj.*exclude_modules") as caught:
        adapter_tensors(adapted(base, layers))
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_the_layers_that_remain_are_reopened_whole(tmp_path: Path) -> None:
    base = base_model("inkling2_text")
    lost = cannot_be_reloaded(base, linear_layers(base))
    model = adapted(base, [layer for layer in linear_layers(base) if layer not in lost])
    drawn = published(model, tmp_path)
    reopened = PeftModel.from_pretrained(base_model("inkling2_text"), str(tmp_path))
    assert digests(adapter_tensors(reopened)) == digests(drawn)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda tensors: tensors.pop(KEY), r"q_proj\.lora_A\.default\.weight has no tensor in the file"),
        (lambda tensors: tensors.update({KEY.replace("q_proj", "w_proj"): torch.zeros(2, 16)}), r"w_proj.* not in the"),
        (lambda tensors: tensors.update({KEY: torch.full((2, 16), torch.nan)}), r"q_proj.* no numbers"),
        (lambda tensors: tensors.update({KEY: torch.zeros(3, 16)}), r"PEFT refuses them \(size mismatch"),
        (lambda tensors: tensors.clear(), r"and 25 others have no tensor"),
    ],
    ids=["missing", "unknown", "not a number", "another shape", "empty"],
)
def test_a_file_that_is_not_the_whole_adapter_is_neither_resumed_nor_continued(
    change: Any, fault: str, tmp_path: Path
) -> None:
    base = base_model("llama")
    model = adapted(base, linear_layers(base))
    tensors = published(model, tmp_path)
    load_adapter_state(model, tmp_path)
    continue_lora(base_model("llama"), tmp_path)

    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(JobError, match=fault) as caught:
        load_adapter_state(model, tmp_path)
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    with pytest.raises(JobError, match="initial_adapter_model_ckpt_path") as caught:
        continue_lora(base_model("llama"), tmp_path)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_an_adapter_of_fewer_layers_is_continued_as_it_is(tmp_path: Path) -> None:
    """Its configuration says which."""
    drawn = published(adapted(base_model("llama"), ["model.layers.1.mlp.up_proj"]), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "model.layers.1.mlp.up_proj"
    ]
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == drawn.keys()
    assert digests(adapter_tensors(continue_lora(base_model("llama"), tmp_path))) == digests(drawn)


def test_digests_and_finiteness_are_of_the_bits() -> None:
    tensors = {"a": torch.tensor([0.0]), "b": torch.tensor([-0.0]), "c": torch.tensor([1.0, torch.inf])}
    assert len(set(digests(tensors).values())) == 3
    assert not_finite(tensors) == ["c"]
    assert digests({"a": torch.ones(2, 3, dtype=torch.bfloat16).T})
