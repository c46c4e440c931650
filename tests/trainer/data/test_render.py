"""The text of a row is the text that `apply_chat_template` makes of it, in transformers' own engine and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune_api.chat_template import chat_template
from finetune_api.outcome import Reason
from finetune_api.prompt_format import HuggingFaceChatTemplate, Message, PromptFormat
from finetune_trainer.data.conversation import RowError
from finetune_trainer.data.render import FormatRenderer, TemplateRenderer, make_renderer, today
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.errors import JobError
from tests.api.formats import FORMATS, GUARD_2, LLAMA_3, assistant, conversations, plain, prompt_formats, system, user
from tests.real_tokenizers import llama_3, mistral, published_templates, smollm2
from tests.trainer.data.tokenizer_variants import REAL

OWN = HuggingFaceChatTemplate(use_hugging_face_chat_template=True)

CONVERSATIONS = [
    [user("hi"), assistant("hello")],
    [system("Be brief."), user("hi\n"), assistant(" hello "), user("'{{ x }}' {% y %}\\n"), assistant("é 🙂\n\nok")],
    [system("{instruction} {system}"), user("<|begin_of_text|>x</s>"), assistant("<|im_end|>")],
    [assistant("welcome"), user("hi"), assistant("hello")],
]


def with_template(model: ModelTokenizer, template: str) -> ModelTokenizer:
    """The tokenizer with another chat template."""
    tokenizer = copy(model.tokenizer)
    tokenizer.chat_template = template
    return ModelTokenizer(tokenizer, model.automatic_bos)


def by_transformers(model: ModelTokenizer, messages: Sequence[Message], **options: Any) -> Any:
    """What a server makes of the messages."""
    return model.tokenizer.apply_chat_template(plain(list(messages)), **options)


def check_equal(made: PromptFormat, model: ModelTokenizer, messages: list[Message]) -> None:
    """Text and tokens, of the whole and of each prompt, on both ways."""
    exported = with_template(model, chat_template(made, model.automatic_bos))
    renderer = FormatRenderer(made, model.automatic_bos)
    (rendering,) = renderer.render(messages)
    assert by_transformers(exported, messages, tokenize=False) == rendering.text
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    assert len(answers) == len(rendering.turns)
    for turn, index in enumerate(answers):
        if index == 0:
            continue  # transformers renders no empty conversation
        # A default system message stands before the first message, but not where a later one replaces it.
        prompt = by_transformers(exported, messages[:index], tokenize=False, add_generation_prompt=True)
        assert prompt == rendering.inference_prompt(turn) == renderer.prompt(messages[:index])
    tokenizer = model.row_tokenizer()
    ids = by_transformers(exported, messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids == tokenizer.prompt_ids(rendering.text)
    prompted = by_transformers(exported, messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert prompted["input_ids"] == tokenizer.prompt_ids(renderer.prompt(messages))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("made", FORMATS.values(), ids=FORMATS)
def test_transformers_renders_the_exported_template_to_the_trained_text(name: str, made: PromptFormat) -> None:
    """Every published format on every tokenizer, byte for byte and token for token."""
    for messages in CONVERSATIONS:
        check_equal(made, REAL[name](), messages)


@settings(max_examples=100)
@given(name=st.sampled_from(sorted(REAL)), made=prompt_formats(), messages=conversations())
def test_random_formats_are_rendered_alike(name: str, made: PromptFormat, messages: list[Message]) -> None:
    """Whatever is in format and messages, as long as there is a user: others are refused or have no prompt."""
    assume(any(message.role == "user" for message in messages))
    check_equal(made, REAL[name](), messages)


ONE_BOS = [
    # (tokenizer, format's bos, first message, beginning of the text)
    (llama_3, "", "hi", "<|begin_of_text|>hi"),
    (llama_3, "<|begin_of_text|>", "hi", "<|begin_of_text|>hi"),
    (llama_3, "", "<|begin_of_text|>hi", "<|begin_of_text|>hi"),
    (llama_3, "<|begin_of_text|>", "<|begin_of_text|>hi", "<|begin_of_text|><|begin_of_text|>hi"),
    (mistral, "<s>", "hi", "<s>hi"),
    (mistral, "<s> ", "hi", "<s> hi"),
    (mistral, "", "hi", "<s>hi"),
    (mistral, "", " <s>hi", "<s> <s>hi"),
    (smollm2, "", "hi", "hi"),
    (smollm2, "<|im_start|>", "hi", "<|im_start|>hi"),
]


@pytest.mark.parametrize(("tokenizer", "bos", "content", "expected"), ONE_BOS)
def test_a_bos_is_added_only_where_the_tokenizer_would_and_none_is_there(
    tokenizer: Callable[[], ModelTokenizer], bos: str, content: str, expected: str
) -> None:
    """What the format and the data write themselves stays as it is written."""
    made = GUARD_2.model_copy(update={"bos": bos})
    model = tokenizer()
    renderer = make_renderer(made, model)
    (rendering,) = renderer.render([user(content), assistant("yes")])
    assert rendering.inference_prompt() == expected == renderer.prompt([user(content)])
    exported = with_template(model, chat_template(made, model.automatic_bos))
    assert by_transformers(exported, [user(content)], tokenize=False, add_generation_prompt=True) == expected


def test_the_tokenizers_own_template_is_used_as_it_is() -> None:
    """SmolLM2's adds a default system message of its own."""
    model = smollm2()
    renderer = make_renderer(OWN, model)
    talk = [user("hi"), assistant("hello"), user("so?"), assistant("fine")]
    (rendering,) = renderer.render(talk)
    assert rendering.text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendering.text == by_transformers(model, talk, tokenize=False)
    for turn, index in enumerate((1, 3)):
        prompt = by_transformers(model, talk[:index], tokenize=False, add_generation_prompt=True)
        assert rendering.inference_prompt(turn) == prompt == renderer.prompt(talk[:index])
        answer = rendering.text[rendering.turns[turn].prompt_end : rendering.turns[turn].end]
        assert answer == f"{talk[index].content}<|im_end|>\n"
    (row,) = model.row_tokenizer().tokenize([rendering])
    assert row.sequences[0].ids == by_transformers(model, talk, tokenize=True, return_dict=True)["input_ids"]


