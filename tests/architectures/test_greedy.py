"""Golden answers can be made with every model type, and a cache changes none of their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune_trainer.model.greedy import Greedy
from tests.architectures.test_zoo import UNMADE
from tests.architectures.zoo import INCOMPLETE, MODEL_TYPES, NOT_CAUSAL, tiny_model

PROMPT = [5, 9, 13, 7, 21, 11, 17]
TOKENS = 4
WITHOUT_CACHE = {"blt", "prophetnet", "whisper"}
"""Types that transformers does not let generate from a prompt, or whose code takes no cache; a plain pass answers."""


def _plain(model: Any) -> list[int]:
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(TOKENS):
            tokens = torch.tensor([ids])
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - UNMADE.keys() - set(INCOMPLETE) - set(NOT_CAUSAL)))
def test_greedy_answers_are_those_of_plain_passes(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(model_type).eval()
    refused = []
    if hasattr(model, "generate"):
        original = model.generate

        def generate(**settings: Any) -> Any:
            try:
                return original(**settings)
            except Exception as error:
                refused.append(error)
                raise

        monkeypatch.setattr(model, "generate", generate)
    found = Greedy(model, stop_ids=[], ended=lambda ids: False).answer(PROMPT, TOKENS)
    assert found.ids == _plain(model)
    assert bool(refused) == (model_type in WITHOUT_CACHE)
