"""Which layers get an adapter: by default, by lists and expressions, on tiny models of every structure."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune_api.lora import LoraConfig
from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.lora import adapted, add_lora
from finetune_trainer.model.reach import Reach, reached_by_text
from finetune_trainer.model.targets import Targets, candidates, resolve_targets
from tests.architectures.zoo import tiny_config, tiny_model

IDS = [5, 9, 12, 30, 44, 7, 8, 100, 101, 50, 51, 52] * 3


def frozen(kind: str) -> Any:
    return tiny_model(kind).requires_grad_(False)


def resolved(model: Any, **config: Any) -> Targets:
    return resolve_targets(model, LoraConfig(**config), reached_by_text(model, candidates(model), IDS))


def kinds_of(targets: Targets) -> set[str]:
    """Paths with N in place of every number, from the layer on."""
    return {
        re.sub(r"\.\d+(?=\.|$)", ".N", path).split(".N.", 1)[-1] for path in (*targets.modules, *targets.parameters)
    }


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
DENSE = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
SHARED = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
LATENT = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}


@pytest.mark.filterwarnings("ignore")  # each architecture has its own
@pytest.mark.parametrize(
    ("kind", "expected", "told"),
    [
        ("llama", ATTENTION | DENSE, []),
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, []),
        # Router and experts stay; so does everything that PEFT would have made of them.
        ("mixtral", ATTENTION, ["The experts are not trained"]),
        ("qwen3_moe", ATTENTION | DENSE, ["The experts are not trained"]),
        ("deepseek_v3", LATENT | DENSE | SHARED, ["The experts are not trained"]),
        ("llama4", None, ["The experts are not trained"]),
        # Towers, cross-attention and indexers that no text reaches.
        ("gemma3", ATTENTION | DENSE, ["No adapter on model.vision_tower"]),
        ("bart", None, ["encoder_attn (16 layers): no text reaches it"]),
        ("deepseek_v32", None, ["indexer", "The experts are not trained"]),
        # What PEFT refuses, and weights that are read past their layer.
        ("mamba", {"mixer.in_proj", "mixer.x_proj"}, ["dt_proj", "PEFT refuses it"]),
        # A class of its own that computes a linear layer, and one that does not.
        ("falcon", None, []),
        # Blocks that are the same weights at several depths.
        ("zamba", None, ["model.layers.N.shared_transf (14 layers): they share their weights"]),
        ("deepseek_v4", None, ["computes something else", "no text reaches it", "The experts are not trained"]),
    ],
)
def test_all_linear_takes_what_text_trains_and_says_what_it_leaves(
    kind: str, expected: set[str] | None, told: list[str]
) -> None:
    model = frozen(kind)
    targets = resolved(model)
    if expected is not None:
        assert kinds_of(targets) == expected
    assert targets.parameters == ()
    assert not any(re.search(r"lm_head|router|(?<!shared_)experts\.|\.gate$", path) for path in targets.modules)
    assert len(targets.notices) == len(told)
    assert all(part in sentence for part, sentence in zip(told, targets.notices, strict=True))
    peft_model = add_lora(model, LoraConfig(), targets).train()
    assert set(adapted(peft_model).modules) == set(targets.modules)
    peft_model(input_ids=torch.tensor([IDS]), use_cache=False).logits.square().sum().backward()
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "asked", "expected", "told"),
    [
        ("mixtral", {"experts": True}, ATTENTION | EXPERTS, "lora_dropout is 0 instead of 0.05"),
        ("deepseek_v3", {"experts": True}, LATENT | DENSE | SHARED | EXPERTS, "lora_dropout is 0"),
        # Named as their checkpoint names them.
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}, {"self_attn.q_proj"} | EXPERTS, "lora_dropout"),
        (
            "deepseek_v3",
            {"target_modules": ["gate_proj"]},
            {"mlp.gate_proj", "mlp.shared_experts.gate_proj"},
            "experts",
        ),
        ("llama", {"experts": True}, ATTENTION | DENSE, "has no effect: this model has no experts"),
        (
            "dbrx",
            {"experts": True},
            {"norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj"},
            "PEFT knows no adapter",
        ),
    ],
)
def test_experts_are_trained_where_they_are_asked_for(
    kind: str, asked: dict[str, Any], expected: set[str], told: str
) -> None:
    model = frozen(kind)
    targets = resolved(model, **asked)
    assert kinds_of(targets) == expected
    assert told in targets.notices[-1]
    assert set(adapted(add_lora(model, LoraConfig(**asked), targets)).parameters) == set(targets.parameters)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"self_attn.q_proj", "self_attn.v_proj"}),
        ({"target_modules": r".*\.1\..*\.(q|k)_proj"}, {"self_attn.q_proj", "self_attn.k_proj"}),
        ({"exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, DENSE),
        ({"target_modules": ["self_attn.q_proj"], "layers_to_transform": [1]}, {"self_attn.q_proj"}),
        (
            {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
            {"self_attn.q_proj", "model.embed_tokens", "lm_head"},
        ),
    ],
)
def test_a_list_or_an_expression_chooses_among_them(asked: dict[str, Any], expected: set[str]) -> None:
    targets = resolved(tiny_model("llama", tie_word_embeddings=False).requires_grad_(False), **asked)
    assert kinds_of(targets) == expected
    layers = {path.split(".")[2] for path in targets.modules if ".layers." in path}
    assert layers == {"1"} if "1" in str(asked) else len(layers) > 1


def test_embedding_and_head_that_share_their_weights_are_left_out_with_a_word() -> None:
    model = tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)
    targets = resolved(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert kinds_of(targets) == {"self_attn.q_proj"}
    (sentence,) = targets.notices
    assert sentence.startswith("No adapter on model.embed_tokens, lm_head (2 layers): they share their weights")


@pytest.mark.parametrize(
    ("kind", "asked", "parts"),
    [
        ("llama", {"target_modules": ["q_porj"]}, ["q_porj", "does not have: write q_proj"]),
        ("llama", {"target_modules": ["q_proj", "c_attn"]}, ["c_attn", "does not have"]),
        ("llama", {"target_modules": ["input_layernorm"]}, ["input_layernorm", "it is no linear layer"]),
        ("llama", {"target_modules": r".*\.nothing"}, ["nothing", "does not have"]),
        ("mixtral", {"target_modules": ["mlp.gate"]}, ["mlp.gate", "cannot be trained"]),
        ("mamba", {"target_modules": ["out_proj"]}, ["out_proj", "PEFT refuses it"]),
        ("bart", {"target_modules": ["encoder_attn.q_proj"]}, ["encoder_attn.q_proj", "no text reaches it"]),
        ("llama", {"exclude_modules": ".*"}, ["leaves nothing to train", "name some of down_proj"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_name_that_takes_nothing_is_refused_with_names_that_do(
    kind: str, asked: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(JobError) as refused:
        resolved(frozen(kind), **asked)
    assert refused.value.reason is Reason.INVALID_SPEC
    assert all(part in refused.value.message for part in parts), refused.value.message


def test_a_model_without_weights_is_enough_to_check_names() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    assert kinds_of(resolve_targets(model, LoraConfig(), None)) == ATTENTION
    with pytest.raises(JobError, match="write q_proj"):
        resolve_targets(model, LoraConfig(target_modules=["q_porj"]), None)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            Targets(tuple(f"layers.{i}.{name}_proj" for i in range(32) for name in "qkvo"), (), (), 0.0),
            "q,k,v,o x 32 layers: 13.6 M parameters",
        ),
        (
            Targets(("layers.0.in_proj", "layers.1.in_proj", "head"), ("layers.0.experts.down_proj",), (), 0.0),
            "in x 2 layers, head,experts.down x 1 layer: 13.6 M parameters",
        ),
        (
            Targets(("layers.0.q_proj",), (), (), 0.913),
            "q x 1 layer: 13.6 M parameters; the experts (91% of the weights) untouched",
        ),
    ],
)
def test_the_summary_is_short_and_whole(targets: Targets, expected: str) -> None:
    assert targets.summary(13_631_488) == expected


def test_in_full_layers_of_a_kind_stand_together() -> None:
    layers = [f"model.layers.{number}.mlp.{name}_proj" for number in (0, 1, 2, 7) for name in ("gate", "up")]
    assert Targets((*layers, "lm_head"), ("h.3.moe.experts.down_proj",), (), 0.0).in_full() == [
        "model.layers.[0-2, 7].mlp.gate_proj",
        "model.layers.[0-2, 7].mlp.up_proj",
        "lm_head",
        "h.[3].moe.experts.down_proj",
    ]


class _Odd(nn.Module):
    """A layer that is called and matters, one whose output goes nowhere, one never called, one read past its call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 4)
        self.used, self.idle, self.detached, self.read = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.used(self.embed(input_ids))
        index = self.detached(hidden).argmax(-1, keepdim=True)
        hidden = nn.functional.linear(hidden, self.read.weight) + index
        return type("Output", (), {"logits": hidden})()


def test_reach_is_measured_and_leaves_nothing_behind() -> None:
    model = _Odd().requires_grad_(False)
    torch.manual_seed(0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    state = torch.random.get_rng_state()
    assert reached_by_text(model, layers, IDS) == Reach(frozenset({"used"}), frozenset())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_whose_code_fails_on_a_text_is_refused() -> None:
    class Failing(_Odd):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            raise ValueError("the sequence length has to be 512")

    with pytest.raises(JobError, match=r"fails on a row of the data \(ValueError: the sequence length") as refused:
        reached_by_text(Failing(), {}, IDS)
    assert refused.value.reason is Reason.MODEL_UNSUPPORTED


def test_a_model_is_not_refused_for_a_rank_that_died() -> None:
    """The weights of a shared base come from other ranks, amid the model's own code."""

    class Sharing(_Odd):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9639.")

    with pytest.raises(RuntimeError, match="closed by peer"):
        reached_by_text(Sharing(), {}, IDS)
