"""The zoo has every layer kind that a family's own code has, and models that are what they are taken for."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from tests.architectures.zoo import MODEL_TYPES, NOT_CAUSAL, build, tiny_config, tiny_model

_NOT_REACHED_BY_TEXT = re.compile(
    r"Vision|Audio|Image|Patch|VQVAE|MultiModal|Multimodal|Projector|Unfold|AspectRatio|Precomputed|"
    # Heads for other tasks, encoders, and what only a model beside an encoder has.
    r"Pooler|Classification|LMHead|PreTraining|Encoder|NextSentence|NSP|Squad|SQuAD|QuestionAnswering|SequenceSummary|"
    r"Discriminator|CrossAttention|FlashAttention2"
)

_NEVER_MADE = {
    "BigBirdSelfAttention": "the sparse kind turns into it for short rows",
    "BigBirdPegasusBlockSparseAttention": "of its encoder",
    "BigBirdPegasusSelfAttention": "of its encoder",
    "Cohere2MoeRMSNorm": "instead of the published norm",
    "CpmAntIntermediate": "used nowhere",
    "CpmAntOutput": "used nowhere",
    "DogeCDMoE": "not causal",
    "FlexOlmoMLP": "used nowhere",
    "Gemma4ClippableLinear": "of its towers",
    "MoshiFlexibleLinear": "of the depth decoder, which makes sound",
    "MvpPrompt": "off in published models",
    "OlmoeMLP": "used nowhere",
    "PositionEmbeddings": "instead of Reformer's published ones",
    "RemBertPredictionHeadTransform": "used nowhere",
    "TrOCRSinusoidalPositionalEmbedding": "instead of the published ones",
}

UNMADE = {
    "gemma3n": "ImportError",
    "gemma4_assistant": "ValueError",
    "gemma4_unified_assistant": "ValueError",
    "musicgen": "AttributeError",
    "musicgen_melody": "AttributeError",
}
"""What transformers raises for types that it cannot make."""


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_layer_kind_of_its_family_is_in_the_model(model_type: str) -> None:
    if model_type in UNMADE:
        with pytest.raises(Exception, match=r"\S") as raised:
            tiny_model(model_type)
        assert raised.typename == UNMADE[model_type]
        return
    model = tiny_model(model_type)
    code = sys.modules[type(model).__module__]
    made = {type(module) for module in model.modules()}
    kinds = [
        kind
        for name, kind in vars(code).items()
        if inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and kind.__module__ == code.__name__
    ]
    missing = [
        kind.__name__
        for kind in kinds
        if not issubclass(kind, PreTrainedModel) and not any(issubclass(one, kind) for one in made)
    ]
    unexplained = [name for name in missing if name not in _NEVER_MADE and not _NOT_REACHED_BY_TEXT.search(name)]
    assert unexplained == []
    assert sum(parameter.numel() for parameter in model.parameters()) < 15_000_000


@pytest.mark.parametrize("model_type", NOT_CAUSAL)
def test_a_model_that_is_not_causal_lets_its_last_token_change_earlier_ones(model_type: str) -> None:
    model = tiny_model(model_type, **NOT_CAUSAL[model_type])
    ids = torch.arange(4, 44)[None] * 7 % 390
    changed = ids.clone()
    changed[0, -1] = 5
    with torch.no_grad():
        one, other = (model(input_ids=part, use_cache=False).logits[0, :-1] for part in (ids, changed))
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


def test_a_saved_model_has_a_tokenizer_whose_ids_fit(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Größer?"}], tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    config = AutoConfig.from_pretrained(folder)
    assert len(tokenizer) <= config.vocab_size
    special = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
    assert special == (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_settings_can_be_changed() -> None:
    text = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert tiny_config("gemma3", text_config=text).text_config.num_hidden_layers == 2
    assert tiny_config("llama", hidden_size=32).hidden_size == 32
