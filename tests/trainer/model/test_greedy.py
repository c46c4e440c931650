"""Greedy answers are those of plain passes, whatever a cache proposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_trainer.model.greedy import Greedy

PROMPT = [1, 5, 9]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def plain(model: Any, tokens: int) -> list[int]:
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def greedy(model: Any, stops: list[int] | None = None, **more: Any) -> Greedy:
    return Greedy(model, stop_ids=stops or [], ended=lambda ids: False, **more)


def test_the_cache_proposes_and_the_plain_pass_agrees(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = Greedy._logits

    def counted(self: Greedy, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        passes.append(1)
        return original(self, prompt, ids)

    monkeypatch.setattr(Greedy, "_logits", counted)
    found = greedy(model).answer(PROMPT, 12)
    assert found.ids == plain(model, 12)
    assert len(passes) == 1
    assert len(found.logprobs) == len(found.margins) == 12
    assert found.scale > 0


@pytest.mark.parametrize("fault", ["refuses", "wrong"])
def test_a_cache_that_does_not_work_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    asked = []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.append(1)
        if fault == "refuses":
            raise ValueError("this model has no cache")
        return torch.cat([input_ids, torch.full((1, 4), 63)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert greedy(model).answer(PROMPT, 12).ids == plain(model, 12)
    assert len(asked) == (1 if fault == "refuses" else 3), "it is not asked for ever"


def test_an_answer_ends_with_its_stop(model: Any) -> None:
    expected = plain(model, 12)
    stop = expected[4]
    assert greedy(model, [stop]).answer(PROMPT, 12).ids == expected[: expected.index(stop) + 1]
    ended: Callable[[list[int]], bool] = lambda ids: len(ids) == 3  # noqa: E731
    assert Greedy(model, stop_ids=[], ended=ended).answer(PROMPT, 12).ids == expected[:3]


def test_the_models_own_defaults_have_no_part(model: Any) -> None:
    expected = plain(model, 12)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 2
    assert greedy(model).answer(PROMPT, 12).ids == expected
    assert model.generation_config.repetition_penalty == 5.0
    model.generation_config.repetition_penalty = model.generation_config.max_new_tokens = None


def test_time_is_bounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "generate", lambda **_: (_ for _ in ()).throw(ValueError("no cache")))
    ticks = iter(range(1000))
    found = greedy(model, deadline=5, clock=lambda: float(next(ticks))).answer(PROMPT, 64)
    assert found.ids == plain(model, len(found.ids))
    assert len(found.ids) < 10
