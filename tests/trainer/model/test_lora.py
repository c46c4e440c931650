"""An adapter is on the layers it was told, and plain PEFT puts what is published back on exactly them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from finetune_api.lora import LoraConfig
from finetune_trainer.model.adapter_state import adapter_tensors
from finetune_trainer.model.lora import adapted, add_lora, published_config
from finetune_trainer.model.reach import reached_by_text
from finetune_trainer.model.targets import candidates, resolve_targets, share_of_experts
from tests.architectures.zoo import MODEL_TYPES, tiny_config, tiny_model

IDS = torch.tensor([[5, 9, 12, 30, 44, 7, 8, 100, 101, 50, 51, 52]])


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def trained(base: Any, config: LoraConfig) -> Any:
    """A PeftModel whose every matrix does something."""
    targets = resolve_targets(base, config, reached_by_text(base, candidates(base), IDS[0].tolist()))
    model = add_lora(base, config, targets)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def publish(model: Any, folder: Path) -> None:
    published_config(model).save_pretrained(folder)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")  # each architecture has its own
@pytest.mark.parametrize(
    ("kind", "config", "parameters"),
    [
        ("llama", {}, False),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
        ("mixtral", {}, False),
        ("mixtral", {"experts": True}, True),
        # Layers whose names PEFT takes for experts' are published as parameters.
        ("deepseek_v3", {}, True),
        ("deepseek_v3", {"experts": True, "r": 4}, True),
        ("deepseek_v3", {"rank_pattern": {"gate_proj": 3, "q_a_proj": 2}, "alpha_pattern": {"up_proj": 5}}, True),
        ("qwen3_next", {"use_rslora": True}, True),
        ("gemma3", {}, False),
    ],
)
def test_plain_peft_reads_back_what_was_trained(
    kind: str, config: dict[str, Any], parameters: bool, tmp_path: Path
) -> None:
    changes = {"tie_word_embeddings": False} if kind == "llama" else {}
    base = tiny_model(kind, **changes).requires_grad_(False)
    fresh = copy.deepcopy(base)
    before = answer(fresh)
    model = trained(base, LoraConfig(**config))
    expected = answer(model)
    publish(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        reopened = PeftModel.from_pretrained(fresh, str(tmp_path))
    torch.testing.assert_close(answer(reopened), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3
    assert bool(getattr(reopened.peft_config["default"], "target_parameters", None)) is parameters
    assert set(get_peft_model_state_dict(reopened, save_embedding_layers=False)) == set(
        get_peft_model_state_dict(model, save_embedding_layers=False)
    )
    torch.testing.assert_close(answer(reopened.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_experts_of_every_mixture_are_read_back_and_merged_as_they_were_trained(tmp_path: Path) -> None:
    without = []
    for kind in (kind for kind in MODEL_TYPES if _has_experts(kind)):
        base = tiny_model(kind).requires_grad_(False)
        fresh = copy.deepcopy(base)
        model = trained(base, LoraConfig(experts=True))
        if not adapted(model).parameters:
            without.append(kind)
            continue
        expected = answer(model)
        state = adapter_tensors(model)
        published_config(model).save_pretrained(tmp_path / kind)
        save_file(state, tmp_path / kind / "adapter_model.safetensors")
        reopened = PeftModel.from_pretrained(fresh, str(tmp_path / kind))
        torch.testing.assert_close(answer(reopened), expected, rtol=1e-5, atol=2e-5, msg=kind)
        torch.testing.assert_close(answer(reopened.merge_and_unload()), expected, rtol=1e-4, atol=1e-4, msg=kind)
    assert without == ["dbrx"]


def _has_experts(kind: str) -> bool:
    """Whether a tiny model of this type can be made and has weights in experts."""
    try:
        with torch.device("meta"):
            return share_of_experts(AutoModelForCausalLM.from_config(tiny_config(kind))) > 0
    except Exception:  # What cannot be made has none.
        return False


def test_no_base_matrix_is_in_an_adapter_on_embedding_and_head(tmp_path: Path) -> None:
    base = tiny_model("llama", tie_word_embeddings=False).requires_grad_(False)
    publish(trained(base, LoraConfig(target_modules=["embed_tokens", "lm_head"])), tmp_path)
    matrix = base.get_input_embeddings().weight.numel()
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < matrix * 4
