"""A language model whose Python code lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=64, hidden_size=16, num_hidden_layers=2, **others):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**others)


class OwnLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.gain = nn.Parameter(torch.ones(()))
        self.decay = nn.Parameter(torch.zeros(5, config.hidden_size))

    def forward(self, x):
        return x + torch.tanh(self.mix(x.cumsum(1))) * self.gain * self.decay.mean(0)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OwnLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.register_buffer("cap", torch.tensor(30.0))
        self.post_init()

    def get_decoder(self):
        return self.model

    def get_input_embeddings(self):
        return self.model.embed

    def forward(self, input_ids, **_):
        logits = self.lm_head(self.model(input_ids).last_hidden_state) + self.bias
        return CausalLMOutput(logits=torch.tanh(logits / self.cap) * self.cap)
"""


def save_own_model(folder: Path) -> Path:
    """Save it in `folder`, with random weights, parameters without dimensions and some outside all parts."""
    folder.mkdir(parents=True)
    (folder / "own.py").write_text(_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed.weight": (64, 16),
        "lm_head.weight": (64, 16),
        "bias": (64,),
        "cap": (),
    }
    for layer in (f"model.layers.{number}." for number in range(2)):
        shapes |= {f"{layer}mix.weight": (16, 16), f"{layer}mix.bias": (16,)}
        shapes |= {f"{layer}gain": (), f"{layer}decay": (5, 16)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
