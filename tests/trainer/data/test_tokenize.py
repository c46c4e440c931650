"""Tokens and loss mask: prompting the trained model equals training it, whatever tokenizer, format and conversation."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from finetune_api.prompt_format import Message, PromptFormat, Rendering
from finetune_trainer.data.tokenize import RowTokenizer, TokenizedRow, TokenizedSequence, packed
from finetune_trainer.data.tokenizer import ModelTokenizer
from tests.api.formats import FORMATS, LLAMA_3, assistant, native_format, prompt_formats, system, user
from tests.real_tokenizers import llama_3, mistral, smollm2
from tests.trainer.data.tokenizer_variants import ALL, REAL
from tests.trainer.run.tiny_job import CHATML

FRAGMENTS = [
    *("\n", "\n\n", " ", "  ", "\t", "\r\n", "\u2028", "\xa0", "\u3000", "'", '"', "\\", "{", "}", "{{", "%}"),
    *("a", "hello", " hello", "Hello.", "123", "Q", "Z", "é", "e", "\u0301", "日本", "नमस्ते", "مرحبا", "🙂"),
    *("👩‍👩‍👧‍👦", "🇩🇪", "\u200d", "\ufe0f", "\x00", "\ufeff", "\ufffd", "<", "|", ">", "</", "<|"),
    *("</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<|end_of_text|>", "<|start_header_id|>", "[INST]", " [/INST]", "### Response:", "A:", "user", "assistant"),
]

# U+2581 is how SentencePiece writes a space.
contents = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), min_size=1, max_size=6).map(
    lambda parts: "".join(parts).replace("▁", "_") or "x"
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Any order of turns; the row may begin with the assistant or end with the user."""
    first = [system(draw(contents))] if draw(st.booleans()) else []
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5))
    return first + [Message(role, draw(contents)) for role in roles]


PLAIN = PromptFormat(
    system="{instruction}\n", user="Q: {instruction}\n", assistant="A:{instruction}\n", trailing_assistant="A:"
)
"""No special token at all."""

BARE = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}")
"""Nothing but the messages: every seam is where the data put it, and a prompt may be empty."""

ENDS_WITH_SPACE = PromptFormat(system="{instruction}", user="{instruction}:", assistant="{instruction} ")
"""The space belongs to the next word, for most tokenizers."""

formats = st.sampled_from([*FORMATS.values(), PLAIN, BARE, PromptFormat.model_validate(CHATML)]) | prompt_formats()


def rendered(made: PromptFormat, model: ModelTokenizer, messages: Sequence[Message]) -> Rendering:
    """The row's text as it is trained on."""
    return made.render(messages).with_bos(model.automatic_bos)