THINKING = """\
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if message['role'] == 'assistant' and not loop.last -%}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""Removes the reasoning of earlier answers, as Qwen 3's and DeepSeek's do."""


def test_a_template_that_rewrites_history_gives_each_turn_its_own_text() -> None:
    """Each answer is trained with its reasoning, behind the prompt that the model will get, in which it is removed."""
    model = with_template(smollm2(), THINKING)
    first, second = "<think>a</think>\nhello", "<think>b</think>\nfine"
    talk = [user("hi"), assistant(first), user("so?"), assistant(second)]
    whole, apart = make_renderer(OWN, model).render(talk)
    assert whole.text == by_transformers(model, talk, tokenize=False)
    assert whole.text.count("<think>") == 1
    assert apart.text == by_transformers(model, talk[:2], tokenize=False)
    for rendering, upto, answer in ((whole, 3, second), (apart, 1, first)):
        (turn,) = rendering.turns
        assert rendering.text[turn.prompt_end : turn.end] == f"{answer}<|im_end|>\n"
        prompt = by_transformers(model, talk[:upto], tokenize=False, add_generation_prompt=True)
        assert rendering.inference_prompt() == prompt


def test_a_row_that_ends_with_the_user_is_rendered_where_there_is_something_to_train() -> None:
    """The whole text, whose answers were all rewritten, would train nothing."""
    model = with_template(smollm2(), THINKING)
    (rendering,) = make_renderer(OWN, model).render([user("hi"), assistant("<think>a</think>\nhello"), user("so?")])
    assert rendering.text.endswith("hello<|im_end|>\n")
    assert len(rendering.turns) == 1


def test_causal_lm_trains_the_whole_text_of_a_template_once() -> None:
    """Rewritten turns apart would train their prompts a second time; and no generation prompt has to fit."""
    talk = [user("hi"), assistant("<think>a</think>\nhello"), user("so?"), assistant("fine")]
    for template in (THINKING, FORCED_THINKING):
        model = with_template(smollm2(), template)
        (rendering,) = make_renderer(OWN, model, train_all=True).render(talk)
        assert rendering.text == by_transformers(model, talk, tokenize=False)
        (alone,) = make_renderer(OWN, model, train_all=True).render([user("hi"), user("so?")])
        assert alone.text.count("<|im_start|>user") == 2


FORCED_THINKING = THINKING.replace("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif")


def test_a_template_whose_prompt_is_no_beginning_of_its_answer_refuses_the_row() -> None:
    """The model would be prompted with what it never saw."""
    renderer = make_renderer(OWN, with_template(smollm2(), FORCED_THINKING))
    with pytest.raises(RowError, match=r"does not begin with its own generation prompt; write a prompt_format"):
        renderer.render([user("hi"), assistant("hello")])
    (rendering,) = renderer.render([user("hi"), assistant("<think>\nyes</think>\nhello")])
    assert rendering.inference_prompt().endswith("assistant\n<think>\n")


