"""What a step computed, in tokens and in floating-point operations.

A frozen linear layer of N parameters takes 2N operations a token forwards, and 2N backwards for the gradient of its
input; the gradient of its weights, which full training needs besides, is nobody's. Hence 4N, where full training counts
6N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.model.batch import Batch
from finetune_trainer.model.prefix_tree import PrefixedPacks
from finetune_trainer.train.steps import StepBatches

FORMULA = (
    "MFU = 4 x (N x computed tokens + H x predicted positions) / (seconds x peak). N is the parameters of the frozen "
    "layers that every token passes through, the embedding left out; H those of the output head, which runs only where "
    "something is predicted. 4 is 2 operations a parameter forwards and 2 backwards, for activations only: frozen "
    "weights have no gradient. Left out: attention's own products, the LoRA layers, and the second forward pass of "
    "activations that are checkpointed. The effective rate puts every row's own tokens in place of the computed ones, "
    "and may exceed 100 %: it is what the GPU would have to do if rows shared nothing."
)


@dataclass(frozen=True)
class Parameters:
    """Of the frozen layers, by how often they run."""

    body: int
    """N: once a token."""
    head: int
    """H: once a predicted position."""


@dataclass(frozen=True)
class Work:
    """What one optimizer step takes."""

    batches: int
    real_tokens: int
    """Every row's own."""
    trained_tokens: int
    computed_tokens: int
    """Tokens that go through the model, padding included."""
    predicted_positions: int
    """Positions at which the output head runs."""
    largest_batch: int
    """Tokens of the largest batch, padding included."""


def parameters_of(model: Any) -> Parameters | None:
    """Parameters of a PeftModel's frozen layers; None for mixtures of experts, of which a token passes only some."""
    base = model.get_base_model()
    config = base.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    head = base.get_output_embeddings().weight
    body = sum(
        parameter.numel()
        for module in base.modules()
        if not isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
        # Vectors are those of norms and biases; LoRA's matrices learn.
        if parameter.ndim == 2 and not parameter.requires_grad and parameter is not head
    )
    return Parameters(body, head.numel())


def work_of(item: StepBatches) -> Work:
    """What the step computes."""
    sizes, predicted = [], 0
    for batch in item.batches:
        if isinstance(batch, Batch):
            sizes.append(batch.input_ids.numel())
            predicted += len(batch.input_ids) * len(batch.positions)
            continue
        for pack in batch.parts if isinstance(batch, PrefixedPacks) else (batch,):
            sizes.append(pack.tokens)
            predicted += len(pack.sources)
    return Work(len(sizes), item.tokens, item.trained_tokens, sum(sizes), predicted, max(sizes))


def computed_flops(parameters: Parameters, work: Work) -> float:
    """Operations that the step asks for."""
    return 4.0 * (parameters.body * work.computed_tokens + parameters.head * work.predicted_positions)


def effective_flops(parameters: Parameters, work: Work) -> float:
    """Operations that its rows would ask for one at a time, without padding."""
    return 4.0 * (parameters.body * work.real_tokens + parameters.head * work.trained_tokens)
