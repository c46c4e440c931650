"""Layers that carry a state from token to token are found and given rows, and compute what rows compute alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import TokenPair, pad
from finetune_trainer.model.packing import pack_count, packs_of
from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.model.row_layers import RowLayer, compute_rows_apart, find_row_layers, usual_layers

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def sequences(*lengths: int, shared: int = 0) -> list[TokenPair]:
    """Rows of `shared` equal tokens and some of their own, all trained."""
    generator = np.random.default_rng(0)
    prompt = generator.integers(3, VOCABULARY, shared)
    rows = [np.concatenate([prompt, generator.integers(3, VOCABULARY, length)]) for length in lengths]
    return [(ids.astype(np.int64), np.ones(len(ids), dtype=bool)) for ids in rows]


def ready(kind: str, **settings: Any) -> tuple[AdaptedModel, list[RowLayer]]:
    """A random model that takes packs, and its layers that have to be given rows; without an adapter all is trained."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    base.get_input_embeddings().requires_grad_(False)
    base.get_base_model = lambda: base
    model = AdaptedModel(base, torch.device("cpu"))
    model.take_packs()
    (pack,) = packs_of(sequences(15, 16), budget=32, share=False)
    return model, find_row_layers(base.model, pack, lambda: loss_of(model, pack))


def loss_of(model: AdaptedModel, batch: Any) -> float:
    with torch.no_grad():
        return float(model.loss(batch)[0])


def gradient_of(model: AdaptedModel, batches: list[Any]) -> torch.Tensor:
    model.peft.zero_grad()
    model.backward(batches)
    return torch.cat([parameter.grad.flatten() for parameter in model.trained if parameter.grad is not None]).clone()


HYBRIDS = [
    ("Bamba", {"attn_layer_indices": [1], **MAMBA}, ["0.mamba", "2.mamba"]),
    ("FalconH1", {"mamba_d_ssm": 64, **MAMBA}, ["0.mamba", "1.mamba", "2.mamba"]),
    ("Lfm2", {"full_attn_idxs": [1]}, ["0.conv", "2.conv"]),
    ("Qwen3Next", {"head_dim": 8, "num_experts": 0, **DELTA}, ["0.linear_attn", "1.linear_attn"]),
    ("MiniMax", {"head_dim": 8, **EXPERTS}, ["1.self_attn"]),
    ("RecurrentGemma", {"lru_width": 32, "head_dim": 8}, ["0.temporal_block", "1.temporal_block"]),
    ("Qwen3", {"head_dim": 8}, []),
    ("Mixtral", EXPERTS, []),
]


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize(("kind", "settings", "expected"), HYBRIDS)
def test_layers_with_a_state_are_found_and_exact(kind: str, settings: dict[str, Any], expected: list[str]) -> None:
    model, found = ready(kind, **settings)
    names = {module: name for name, module in model.base.model.layers.named_modules()}
    assert [names[layer.module] for layer in found] == expected
    rows = sequences(9, 30, 31, 40, 2, shared=21)
    packs = [pack for share in (True, False) for pack in packs_of(rows, budget=400, share=share)]
    model.leave_packs()
    alone = gradient_of(model, [pad([row], 0) for row in rows])
    model.take_packs()
    wrong = [torch.norm(gradient_of(model, [pack]) - alone) / torch.norm(alone) for pack in packs]
    compute_rows_apart(found)
    for pack, before in zip(packs, wrong, strict=True):
        assert torch.norm(gradient_of(model, [pack]) - alone) <= 1e-5 * torch.norm(alone)
        assert (before > 1e-4) == bool(expected)


@pytest.mark.filterwarnings("ignore")
def test_activations_that_are_computed_again_are_the_same() -> None:
    model, found = ready("Bamba", attn_layer_indices=[1], **MAMBA)
    compute_rows_apart(found)
    packs: list[Any] = packs_of(sequences(9, 30, shared=21), budget=400, share=True)
    wanted = gradient_of(model, packs)
    assert model.checkpoint_activations()
    model.peft.train()
    assert torch.norm(gradient_of(model, packs) - wanted) <= 1e-6 * torch.norm(wanted)


@pytest.mark.filterwarnings("ignore")
def test_outside_packs_and_afterwards_nothing_is_changed() -> None:
    model, found = ready("Lfm2", full_attn_idxs=[1])
    row: Any = pad(sequences(30), 0)
    model.leave_packs()
    before = loss_of(model, row)
    compute_rows_apart(found)
    assert loss_of(model, row) == before
    usual_layers(found)
    assert not any("forward" in vars(layer.module) for layer in found)


@pytest.mark.filterwarnings("ignore")
def test_rows_of_like_length_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that padding, which is computed for nothing, stays below a quarter."""
    model, found = ready("Lfm2", full_attn_idxs=[1])
    shapes: list[tuple[int, int]] = []
    original = found[0].module.forward
    monkeypatch.setattr(
        found[0].module,
        "forward",
        lambda hidden_states, **others: (
            shapes.append(tuple(hidden_states.shape[:2])),  # type: ignore[func-returns-value]  # noted first
            original(hidden_states, **others),
        )[1],
    )
    compute_rows_apart(found[:1])
    pack: Pack = packs_of(sequences(101, 100, 80, 20, 16, shared=5), budget=400, share=True)[0]
    loss_of(model, pack)
    # The last token of a row predicts nothing and is left out.
    assert shapes == [(3, 105), (2, 24)]


def test_the_bound_of_a_pack_counts_rows_whole() -> None:
    """These layers compute a common beginning for each row, and keep it for the backward pass."""
    rows = sequences(10, 10, 10, shared=90)
    assert len(packs_of(rows, budget=200, share=True)) == pack_count(rows, budget=200, share=True) == 1
    assert len(packs_of(rows, budget=200, share=True, whole=True)) == 2
    assert pack_count(rows, budget=200, share=True, whole=True) == 2
