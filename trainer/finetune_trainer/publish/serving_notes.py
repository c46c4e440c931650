"""SERVING.md of an adapter, and `finetune serve-notes`: how each server has to be started to answer as trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import cache, partial
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from finetune_trainer.publish import serving_cluster, serving_commands, serving_ollama
from finetune_trainer.publish.markdown import block, code
from finetune_trainer.publish.serving_facts import TEMPLATE, ServingFacts
from finetune_trainer.publish.serving_folder import read_facts
from finetune_trainer.publish.serving_targets import Target

NAME = "SERVING.md"
PLACE = "ADAPTER_DIR"
"""Stands for the adapter's folder in the copy that travels with it."""

_TEMPLATE_BYTES = 1 << 20


def write_serving_notes(
    folder: Path,
    *,
    name: str,
    context_length: int | None,
    quantization: str | None = None,
    left_out: Sequence[str] = (),
) -> None:
    """Write SERVING.md into an adapter's folder that is complete but for it and the manifest.

    Args:
        folder: the adapter's.
        name: the job's, which its server is to call it by.
        context_length: longest row that was trained, in tokens.
        quantization: of the base model while it was trained on, if any.
        left_out: layers that were not quantized.

    Raises:
        JobError: as `read_facts`.
    """
    facts = read_facts(folder, name=name, context_length=context_length, quantization=quantization, left_out=left_out)
    text = serving_notes(facts, list(Target), place=PLACE, chat_template=read_template(folder))
    (folder / NAME).write_text(text, encoding="utf-8")


def read_template(folder: Path) -> str | None:
    """The chat template in an adapter's folder, where there is one."""
    try:
        with (folder / TEMPLATE).open("rb") as file:
            return file.read(_TEMPLATE_BYTES).decode(errors="replace")
    except OSError:
        return None


def serving_notes(facts: ServingFacts, targets: Sequence[Target], *, place: str, chat_template: str | None) -> str:
    """The notes in Markdown.

    Args:
        facts: the adapter's.
        targets: which chapters; a single one comes without the head of the page.
        place: the adapter's folder, as commands name it.
        chat_template: what is in its chat_template.jinja.
    """
    environment = _environment()
    values = {
        "facts": facts,
        "place": place,
        "chat_template": chat_template,
        "commands": serving_commands,
        "cluster": serving_cluster,
        "ollama": serving_ollama,
        "around": facts.around_answer(),
    }
    pages = [environment.get_template(f"serving_{target}.md.j2").render(values) for target in targets]
    if len(targets) > 1:
        pages.insert(0, environment.get_template("serving.md.j2").render(values))
    return "\n".join(pages)


@cache
def _environment() -> Environment:
    folder = resources.files(__package__)
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        # It is Markdown: what needs quoting is quoted by `code` and `said`.
        autoescape=False,  # noqa: S701
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        bash=partial(block, "bash"),
        python=partial(block, "python"),
        yaml=partial(block, "yaml"),
        plain=partial(block, ""),
        said=_said,
        quoted=shlex.quote,
        allsaid=lambda texts: ", ".join(map(_said, texts)),
    )
    return environment


def _said(value: str | int) -> str:
    """A value of the adapter in running text: on one line, and with every space visible."""
    return code(json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value))
