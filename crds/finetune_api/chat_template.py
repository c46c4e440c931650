"""PromptFormat -> the Jinja chat template that renders the same text.

The template travels with the adapter, so that `tokenizer.apply_chat_template` and any server that reads it prompt the
model with exactly the text it was trained on. Transformers tokenizes a rendered template without adding special
tokens; the one-BOS rule is therefore written into the template.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.prompt_format import PromptFormat, template_pieces

_CHECKS = """\
{%- for message in messages -%}
  {%- if message['content'] is not string -%}
    {{- raise_exception('The content of a message must be text.') -}}
  {%- endif -%}
  {%- if message['role'] == 'system' -%}
    {%- set state.system = message['content'] -%}
    {%- set state.systems = state.systems + 1 -%}
  {%- elif message['role'] not in ['user', 'assistant'] -%}
    {{- raise_exception('Unknown role: roles are system, user and assistant.') -}}
  {%- endif -%}
{%- endfor -%}
{%- if state.systems > 1 -%}
  {{- raise_exception('Only one system message can be given in a conversation.') -}}
{%- endif -%}
"""


def chat_template(prompt_format: PromptFormat, automatic_bos: str | None) -> str:
    """The Jinja template equal to `prompt_format.render(...).with_bos(automatic_bos).text`.

    With `add_generation_prompt` it renders `prompt_format.render_prompt(...)` likewise.

    Args:
        prompt_format: the format to express.
        automatic_bos: the BOS text the model's tokenizer adds by itself, or None when it adds none.
    """
    return "".join(
        [
            f"{{%- set state = namespace(text={_literal(prompt_format.bos)}, system=none, systems=0, answer='') -%}}\n",
            _CHECKS,
            _default_system(prompt_format),
            "" if prompt_format.system_in_user else _leading_system(prompt_format),
            _turns(prompt_format),
            "{%- if add_generation_prompt -%}\n",
            _append(_literal(prompt_format.trailing_assistant)),
            "{%- endif -%}\n",
            _leading_bos(automatic_bos),
            "{{- state.text -}}",
        ]
    )


def _default_system(prompt_format: PromptFormat) -> str:
    if not (prompt_format.default_system_message or prompt_format.add_system_tags_even_if_message_is_empty):
        return ""
    default = _literal(prompt_format.default_system_message)
    return f"{{%- if state.systems == 0 -%}}{{%- set state.system = {default} -%}}{{%- endif -%}}\n"


def _leading_system(prompt_format: PromptFormat) -> str:
    shown = "state.system is not none"
    if not prompt_format.add_system_tags_even_if_message_is_empty:
        shown += " and state.system != ''"
    text = _filled(prompt_format.system, instruction=_content("state.system", prompt_format))
    return f"{{%- if {shown} -%}}\n{_append(text)}{{%- endif -%}}\n"


def _turns(prompt_format: PromptFormat) -> str:
    content = _content("message['content']", prompt_format)
    # A system message inside the user's is not stripped, as in the format's own rules.
    system = f"({_filled(prompt_format.system, instruction='state.system')} if state.system is not none else '')"
    user = _append(_filled(prompt_format.user, instruction=content, system=system))
    if prompt_format.system_in_user:
        user += "{%- set state.system = none -%}\n"
    literals = prompt_format.literals
    written = [_literal(literals.head), _content("state.answer", prompt_format), _literal(literals.tail)]
    answer = (
        "{%- set state.answer = message['content'] -%}\n"
        + _once(literals.starts, "state.answer[:{}]", "state.answer[{}:]")
        + _once(literals.ends, "state.answer[-{}:]", "state.answer[:-{}]")
        + _append(" ~ ".join(written))
    )
    return (
        "{%- for message in messages -%}\n"
        f"{{%- if message['role'] == 'user' -%}}\n{user}"
        f"{{%- elif message['role'] == 'assistant' -%}}\n{answer}"
        "{%- endif -%}\n{%- endfor -%}\n"
    )


def _once(texts: Sequence[str], part: str, rest: str) -> str:
    """Takes the first of `texts` that the answer has at one end off it.

    Args:
        texts: longest first.
        part: a Jinja expression for as many characters at that end as stand for {}.
        rest: one for all others.
    """
    branches = [
        f"if {part.format(len(text))} == {_literal(text)} -%}}\n{{%- set state.answer = {rest.format(len(text))} -%}}\n"
        for text in texts
    ]
    return "{%- " + "{%- el".join(branches) + "{%- endif -%}\n" if branches else ""


def _leading_bos(automatic_bos: str | None) -> str:
    if not automatic_bos:
        return ""
    bos = _literal(automatic_bos)
    return f"{{%- if state.text[:{len(automatic_bos)}] != {bos} -%}}{{{{- {bos} -}}}}{{%- endif -%}}\n"


def _append(expression: str) -> str:
    return f"{{%- set state.text = state.text ~ {expression} -%}}\n"


def _content(expression: str, prompt_format: PromptFormat) -> str:
    return f"({expression} | trim)" if prompt_format.strip_whitespace else expression


def _filled(template: str, **expressions: str) -> str:
    """A Jinja expression for `template` with its placeholders replaced by other Jinja expressions."""
    terms = []
    for literal, field in template_pieces(template):
        if literal:
            terms.append(_literal(literal))
        if field is not None:
            terms.append(expressions[field])
    return " ~ ".join(terms)


def _literal(text: str) -> str:
    """`text` as a Jinja string literal. Jinja reads the escapes of Python's string literals."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "'" + "".join(_escape(character) for character in escaped) + "'"


def _escape(character: str) -> str:
    common = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    if character in common:
        return common[character]
    code = ord(character)
    # Control characters and the line separators that some engines normalize; all else stays readable.
    if code < 32 or 127 <= code < 160 or code in (0x2028, 0x2029):
        return f"\\u{code:04x}"
    return character