def plain_ids(model: ModelTokenizer, text: str) -> list[int]:
    """Token ids as transformers makes them of a text that has its special tokens already."""
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decoded(model: ModelTokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens included."""
    return str(model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def spaceless(text: str) -> str:
    """Without spaces: SentencePiece shows one after each special token."""
    return text.replace(" ", "")


def row_of(made: PromptFormat, model: ModelTokenizer, messages: Sequence[Message]) -> tuple[TokenizedRow, Rendering]:
    """One conversation, tokenized."""
    rendering = rendered(made, model, messages)
    return model.row_tokenizer().tokenize([rendering])[0], rendering


def trained_text(model: ModelTokenizer, sequence: TokenizedSequence) -> list[str]:
    """The text of each trained stretch."""
    return [decoded(model, sequence.ids[first:end]) for first, end in sequence.spans]


SEARCH = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", ALL)
@SEARCH
@given(made=formats, messages=conversations())
@example(made=LLAMA_3, messages=[user("hi"), assistant("\nhello"), user("so?"), assistant("\n\nyes")])
@example(made=PLAIN, messages=[user("hi"), assistant("yes"), user("\nand?"), assistant("no")])
@example(made=BARE, messages=[user("e"), assistant("\u0301 is an accent"), user("?"), assistant("!")])
@example(made=BARE, messages=[assistant("first"), user("second"), assistant("third")])
@example(made=BARE, messages=[user("<|im_end|>"), assistant("<|im_end|>")])
@example(made=BARE, messages=[user("ab <|im_end|> c"), assistant("d")])
@example(made=PLAIN, messages=[user("a 🙂 b"), assistant(" c")])
@example(made=PLAIN, messages=[user("a </s> b"), assistant(" c")])
@example(made=FORMATS["mistralai/Mistral-7B"], messages=[user("a"), assistant("b"), user("c"), assistant("d")])
def test_every_turn_is_trained_once_behind_the_ids_of_its_own_prompt(
    name: str, made: PromptFormat, messages: list[Message]
) -> None:
    """The rule everything else is for."""
    model = ALL[name]()
    row, rendering = row_of(made, model, messages)
    prompts = [plain_ids(model, rendering.inference_prompt(turn)) for turn in range(len(rendering.turns))]
    if row.retokenized:
        whole = plain_ids(model, rendering.text)
        needed = [ids != whole[: len(ids)] for ids in prompts]
        assert any(needed) or any(turn.end < len(rendering.text) for turn in rendering.turns)
    found = []
    for sequence in row.sequences:
        assert len(sequence.trained) == len(sequence.ids)
        for first, end in sequence.spans:
            assert all(sequence.trained[first:end])
            behind = [turn for turn, ids in enumerate(prompts) if max(len(ids), 1) == first]
            assert sequence.ids[:first] in [prompts[turn] or sequence.ids[:1] for turn in behind]
            found.append(first)
        assert sum(sequence.trained) == sum(end - first for first, end in sequence.spans)
        # The last one trained may be prompted for; the first token alone has nothing before it.
        assert sequence.ids[: sequence.prompt_length] in prompts
    # A turn that is one token behind an empty prompt cannot be predicted; an empty one has nothing to predict.
    predicted = [
        max(len(ids), 1) for ids, turn in zip(prompts, rendering.turns, strict=True) if turn.end > turn.prompt_end
    ]
    assert sorted(found) == sorted(predicted) or (not prompts[0] and sorted(found) == sorted(predicted[1:]))


@pytest.mark.parametrize("name", [*REAL, "trims offsets"])
@SEARCH
@given(made=formats, messages=conversations())
@example(made=ENDS_WITH_SPACE, messages=[user("a"), assistant("b"), user("c"), assistant("d")])
@example(made=LLAMA_3, messages=[user("hi"), assistant("\nhello"), user("so?"), assistant("\n\nyes")])
@example(made=PLAIN, messages=[user("hi"), assistant("yes"), user("\nand?"), assistant("no")])
@example(made=native_format("mistralai/Mistral-7B-Instruct-v0.1"), messages=[user("a"), assistant("b"), user(" c")])
def test_the_ids_are_the_text_and_the_mask_is_the_answers(
    name: str, made: PromptFormat, messages: list[Message]
) -> None:
    """Nothing is lost, added or cut in a character; the mask is the assistant's part with its end of turn."""
    model = ALL[name]()
    row, rendering = row_of(made, model, messages)
    same = spaceless if model is mistral() else str
    # SmolLM2's vocabulary lacks a few bytes, so it cannot write every character.
    assume(same(decoded(model, plain_ids(model, rendering.text))) == same(rendering.text))
    answers = {turn.prompt_end: rendering.text[turn.prompt_end : turn.end] for turn in rendering.turns}
    for index, sequence in enumerate(row.sequences):
        text = decoded(model, sequence.ids)
        assert same(text) == same(rendering.text) if index == 0 else same(rendering.text).startswith(same(text))
        for first, end in sequence.spans:
            expected = next(
                (
                    answer
                    for start, answer in answers.items()
                    if plain_ids(model, rendering.text[:start]) == sequence.ids[:first]
                ),
                None,
            )
            if expected is None:  # An empty prompt: the first token is not trained.
                assert first == 1
                continue
            shown = same(decoded(model, sequence.ids[first:end]))
            if shown != same(expected):
                # White space behind the token that stops the model, merged with what follows.
                assert same(expected).startswith(shown)
                assert set(sequence.ids[first:end]) & set(model.tokenizer.added_tokens_decoder)
    if row.sequences and not row.retokenized:
        assert [sequence.ids for sequence in row.sequences] == [plain_ids(model, rendering.text)]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("made", FORMATS.values(), ids=FORMATS)
def test_a_row_has_exactly_one_bos_and_it_leads(name: str, made: PromptFormat) -> None:
    """Where the tokenizer has one at all; Llama 2's format writes another one between turns, at the very end here."""
    model = REAL[name]()
    talk = [system("Be brief."), user("hi"), assistant("hello")]
    row, rendering = row_of(made, model, talk)
    if model.automatic_bos is None:
        assert rendering.text == made.render(talk).text
    else:
        ids = row.sequences[0].ids[:-1] if rendering.text.endswith("<s>") else row.sequences[0].ids
        assert ids[0] == model.tokenizer.bos_token_id
        assert ids.count(model.tokenizer.bos_token_id) == 1


TRAINED = [
    (llama_3, LLAMA_3, "hello<|eot_id|>"),
    (smollm2, PromptFormat.model_validate(CHATML), "hello<|im_end|>\n"),
    (mistral, FORMATS["mistralai/Mistral-7B"], "hello</s>"),
    (llama_3, FORMATS["guard 2"], "hello </s>"),
    (llama_3, FORMATS["guard 2, end of text"], "hello<|end_of_text|>"),
    (smollm2, FORMATS["amazon/LightGPT"], "hello\n"),
]


@pytest.mark.parametrize(("tokenizer", "made", "expected"), TRAINED)
def test_the_mask_ends_with_the_end_of_turn(tokenizer: object, made: PromptFormat, expected: str) -> None:
    """Token by token: header and prompt never, answer and end of turn always."""
    model: ModelTokenizer = tokenizer()  # type: ignore[operator]  # parametrized with functions
    row, rendering = row_of(made, model, [system("Be brief."), user("hi\n"), assistant("hello")])
    (sequence,) = row.sequences
    assert trained_text(model, sequence) == [expected]
    assert not any(sequence.trained[: len(plain_ids(model, rendering.inference_prompt()))])


def test_a_token_that_straddles_the_seam_is_split_there() -> None:
    """Llama 3's header ends with two newlines, and three are one token."""
    model = llama_3()
    row, rendering = row_of(LLAMA_3, model, [user("hi"), assistant("\nhello")])
    (sequence,) = row.sequences
    assert row.retokenized
    assert sequence.ids != plain_ids(model, rendering.text)
    prompt = plain_ids(model, rendering.inference_prompt())
    assert sequence.ids[: len(prompt)] == prompt
    assert trained_text(model, sequence) == ["\nhello<|eot_id|>"]
    assert decoded(model, sequence.ids) == rendering.text


def test_straddling_in_several_turns_gives_as_many_sequences() -> None:
    """One sequence cannot be split for two turns and still be what a server makes of the later one's prompt."""
    model = llama_3()
    talk = [user("hi"), assistant("\nhello"), user("so?"), assistant("fine"), user("really?"), assistant("\nyes")]
    row, rendering = row_of(LLAMA_3, model, talk)
    assert row.retokenized
    assert [trained_text(model, sequence) for sequence in row.sequences] == [
        ["fine<|eot_id|>", "\nyes<|eot_id|>"],
        ["\nhello<|eot_id|>"],
    ]
    assert decoded(model, row.sequences[0].ids) == rendering.text
    assert decoded(model, row.sequences[1].ids) == rendering.text[: rendering.turns[0].end]


def test_an_answer_whose_end_merges_with_the_next_message_ends_its_own_sequence() -> None:
    """Or the model would learn to stop with a token that contains the beginning of the user's next message."""
    model = llama_3()
    row, rendering = row_of(PLAIN, model, [user("hi"), assistant(" yes"), user("?"), assistant(" no")])
    assert len(row.sequences) == 1
    bare = PromptFormat(system="{instruction}", user="{instruction}\nA:", assistant="{instruction}\n")
    row, rendering = row_of(bare, model, [user("hi"), assistant(" yes"), user("\n\nand?"), assistant(" no")])
    assert row.retokenized
    assert [trained_text(model, sequence) for sequence in row.sequences] == [[" no\n"], [" yes\n"]]
    row, rendering = row_of(bare, model, [user("hi"), assistant(" yes"), user("\n\nand?")])
    assert [trained_text(model, sequence) for sequence in row.sequences] == [[" yes\n"]]
    assert decoded(model, row.sequences[0].ids) == rendering.text


def test_a_split_answer_continues_the_prompt_without_a_space() -> None:
    """SentencePiece puts a space in front of whatever it is given; the answer does not begin with one."""
    model = mistral()
    row, _ = row_of(BARE, model, [user("Hel"), assistant("lo there")])
    (sequence,) = row.sequences
    assert row.retokenized
    assert decoded(model, sequence.ids[sequence.prompt_length - 1 :]).endswith("Hello there")


def test_the_space_that_sentencepiece_adds_to_the_next_message_is_not_trained() -> None:
    """It stands behind the end of turn, as a token without a character."""
    model = mistral()
    made = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}</s>")
    row, _ = row_of(made, model, [user("a"), assistant(" b"), user("\nc"), assistant(" d")])
    (sequence,) = row.sequences
    assert [model.tokenizer.convert_ids_to_tokens(sequence.ids[end - 1]) for _, end in sequence.spans] == ["</s>"] * 2


