"""`finetune serve-notes`: the commands that serve an adapter as it was trained, for its own folder and stops."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.output import OutputFormat, OutputOption, fail, print_json
from finetune_trainer.publish.serving_targets import Target


def serve_notes(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder, or a finished job's folder.")],
    target: Annotated[Target | None, typer.Option("--for", help="One server's part. Default: all of them.")] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What the server is to call it. Default: the job's name.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Base model: folder or Hub id. Default: what was trained on."),
    ] = None,
    output: OutputOption = OutputFormat.TEXT,
) -> None:
    """Print how to serve an adapter so that it answers as it was trained."""
    from finetune_trainer.errors import JobError
    from finetune_trainer.publish.serving_folder import adapter_folder, read_facts, weights_here
    from finetune_trainer.publish.serving_notes import read_template, serving_notes

    try:
        folder = adapter_folder(adapter)
        facts = read_facts(folder, name=name, base=base_model or weights_here(folder))
    except JobError as error:
        raise fail(f"{error.reason}: {error.message}", exit_code=error.exit_code) from error
    place, template = str(Path(folder).absolute()), read_template(folder)
    targets = [target] if target else list(Target)
    if output is OutputFormat.TEXT:
        # A path need not be text.
        typer.echo(serving_notes(facts, targets, place=place, chat_template=template).encode(errors="surrogateescape"))
        return
    notes = {each.value: serving_notes(facts, [each], place=place, chat_template=template) for each in targets}
    print_json(
        {
            "name": facts.name,
            "base_model": facts.base,
            "rank": facts.rank,
            "max_lora_rank": facts.server_rank,
            "stop_token_ids": list(facts.stop_ids),
            "stop": list(facts.stop_texts),
            "notes": notes,
        }
    )
