"""Calls `finetune` inside the test process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from finetune_cli.main import app


def finetune(*arguments: str, stdin: str | None = None) -> Result:
    """The result of `finetune ARGUMENTS…`; an exception other than an exit is raised here."""
    return CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=False)


def finetune_json(*arguments: str, exit_code: int = 0) -> Any:
    """What `finetune ARGUMENTS… -o json` answers."""
    result = finetune(*arguments, "-o", "json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)
