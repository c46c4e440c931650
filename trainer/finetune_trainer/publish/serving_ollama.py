"""A Modelfile for Ollama: the format as a template in Go's language.

Ollama reads no Jinja. Its parser drops characters that do not print and ends a value at three quotation marks; what
could be read otherwise is written as an escaped string within the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune_api.prompt_format import PromptFormat, template_pieces
from finetune_trainer.publish.serving_facts import ServingFacts

BASE = "BASE_IN_OLLAMA"
_QUOTES = '"""'
_PLAIN = frozenset(map(chr, range(32, 127))) - set('"{}\\') | {"\n"}
"""Characters of literal text that neither Ollama's parser nor Go's touches."""


def modelfile(facts: ServingFacts, place: str) -> str:
    """The Modelfile, without a TEMPLATE where there is none that says what was trained."""
    template = None if hindrance(facts) else go_template(facts)
    lines = [f"FROM {BASE}", f"ADAPTER {_value(place)}", "PARAMETER temperature 0"]
    if facts.context_length:
        lines.append(f"PARAMETER num_ctx {facts.context_length}")
    lines += [f"PARAMETER stop {_value(stop)}" for stop in stops(facts) if _sayable(stop)]
    if template is not None:
        lines.append(f"TEMPLATE {_QUOTES}{template}{_QUOTES}")
    return "\n".join(lines) + "\n"


def stops(facts: ServingFacts) -> list[str]:
    """What ends an answer, as text: Ollama takes no token ids."""
    return list(dict.fromkeys([*facts.stop_texts, *facts.texts_of_ids]))


def unsayable_stops(facts: ServingFacts) -> list[str]:
    """Stops that a Modelfile cannot hold."""
    return [stop for stop in stops(facts) if not _sayable(stop)]


def hindrance(facts: ServingFacts) -> str | None:
    """Why there is no template for Ollama that renders what was trained, or None."""
    if facts.prompt_format is None:
        return "the chat template is the tokenizer's own, and Ollama reads no Jinja"
    if facts.prompt_format.strip_whitespace:
        return "the format strips white space around messages (strip_whitespace), and Ollama's templates cannot"
    return None


def go_template(facts: ServingFacts) -> str:
    """What Ollama renders as the format does; without the BOS that its server adds by itself.

    Raises:
        ValueError: `hindrance` says why there is none.
    """
    reason = hindrance(facts)
    declared = facts.prompt_format
    if reason is not None or declared is None:
        raise ValueError(reason)
    bos = declared.bos.removeprefix(facts.bos) if facts.bos else declared.bos
    system, opening = _system(declared), ""
    if declared.system_in_user:
        opening, system = "{{ $first := true }}", f"{{{{ if $first }}}}{system}{{{{ end }}}}"
    user = _filled(declared.user, {"instruction": "{{ .Content }}", "system": system})
    if declared.system_in_user:
        user += "{{ $first = false }}"
    else:
        opening = system
    return (
        f"{_literal(bos)}{opening}"
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{_answer(declared)}{{{{ end }}}}{{{{ end }}}}'
        f"{_literal(declared.trailing_assistant)}"
    )


def _system(declared: PromptFormat) -> str:
    default = declared.default_system_message
    given = _filled(declared.system, {"instruction": "{{ $.System }}"})
    otherwise = ""
    if default or declared.add_system_tags_even_if_message_is_empty:
        otherwise = "{{ else }}" + _filled(declared.system, {"instruction": _literal(default)})
    return f"{{{{ if $.System }}}}{given}{otherwise}{{{{ end }}}}"


def _answer(declared: PromptFormat) -> str:
    """An earlier answer, which may bring text of the format that is written around it: once."""
    literals = declared.literals
    # Lengths are in bytes; Go's templates subtract by taking the length of a rest.
    begins = _cut(literals.starts, "slice $answer 0 {size}", "slice $answer {size}")
    ends = _cut(
        literals.ends, "slice $answer (len (slice $answer {size}))", "slice $answer 0 (len (slice $answer {size}))"
    )
    return f"{{{{ $answer := .Content }}}}{begins}{ends}{_literal(literals.head)}{{{{ $answer }}}}" + _literal(
        literals.tail
    )


def _cut(texts: Sequence[str], part: str, rest: str) -> str:
    branches = []
    for text in texts:
        size = len(text.encode())
        condition = f"and (ge (len $answer) {size}) (eq ({part.format(size=size)}) {_string(text)})"
        branches.append(f"if {condition} }}}}{{{{ $answer = {rest.format(size=size)} }}}}")
    return "{{ " + "{{ else ".join(branches) + "{{ end }}" if branches else ""


def _filled(template: str, values: Mapping[str, str]) -> str:
    return "".join(
        _literal(literal) + ("" if field is None else values[field]) for literal, field in template_pieces(template)
    )


def _literal(text: str) -> str:
    return text if set(text) <= _PLAIN else f"{{{{ {_string(text)} }}}}"


def _string(text: str) -> str:
    """`text` as one of Go's strings, in characters that nobody drops."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    if character in _PLAIN and character != "\n":
        return character
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def _sayable(text: str) -> bool:
    return bool(text) and _QUOTES not in text and all(each.isprintable() or each in "\n\t" for each in text)


def _value(text: str) -> str:
    return _QUOTES + text + _QUOTES
