"""What is said of a model before its weights are fetched, from its configuration and from building it without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import check_context_length, load_config, load_model, vocabulary_size
from finetune_trainer.model.support import build_skeleton, config_notices, missing_package, refuse_by_config

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def configuration(kind: str, **settings: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "longest"),
    [
        ("llama", {**SMALL, "max_position_embeddings": 96}, 96),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 48}, 48),
        ("opt", {**SMALL, "max_position_embeddings": 48, "word_embed_proj_dim": 16, "ffn_dim": 16}, 48),
        # Positions begin behind the padding id.
        ("roberta", {**SMALL, "intermediate_size": 16, "max_position_embeddings": 50, "is_decoder": True}, 48),
        ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 40}, 40),
        ("whisper", {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "max_target_positions": 40}, 40),
        # What bounds the vision tower bounds no text.
        ("gemma3", {"text_config": {**SMALL, "head_dim": 8, "max_position_embeddings": 300}}, 300),
        ("mamba", {**SMALL, "state_size": 4}, None),
        ("bloom", {**SMALL, "n_head": 2, "seq_length": 16}, None),
    ],
)
def test_a_context_is_bounded_by_the_positions_that_the_model_has(
    kind: str, settings: dict[str, Any], longest: int | None
) -> None:
    config = configuration(kind, **settings)
    skeleton = build_skeleton(config, kind, trust_remote_code=False)
    assert check_context_length(None, config, kind, skeleton) == longest
    assert check_context_length(longest or 1 << 20, config, kind, skeleton) == (longest or 1 << 20)
    if longest is not None:
        with pytest.raises(JobError, match=f"supports at most {longest}") as caught:
            check_context_length(longest + 1, config, kind, skeleton)
        assert caught.value.reason is Reason.CONTEXT_TOO_LONG


def test_a_skeleton_has_no_weights_in_memory() -> None:
    config = configuration("llama", vocab_size=128_256, hidden_size=8192, num_attention_heads=64)
    skeleton = build_skeleton(config, "llama", trust_remote_code=False)
    assert skeleton is not None
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert vocabulary_size(config, skeleton) == 128_256


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("musicgen", {}, "made of several language models"),
        ("musicgen_melody", {}, "made of several language models"),
        ("t5", {}, "is a t5 model, an encoder-decoder in transformers"),
        ("clip", {}, "is a clip model, no causal language model"),
        ("reformer", {}, r"is an encoder \(reformer, is_decoder is false\)"),
        ("roberta", {"architectures": ["RobertaForMaskedLM"]}, r"is an encoder \(roberta"),
        ("qwen2", {"architectures": ["Qwen2ForRewardModel"]}, "a classifier or reward model"),
        ("qwen2", {"architectures": ["Qwen2ForTokenClassification"]}, "a classifier or reward model"),
        ("qwen2", {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, None),
        ("bart", {"architectures": ["BartForConditionalGeneration"]}, None),
        ("roberta", {"is_decoder": True}, None),
        ("gpt_neox", {}, None),
        ("gemma3", {"architectures": ["Gemma3ForConditionalGeneration"]}, None),
    ],
)
def test_what_a_configuration_shows_to_be_no_causal_language_model_is_refused(
    kind: str, settings: dict[str, Any], said: str | None
) -> None:
    config = configuration(kind, **settings)
    if said is None:
        refuse_by_config(config, "team/model", trust_remote_code=False)
        return
    with pytest.raises(JobError, match=said) as caught:
        refuse_by_config(config, "team/model", trust_remote_code=False)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_half_of_an_encoder_decoder_is_trained_with_a_warning() -> None:
    (said,) = config_notices(configuration("whisper"), "team/model")
    assert said.startswith("team/model is an encoder-decoder (whisper): its decoder alone is trained")
    assert config_notices(configuration("llama"), "team/model") == []


def test_every_encoder_that_transformers_can_use_as_a_decoder_is_known_from_its_configuration() -> None:
    """Those that warn "If you want to use it as a standalone, add is_decoder=True" without it see the answer."""
    import inspect
    import sys

    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    warned, refused = set(), set()
    for kind in CONFIG_MAPPING:
        if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING or not hasattr(CONFIG_MAPPING[kind], "is_decoder"):
            continue
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
        if "as a standalone, add `is_decoder=True" in inspect.getsource(sys.modules[causal.__module__]):
            warned.add(kind)
            try:
                refuse_by_config(CONFIG_MAPPING[kind](), kind, trust_remote_code=False)
            except JobError:
                refused.add(kind)
    assert len(warned) >= 16
    assert refused == warned


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (
            "TimmWrapper requires the timm library, not found. Install it:\n`pip install timm`. Please",
            "timm",
        ),
        (
            "This file requires the following packages: einops, flash_attn. Run `pip install einops flash_attn`",
            "einops flash_attn",
        ),
        ("No module named 'mamba_ssm'", "mamba_ssm"),
        ("Loading a GPTQ quantized model requires optimum (`pip install optimum`)", "optimum"),
    ],
)
def test_a_package_that_a_model_needs_is_named(error: str, package: str) -> None:
    found = missing_package("team/model", ImportError(error))
    assert found.reason is Reason.MODEL_UNSUPPORTED
    assert f"needs the Python package {package}, which is not installed here" in found.message


def test_a_model_with_a_missing_package_is_refused_before_its_weights_are_fetched() -> None:
    """Gemma 3n's vision tower is timm's, which the trainer does not bring."""
    with pytest.raises(JobError, match="team/model needs the Python package timm, which is not installed here"):
        build_skeleton(configuration("gemma3n"), "team/model", trust_remote_code=False)


OWN_CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=64, hidden_size=16, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.body = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        return CausalLMOutput(logits=self.head(torch.tanh(self.body(self.embed(input_ids)))))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose model is made by Python code in it, by a class that knows nothing of `generate`."""
    from safetensors.torch import save_file
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_CODE)
    (folder / "config.json").write_text(
        '{"model_type": "own", "architectures": ["OwnModel"], "vocab_size": 64, "hidden_size": 16, '
        '"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}'
    )
    shapes = {"embed.weight": (64, 16), "body.weight": (16, 16), "body.bias": (16,), "head.weight": (64, 16)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def test_a_custom_class_without_generation_is_loaded_as_a_language_model(own: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(JobError, match="brings Python code of its own: set trust_remote_code: true"):
        load_config(own, trust_remote_code=False)
    model = load_model(own, dtype=torch.float32, trust_remote_code=True)
    assert model.generation_config is not None
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["body"]))
    assert adapted(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)


def test_a_custom_class_without_some_of_its_weights_is_refused(own: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = own / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "body.bias"}, file)
    with pytest.raises(JobError, match=r"lacks 1 of its 4 weights \(body\.bias\)"):
        load_model(own, dtype=torch.float32, trust_remote_code=True)
