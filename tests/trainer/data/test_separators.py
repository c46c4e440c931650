"""What is cut at special tokens, remembered and put together again has the ids of the whole text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from finetune_api.prompt_format import PromptFormat, Rendering
from finetune_trainer.data import tokenize
from finetune_trainer.data.separators import separators
from finetune_trainer.data.tokenize import FastTokenizer, RowTokenizer
from tests.api.formats import LLAMA_3, assistant, system, user
from tests.real_tokenizers import smollm2
from tests.trainer.data.test_tokenize import FRAGMENTS, PLAIN, plain_ids, rendered
from tests.trainer.data.tokenizer_variants import ALL
from tests.trainer.run.tiny_job import CHATML

CHAT = PromptFormat.model_validate(CHATML)
FIRST = "<s>a<|im_start|> b<|im_end|></s><|eot_id|>c<|start_header_id|>"
"""The text that decides where others are cut: everywhere."""

texts = st.lists(st.sampled_from([*FRAGMENTS, *FRAGMENTS[-16:]]) | st.text(max_size=3), max_size=9).map("".join)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(texts, min_size=1, max_size=5))
@example(batch=["<s>  a</s>  b <s> ", " a<unk> b", "</s>", ""])
@example(batch=["<|im_start|>  <|im_end|>", "e<|im_end|>\u0301", "<|endoftext|> ", "\n<|im_end|>\n\n<|im_start|>\n"])
def test_the_ids_are_those_of_the_whole_text(name: str, batch: list[str]) -> None:
    """Whatever the tokenizer, and in whatever company."""
    model = ALL[name]()
    tokenizer = model.row_tokenizer()
    tokenizer.tokenize([Rendering(FIRST, ())])
    for several in (batch, batch[::-1]):
        rows = tokenizer.tokenize([Rendering(text, ()) for text in several], train_all=True)
        assert [row.sequences[0].ids for row in rows] == [plain_ids(model, text) for text in several]


@dataclass
class Counting:
    """A tokenizer that notes the texts it is given."""

    backend: FastTokenizer
    seen: list[str] = field(default_factory=list)
    encode_special_tokens: bool = False

    def encode_batch(self, batch: list[str], /, *, add_special_tokens: bool) -> list[Any]:
        """As the library's."""
        self.seen += batch
        return self.backend.encode_batch(batch, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """As the library's."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def get_added_tokens_decoder(self) -> Mapping[int, Any]:
        """As the library's."""
        return self.backend.get_added_tokens_decoder()


def counting() -> tuple[RowTokenizer, Counting]:
    """SmolLM2's, and what it is asked."""
    original = smollm2().row_tokenizer()
    backend = Counting(original.backend)
    return RowTokenizer(backend, original.special), backend


def test_what_rows_share_is_tokenized_once() -> None:
    """But for the first row, which is tokenized whole to see where to cut."""
    tokenizer, backend = counting()
    policy = "Judge this. " * 50
    rows = [
        rendered(CHAT, smollm2(), [system(policy), user(f"message {number}"), assistant("safe")])
        for number in range(40)
    ]
    for begin in range(0, 40, 8):
        tokenizer.tokenize(rows[begin : begin + 8])
    assert sum(policy in text for text in backend.seen) == 2
    assert sum("safe" in text for text in backend.seen) == 2
    assert len(backend.seen) < 2 + 40 + 5


def test_what_is_remembered_does_not_grow_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where nothing is a special token, so that every prompt is tokenized by itself."""
    monkeypatch.setattr(tokenize, "_REMEMBERED_CHARACTERS", 500)
    tokenizer, _ = counting()
    sizes = []
    for number in range(60):
        talk = [user(f"question {number}"), assistant(f"answer {number}")]
        tokenizer.tokenize([rendered(made, smollm2(), talk) for made in (CHAT, PLAIN, LLAMA_3)])
        sizes.append(sum(map(len, tokenizer._known)))
    assert max(sizes) < 500 + 600


ADDED = [
    ("apart", [AddedToken("<a>", normalized=False), AddedToken("<b>", normalized=False)], ["<a>", "<b>"]),
    ("normalized", [AddedToken("<a>", normalized=True)], []),
    ("takes the space before", [AddedToken("<a>", normalized=False, lstrip=True)], []),
    ("takes the space behind", [AddedToken("<a>", normalized=False, rstrip=True)], ["<a>"]),
    ("begins with a space", [AddedToken(" <a>", normalized=False)], []),
    ("begins another", [AddedToken("<a", normalized=False), AddedToken("<a>", normalized=False)], ["<a>"]),
    ("inside another", [AddedToken("a>", normalized=False), AddedToken("<a>>", normalized=False)], ["<a>>"]),
    ("overlaps another", [AddedToken("<a", normalized=False), AddedToken("b<", normalized=False)], ["b<"]),
    ("overlaps itself", [AddedToken("aba", normalized=False)], []),
    (
        "must be a word",
        [AddedToken("<a>", normalized=False, single_word=True), AddedToken("<b>", normalized=False)],
        [],
    ),
]


@pytest.mark.parametrize(("tokens", "expected"), [case[1:] for case in ADDED], ids=[case[0] for case in ADDED])
def test_text_is_cut_only_at_tokens_that_are_found_wherever_they_stand(
    tokens: list[AddedToken], expected: list[str]
) -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.add_tokens(tokens)
    ids = range(tokenizer.get_vocab_size())
    assert sorted(separators(tokenizer, ids)) == sorted(expected)
    assert separators(tokenizer, ids[:0]) == []
    tokenizer.encode_special_tokens = True
    assert separators(tokenizer, ids) == []