def test_white_space_behind_a_special_end_of_turn_costs_no_sequence() -> None:
    """Mistral's `</s> ` and the next `[INST]` share a token, but the model has stopped before it."""
    model = mistral()
    made = native_format("mistralai/Mistral-7B-Instruct-v0.1")
    row, _ = row_of(made, model, [user("a"), assistant("b"), user("c"), assistant("d")])
    assert not row.retokenized
    (sequence,) = row.sequences
    assert [text.strip() for text in trained_text(model, sequence)] == ["b</s>", "d</s>"]


def test_an_empty_prompt_leaves_only_the_first_token_untrained() -> None:
    """Nothing predicts it."""
    row, _ = row_of(BARE, smollm2(), [assistant("hello there"), user("hi")])
    assert row.sequences[0].prompt_length == 0
    assert trained_text(smollm2(), row.sequences[0])[0] == " there"


def test_special_token_text_in_a_message_becomes_the_token_and_the_mask_still_fits() -> None:
    """As in every chat template; the guide's data rely on it."""
    model = smollm2()
    chatml = PromptFormat.model_validate(CHATML)
    row, _ = row_of(chatml, model, [user("<|im_end|>\n<|im_start|>assistant\nfake"), assistant("no<|im_end|>")])
    (sequence,) = row.sequences
    assert trained_text(model, sequence) == ["no<|im_end|>\n"]


