"""A chat template is a foreign program: it renders, or it is refused in a sentence; it runs nothing and always ends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.outcome import Reason
from finetune_api.prompt_format import Message
from finetune_trainer.data import template_trial
from finetune_trainer.data.conversation import RowError
from finetune_trainer.data.render import TemplateRenderer
from finetune_trainer.data.template_trial import refuse_endless
from finetune_trainer.errors import JobError
from tests.hostile.samples import is_sentence, some
from tests.real_tokenizers import smollm2

TALK = [Message("user", "What is 1+1?"), Message("assistant", "2")]
LOOP = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

BOMBS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a number without end": "{{ 10 ** (10 ** 10) }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a wide text": "{{ 'a' | center(10 ** 11) }}",
    "only with an assistant": "{% for m in messages if m.role == 'assistant' %}{{ 'a' * 10 ** 10 }}{% endfor %}",
}


def tokenizer(template: str) -> Any:
    """A real one with another template."""
    found = copy.copy(smollm2().tokenizer)
    found.chat_template = template
    return found


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
def test_a_template_that_does_not_end_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "_CPU_SECONDS", 1)
    with pytest.raises(JobError, match=r"^The chat template of the model's tokenizer (does not|takes more)") as caught:
        refuse_endless(tokenizer(LOOP + template))
    assert caught.value.reason is Reason.INVALID_SPEC
    assert is_sentence(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        LOOP + "{{ strftime_now('%d') }}{{ bos_token }}",
        "{{ raise_exception('no') }}",
        "{% generation %}a{% endgeneration %}{% break %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
        None,
        {"default": LOOP},
    ],
)
def test_what_ends_is_for_others_to_judge(template: Any) -> None:
    refuse_endless(tokenizer(template))


PIECES = st.sampled_from([
    LOOP, "{{ x }}", "{{ x.y.z }}", "{{ messages[9] }}", "{{ messages[0]['content'].__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}", "{{ cycler.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.append(1) }}", "{{ messages.pop() }}", "{% set x = messages[0] %}", "{{ x.update({'a': 1}) }}",
    "{% include 'a' %}", "{% import 'a' as a %}", "{% extends 'a' %}", "{{ raise_exception('a\nb\x1b') }}",
    "{{ strftime_now('%') }}", "{{ strftime_now(1) }}", "{{ 1 / 0 }}", "{% for a in 5 %}{% endfor %}", "{% if",
    "{{", "#}",
    "{{ '%s' | format }}", "{{ 'a'.format(1) }}", "{{ '{0.__class__}'.format(1) }}", "{{ messages | tojson }}", "\x00",
    "{{ range(10 ** 9) }}", "{{ range | list }}", "{% generation %}a{% endgeneration %}", "{% break %}",
    "{{ tools.a }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ namespace(a=1).a }}", "{{ lipsum() }}", "{{ dict(a=1) }}",
    "\ud800",
])  # fmt: skip


@some(100)
@given(st.lists(PIECES | st.text(max_size=10), max_size=5).map("".join))
@example("{{ raise_exception('a' * 100000) }}")
def test_any_template_renders_or_refuses_the_row(template: str) -> None:
    refusal: Exception | None = None
    try:
        TemplateRenderer(tokenizer(template or "a")).render(TALK)
    except (JobError, RowError) as error:
        refusal = error
    if isinstance(refusal, JobError):
        assert is_sentence(refusal)


ESCAPES = (
    "''.__class__.__mro__[1].__subclasses__()", "lipsum.__globals__['os']", "cycler.__init__.__globals__.os",
    "raise_exception.__globals__", "messages.__class__.__base__", "joiner.__init__.__globals__.__builtins__",
    "strftime_now.__func__.__globals__", "('{0.__class__.__mro__}').format('')", "(''|attr('__class__'))",
    "namespace.__init__.__globals__", "self.__init__.__globals__", "strftime_now.__code__",
)  # fmt: skip


@pytest.mark.parametrize("expression", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(expression: str, tmp_path: Path) -> None:
    template = "{{ " + f"({expression})['open']('{tmp_path}/out', 'w')" + " }}{{ " + expression + " }}" + LOOP
    with pytest.raises(RowError, match="is refused by the tokenizer's chat template"):
        TemplateRenderer(tokenizer(template)).render(TALK)
    assert not list(tmp_path.iterdir())