def test_what_a_template_refuses_is_a_refused_row_in_its_own_words() -> None:
    """Roles that have to alternate, say; and prompts for nothing at all."""
    strict = "{%- if messages[0]['role'] != 'user' -%}{{- raise_exception('Begin with the user!') -}}{%- endif -%}"
    renderer = make_renderer(OWN, with_template(smollm2(), strict + THINKING))
    with pytest.raises(RowError, match=r"refused by the tokenizer's chat template \(Begin with the user!\)"):
        renderer.render([system("x"), user("hi"), assistant("hello")])
    with pytest.raises(RowError, match="begins with an assistant message"):
        make_renderer(OWN, with_template(smollm2(), THINKING)).render([assistant("hello"), user("hi")])


def test_a_template_is_not_given_a_bos_it_does_not_write() -> None:
    """Servers tokenize what the template writes and nothing more, so a model trained with one would miss it."""
    without = with_template(mistral(), THINKING)
    (rendering,) = make_renderer(OWN, without).render([user("hi"), assistant("hello")])
    assert rendering.text.startswith("<|im_start|>user")
    (row,) = without.row_tokenizer().tokenize([rendering])
    talk = [user("hi")]
    prompt = by_transformers(without, talk, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    assert row.sequences[0].ids[: row.sequences[0].prompt_length] == prompt
    writes_it = with_template(mistral(), "{{- bos_token -}}" + THINKING)
    (rendering,) = make_renderer(OWN, writes_it).render([user("hi"), assistant("hello")])
    assert rendering.text.startswith("<s><|im_start|>user")


def test_a_tokenizer_without_a_template_is_one_sentence() -> None:
    """What was asked for, what is missing, what to write."""
    with pytest.raises(JobError, match=r"tokenizer has none: write system, user and assistant formats") as caught:
        make_renderer(OWN, llama_3())
    assert caught.value.reason is Reason.INVALID_SPEC


def test_the_format_decides_the_renderer() -> None:
    """A declared format never looks at the tokenizer's template."""
    assert isinstance(make_renderer(LLAMA_3, smollm2()), FormatRenderer)
    assert isinstance(make_renderer(OWN, smollm2()), TemplateRenderer)


DATED = "{{- strftime_now('%d %b %Y, %H:%M') -}}{%- for m in messages -%}|{{ m.content }}{%- endfor -%}|"


def test_a_template_that_asks_for_the_date_is_told_the_runs() -> None:
    model = with_template(smollm2(), DATED)
    renderer = make_renderer(OWN, model, day=date(2024, 2, 29))
    assert renderer.prompt([user("hi")]) == "29 Feb 2024, 00:00|hi|"
    (rendering,) = renderer.render([user("hi"), assistant("hello")])
    assert rendering.text == "29 Feb 2024, 00:00|hi|hello|"


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
@pytest.mark.parametrize("before", ["", "\n   {% if true %}a{% endif %} "])
def test_the_rest_of_such_a_template_is_its_own(name: str, before: str) -> None:
    """White space at its beginning too."""
    published = published_templates()[name]
    model = with_template(published, before + published.tokenizer.chat_template)
    local = datetime.now(UTC).astimezone().date()
    shown = by_transformers(model, [user("hi")], tokenize=False, add_generation_prompt=True)
    assert make_renderer(OWN, model, day=local).prompt([user("hi")]) == shown
    assert any(f"{local:{form}}" in shown for form in ("%d %b %Y", "%Y-%m-%d"))


def test_without_a_run_it_is_told_todays() -> None:
    days = [today()]
    text = make_renderer(OWN, with_template(smollm2(), DATED)).prompt([user("hi")])
    assert text.partition(",")[0] in {f"{day:%d %b %Y}" for day in (*days, today())}


DIRECTIVES = "%A|%d.%m.%y|%-d %B|%Y-%j|%H:%M:%S %p|%I|%%|%U"


def test_every_part_of_a_date_is_written_as_python_writes_it() -> None:
    template = f"{{{{- strftime_now('{DIRECTIVES}') -}}}}{{{{ messages[0].content }}}}"
    day = date(2024, 3, 5)
    assert make_renderer(OWN, with_template(smollm2(), template), day=day).prompt([user("")]) == day.strftime(
        DIRECTIVES
    )
