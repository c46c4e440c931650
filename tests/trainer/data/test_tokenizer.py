"""What is found out about a model's tokenizer before a row is tokenized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_api.outcome import Reason
from finetune_trainer.data.tokenizer import ModelTokenizer, automatic_bos, load_tokenizer
from finetune_trainer.errors import JobError
from tests.models import smollm2_folder
from tests.real_tokenizers import llama_3, mistral, smollm2


@pytest.mark.parametrize(("tokenizer", "expected"), [(llama_3, "<|begin_of_text|>"), (mistral, "<s>"), (smollm2, None)])
def test_the_bos_is_the_one_the_tokenizer_adds_by_itself(
    tokenizer: Callable[[], ModelTokenizer], expected: str | None
) -> None:
    """SmolLM2 has a BOS token but does not add it."""
    assert automatic_bos(tokenizer().tokenizer) == expected


def test_a_tokenizer_that_is_published_with_truncation_and_padding_does_neither(tmp_path: Path) -> None:
    """Rows are cut at the job's context length, by us and counted."""
    for file in smollm2_folder().iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<|im_end|>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # Without a BOS, as Qwen's: nothing asks transformers for a plain text on the way.
    config.update(bos_token=None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model = load_tokenizer(tmp_path, trust_remote_code=False)
    for text in ("a b c d e f g", "a"):
        assert model.row_tokenizer().prompt_ids(text) == smollm2().ids(text)
        assert load_tokenizer(tmp_path, trust_remote_code=False).ids(text) == smollm2().ids(text)


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    """What is missing and where."""
    with pytest.raises(JobError) as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


def test_the_fingerprint_tells_tokenizers_apart_and_is_stable() -> None:
    """It is part of the key of cached rows."""
    prints = [model.fingerprint() for model in (llama_3(), mistral(), smollm2())]
    assert len(set(prints)) == 3
    assert smollm2().fingerprint() == prints[2]
    smollm2().tokenizer("a text", truncation=True, max_length=4, padding="max_length")
    assert smollm2().fingerprint() == prints[2]
    assert ModelTokenizer(smollm2().tokenizer, "<|im_start|>").fingerprint() != prints[2]
