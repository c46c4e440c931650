"""The short way for byte-level BPE: what it says is what tokenizing the whole text with offsets says, or nothing."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from finetune_api.prompt_format import Message, PromptFormat
from finetune_trainer.data import byte_level
from finetune_trainer.data.byte_exact import byte_exact, separators
from finetune_trainer.data.byte_level import ByteLevelTokenizer
from tests.api.formats import LLAMA_3, assistant, system, user
from tests.real_tokenizers import llama_3, smollm2
from tests.trainer.data.test_tokenize import BARE, PLAIN, conversations, formats, plain_ids, rendered
from tests.trainer.data.tokenizer_variants import ALL
from tests.trainer.run.tiny_job import CHATML

SUPPORTED = ["llama 3", "smollm2", "normalizes", "swallows space"]

CHAT = PromptFormat.model_validate(CHATML)


def test_tokenizers_whose_ids_do_not_tell_go_the_long_way() -> None:
    """Those that add a space, lack characters or leave white space out of the offsets."""
    assert [name for name, model in ALL.items() if byte_exact(model().row_tokenizer().backend)] == SUPPORTED


@pytest.mark.parametrize("name", SUPPORTED)
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(made=formats, talks=st.lists(conversations(), min_size=1, max_size=4))
@example(made=LLAMA_3, talks=[[user("hi"), assistant("\nhello")], [user("hi"), assistant("hello")]])
@example(made=BARE, talks=[[user("e"), assistant("\u0301 is an accent"), user("?"), assistant("!")]])
@example(made=BARE, talks=[[assistant("first"), user("second")], [user("<|im_end|>"), assistant("<|im_end|>")]])
@example(made=CHAT, talks=[[system("x"), user("\x00é\ufffd<|im_start|> a"), assistant(" \x00"), user("?")]] * 2)
@example(made=CHAT, talks=[[user("<|im_start|>  <|im_end|>"), assistant("<|endoftext|> ")]])
@example(made=PLAIN, talks=[[user("a <|im_start|> b"), assistant(" c"), user("d"), assistant("日本")]])
def test_the_short_way_finds_what_the_long_way_finds(name: str, made: PromptFormat, talks: list[list[Message]]) -> None:
    """Cut, remembered and joined in whatever company: the ids are the whole text's, the stretches those by offsets."""
    model = ALL[name]()
    renderings = [rendered(made, model, talk) for talk in talks]
    short = ByteLevelTokenizer(model.row_tokenizer().backend)
    for batch in (renderings, renderings[::-1]):
        encoded = short.encode(batch)
        expected = model.row_tokenizer().tokenize(batch)
        for ids, spans, row, rendering in zip(encoded.ids, encoded.spans(batch), expected, batch, strict=True):
            assert memoryview(ids).cast("I").tolist() == plain_ids(model, rendering.text)
            if spans is not None and rendering.turns:
                assert not row.retokenized
                assert [(sequence.ids, sequence.spans) for sequence in row.sequences] == [
                    (memoryview(ids).cast("I").tolist(), spans)
                ]


@pytest.mark.parametrize(("model", "made"), [(smollm2, CHAT), (llama_3, LLAMA_3), (smollm2, PLAIN)])
def test_ordinary_rows_need_no_long_way(model: object, made: PromptFormat) -> None:
    talk = [system("Be brief, naïve 日本."), user("What is it?"), assistant("A test."), user("So?"), assistant("Yes.")]
    tokenizer = model()  # type: ignore[operator]  # parametrized with functions
    batch = [rendered(made, tokenizer, talk), rendered(made, tokenizer, talk[1:3])]
    assert None not in ByteLevelTokenizer(tokenizer.row_tokenizer().backend).encode(batch).spans(batch)


def test_what_is_remembered_does_not_grow_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "_REMEMBERED_CHARACTERS", 200)
    monkeypatch.setattr(byte_level, "_REMEMBERED_TAILS", 5)
    short = ByteLevelTokenizer(smollm2().row_tokenizer().backend)
    sizes = []
    for number in range(40):
        talk = [user(f"question {number}"), assistant(f"answer {number}")]
        batch = [rendered(made, smollm2(), talk) for made in (CHAT, PLAIN)]
        short.encode(batch).spans(batch)
        sizes.append((len(short._recent), len(short._older), len(short._tails)))
    assert max(map(sum, sizes[20:])) <= max(map(sum, sizes[:20])) < 60


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
    assert sorted(separators(tokenizer)) == sorted(expected)
