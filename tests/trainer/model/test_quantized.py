"""A base model in 4 or 8 bits computes with the values of its codes, whatever lies beside a row."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune_api.outcome import Reason
from finetune_api.training import Quantization
from finetune_trainer.errors import JobError
from finetune_trainer.model.fused_lora import fuse_lora
from finetune_trainer.model.load import load_model
from finetune_trainer.model.quantized import is_quantized, left_out, quantization_notices, values_of
from finetune_trainer.train.memory import KeptBytes
from tests.architectures.zoo import build
from tests.models import random_llama

KINDS = get_args(Quantization)
STEPS = {"nf4": 0.16, "int8": 1 / 254}
"""Half the widest gap between two codes, as a share of a block's or a row's largest weight."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("model"), hidden=64)


def loaded(folder: Path, kind: Quantization | None, **more: Any) -> Any:
    return load_model(folder, dtype=torch.float32, trust_remote_code=False, quantization=kind, **more)


def with_values(model: Any, dtype: torch.dtype) -> Any:
    """The same model with plain layers that hold what the codes stand for."""
    found = copy.deepcopy(model)
    for name, layer in list(found.named_modules()):
        if is_quantized(layer):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = values_of(model.get_submodule(name), dtype)
            if layer.bias is not None:
                plain.bias.data = layer.bias.data.to(dtype)
            path, _, leaf = name.rpartition(".")
            setattr(found.get_submodule(path), leaf, plain.requires_grad_(False))
    return found


def adapted(model: Any, dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(model, config)


def outcome(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and gradients of all that is trained."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().pow(2).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def test_nothing_is_said_where_the_library_is_imported() -> None:
    """On processors with bfloat16 it warns of a kernel that is of no use here."""
    code = "import finetune_trainer; from peft import PeftModel; import bitsandbytes"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout + found.stderr == ""


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_alone_are_quantized_each_weight_to_a_near_code(folder: Path, kind: Quantization) -> None:
    plain, model = loaded(folder, None), loaded(folder, kind)
    layers = {name for name, layer in model.named_modules() if is_quantized(layer)}
    linear = {name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    assert layers == linear - {"lm_head"}
    for name in layers:
        weight, found = plain.get_submodule(name).weight, values_of(model.get_submodule(name), torch.float32)
        assert found.shape == weight.shape
        assert (found - weight).abs().max() <= 1.05 * STEPS[kind] * weight.abs().max()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(parameter, plain.get_parameter(name))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_kept_transposed_are_quantized_too(tmp_path: Path, kind: Quantization) -> None:
    folder = build("gpt2", tmp_path / "gpt2")
    plain, model = loaded(folder, None), loaded(folder, kind)
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"):
        weight, found = plain.get_submodule(name).weight, values_of(model.get_submodule(name), torch.float32)
        assert (found - weight.T).abs().max() <= 1.05 * STEPS[kind] * weight.abs().max()


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("mamba", {"x_proj", "dt_proj", "out_proj"}), ("deepseek_v32", {"weights_proj"}), ("llama", set())],
)
def test_layers_whose_weights_a_models_code_reads_itself_stay_as_they_are(
    tmp_path: Path, kind: str, kept: set[str]
) -> None:
    model = loaded(build(kind, tmp_path / kind), "nf4")
    plain = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not is_quantized(layer)
    }
    assert plain == kept | {"lm_head"}
    told = left_out(model)
    assert {name.removeprefix(".") for name in told if name.startswith(".")} - {"lm_head"} == kept
    assert bool(told) == bool(kept)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_values(
    folder: Path, kind: Quantization, fused: bool, half: bool
) -> None:
    model = loaded(folder, kind)
    wanted, found = adapted(with_values(model, torch.bfloat16 if half else torch.float32)), adapted(model)
    ids = torch.arange(100, 140).view(2, 20)
    for each in (wanted, found) if fused else ():
        fuse_lora(each)
        assert sum("forward" in vars(module) for module in each.modules() if hasattr(module, "lora_A")) == 14
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        pairs = list(zip(outcome(found, ids), outcome(wanted, ids), strict=True))
    assert len(pairs) == 29
    for a, b in pairs:
        assert (a.float() - b.float()).norm() <= 1e-5 * b.float().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_says_the_same_whatever_lies_beside_it(folder: Path, kind: Quantization) -> None:
    model = loaded(folder, kind)
    # Activations beyond the threshold from which LLM.int8() treats a whole column of the batch in another way.
    model.get_input_embeddings().weight.data[200] *= 500
    row, loud = torch.arange(100, 120), torch.full((20,), 200)
    with torch.no_grad():
        alone = model(input_ids=row[None], use_cache=False).logits[0]
        beside = model(input_ids=torch.stack([row, loud]), use_cache=False).logits[0]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_no_weights(folder: Path, kind: Quantization) -> None:
    """As many bytes as the plain layers keep, whose weights are there anyway."""
    kept = []
    for model in (adapted(loaded(folder, None)), adapted(loaded(folder, kind))):
        fuse_lora(model)
        counter = KeptBytes(model)
        with counter.counting():
            model(input_ids=torch.arange(100, 120)[None], use_cache=False).logits.sum()
        kept.append(counter.total)
    assert kept[1] <= kept[0]


def test_what_is_quantized_already_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder, "nf4")
    model.save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(JobError, match=r"quantized already \(bitsandbytes\): remove quantization") as raised:
        loaded(tmp_path, "int8", name="the model")
    assert raised.value.reason is Reason.INVALID_SPEC
    again = loaded(tmp_path, None)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        first, second = (each(input_ids=ids, use_cache=False).logits for each in (model, again))
    torch.testing.assert_close(first, second)


def test_how_little_of_a_mixture_is_quantized_is_said(tmp_path: Path) -> None:
    notices: list[str] = []
    loaded(build("mixtral", tmp_path / "mixtral"), "nf4", name="the mixture", notices=notices)
    assert any("of the weights of the mixture; embeddings, output head and stacked experts" in told for told in notices)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(JobError, match="the model has no linear layers that bitsandbytes quantizes: remove") as raised:
        quantization_notices(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), "nf4", "the model")
    assert raised.value.reason is Reason.MODEL_UNSUPPORTED