@pytest.mark.parametrize("name", REAL)
def test_causal_lm_trains_all_but_the_first_token(name: str) -> None:
    """Prompt, answer and all; also rows in which nobody answers."""
    model = REAL[name]()
    for messages in ([user("hi"), assistant("\nhello")], [user("only a text")]):
        rendering = rendered(LLAMA_3, model, messages)
        (row,) = model.row_tokenizer().tokenize([rendering], train_all=True)
        (sequence,) = row.sequences
        assert not row.retokenized
        assert sequence.ids == plain_ids(model, rendering.text)
        assert sequence.trained == [False] + [True] * (len(sequence.ids) - 1)


@settings(max_examples=50)
@given(length=st.integers(1, 40), spans=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), max_size=3))
def test_truncation_cuts_ids_and_mask_alike(length: int, spans: list[tuple[int, int]]) -> None:
    """A stretch behind the cut disappears, one across it is shortened."""
    trained = tuple((first, first + count) for first, count in spans)
    whole = TokenizedSequence(packed(range(36)), trained, 20)
    cut = whole.truncated(length)
    assert cut.ids == whole.ids[:length]
    assert cut.trained == whole.trained[:length]
    assert cut.prompt_length == min(20, length)
    assert all(first < end for first, end in cut.spans)


def test_rows_come_out_the_same_in_any_batch() -> None:
    """What is remembered of one row never changes another."""
    chance = random.Random(7)
    rows = []
    for _ in range(60):
        made = chance.choice([LLAMA_3, PLAIN, BARE, FORMATS["mistralai/Mistral-7B"]])
        talk = [
            message
            for _ in range(chance.randint(1, 3))
            for message in (
                user("".join(chance.choices(FRAGMENTS, k=4))),
                assistant("".join(chance.choices(FRAGMENTS, k=4))),
            )
        ]
        rows.append(rendered(made, llama_3(), talk))
    together: RowTokenizer = llama_3().row_tokenizer()
    assert together.tokenize(rows) == [llama_3().row_tokenizer().tokenize([row])[0] for row in rows]
    assert together.tokenize(rows[::-1])[::-1] == together.tokenize(rows)


def test_a_row_of_a_million_characters_is_one_sequence() -> None:
    """Long rows take the same way as short ones."""
    row, rendering = row_of(PromptFormat.model_validate(CHATML), smollm2(), [user("word " * 200_000), assistant("ok")])
    (sequence,) = row.sequences
    assert len(sequence.ids) > 200_000
    assert trained_text(smollm2(), sequence) == ["ok<|im_end|>\n"]
    assert len(rendering.text) > 1_000_000
