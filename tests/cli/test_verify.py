"""`finetune verify`: one line and an exit code for people and pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import finetune, finetune_json
from tests.trainer.verify.canned import Setup, adapter_folder, cases, serving


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """A job's output, whose adapter is inside."""
    adapter_folder(tmp_path / "out" / "adapter", cases())
    return str(tmp_path / "out")


def test_a_server_that_serves_it_as_trained(adapter: str) -> None:
    with serving(Setup()) as url:
        result = finetune("verify", adapter, "--server", url, "--model", "guard")
    assert result.exit_code == 0
    assert result.stdout == (
        "guard serves the adapter as trained: 5 of 5 prompts are the trained ones; 5 of 5 answers are the trained "
        "ones, log-probs within 0; 5 answers end where training has ended them.\n"
    )
    assert result.stderr == ""


def test_json_has_every_check_and_case(adapter: str) -> None:
    with serving(Setup(template="double")) as url:
        report = finetune_json("verify", adapter, "--server", url, "--model", "guard", exit_code=1)
    assert report["verified"] is False
    assert "doubled BOS" in report["message"]
    assert [(check["name"], check["status"]) for check in report["checks"]] == [
        ("prompts", "fault"),
        ("answers", "ok"),
        ("stops", "ok"),
    ]
    assert report["cases"][0]["number"] == 1
    assert report["cases"][0]["prompt"] == "doubled-bos"
    assert report["cases"][0]["found"] == report["cases"][0]["expected"] == "w10 w60 w70"


def test_the_token_comes_from_the_environment(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_TOKEN", "very-secret-token")
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with serving(Setup(token="very-secret-token")) as url:
        arguments = ["verify", adapter, "--server", url, "--model", "guard"]
        assert finetune(*arguments, "--api-key-env", "SERVER_TOKEN").exit_code == 0
        refused = finetune(*arguments)
        assert refused.exit_code == 2
        assert "name the variable that holds its token with --api-key-env" in refused.stderr
        unset = finetune(*arguments, "--api-key-env", "NO_TOKEN")
        assert unset.exit_code == 2
        assert "NO_TOKEN is not set" in unset.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--server", "http://127.0.0.1:9"], "--server and --model go together"),
        (["--model", "guard"], "--server and --model go together"),
        (["--server", "http://h", "--model", "m", "--base-model", "b"], "--base-model is for a verification on this"),
        (["--api-key-env", "X"], "--api-key-env is for a server"),
        (["--server", "h:1", "--model", "m"], "is no address of a server"),
    ],
)
def test_what_cannot_be_meant_is_refused(adapter: str, arguments: list[str], sentence: str) -> None:
    result = finetune("verify", adapter, *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


@pytest.mark.parametrize("folder", ["none", "."])
def test_a_folder_without_an_adapter_is_a_sentence(tmp_path: Path, folder: str) -> None:
    for more in ([], ["--server", "http://127.0.0.1:9", "--model", "m"]):
        result = finetune("verify", str(tmp_path / folder), *more)
        assert result.exit_code == 2
        assert result.stderr.startswith("ModelNotFound: There is no")
