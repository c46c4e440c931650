"""The command as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.command import finetune

SLOW = ("torch", "transformers", "peft", "huggingface_hub", "boto3", "kopf", "kubernetes", "pydantic", "matplotlib")


def test_help_loads_nothing_that_takes_long() -> None:
    # Modules instead of seconds: a busy machine must not fail this test.
    script = (
        "import sys\n"
        "from finetune_cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [name for name in {SLOW!r} if name in sys.modules])\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "LOADED []" in printed


def test_help_names_every_command() -> None:
    printed = finetune("--help").output
    for command in ("run", "validate", "preview", "render", "chat"):
        assert command in printed


@pytest.mark.parametrize("command", ["run", "validate", "preview", "render", "chat"])
def test_every_command_explains_itself(command: str) -> None:
    result = finetune(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_version_is_that_of_the_installed_distribution() -> None:
    assert finetune("--version").output.startswith("finetune 0.")
