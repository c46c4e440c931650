"""One line says whether a server serves the adapter as trained, or what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.errors import JobError
from finetune_trainer.published.folder import open_adapter
from finetune_trainer.verify.http import Server, ServerError
from finetune_trainer.verify.report import Report
from finetune_trainer.verify.server import verify_server
from tests.trainer.verify.canned import EOS, Setup, adapter_folder, case, cases, serving


def verify(tmp_path: Path, setup: Setup, model: str = "guard", token: str | None = None) -> Report:
    folder = adapter_folder(tmp_path / "adapter", setup.golden)
    with serving(setup) as url, Server(url, token=token, sleep=lambda _: None) as server:
        return verify_server(open_adapter(str(folder), tmp_path, weights=False), server, model)


WRONG_MODELS = {"base": "wrong", "guard": "wrong"}
SPELT_OUT = [
    case(number, ids=[10 + number, 60 + number, 98], text=f"w{10 + number} w{60 + number} ", logprobs=[-0.1] * 3,
         margins=[4.0] * 3, stop_token_ids=[], stop_texts=["w98"])
    for number in range(3)
]  # fmt: skip
TIED = [case(0, margins=[4.0, 0.05, 4.0, 4.0]), *cases(4)[1:]]
"""The second token of the first answer is as good as the next one."""
AS_BASE = cases(ids=[11, 12, 13], text="w11 w12 w13", finish="length", margins=[4.0] * 3, base_ids=[11, 12, 13],
                base_text="w11 w12 w13", base_margins=[4.0] * 3, logprobs=[-0.3] * 3,
                base_logprobs=[-0.9] * 3)  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "verified", "sentence"),
    [
        (Setup(), True, "guard serves the adapter as trained: 5 of 5 prompts are the trained ones; 5 of 5 answers are"),
        (Setup(ids=False), True, "5 of 5 prompts are the trained ones in length; 5 of 5 answers are the trained ones;"),
        (Setup(ids=False, logprobs=False, usage=False, completions=False), True, "serves the adapter as trained"),
        (Setup(strict=True), True, "serves the adapter as trained"),
        (Setup(fails=[503, 500]), True, "serves the adapter as trained"),
        (Setup(golden=SPELT_OUT), True, "3 answers end where training has ended them"),
        (Setup(models={"base": "base", "other": "trained"}), False, "no model guard: it has base, other."),
        (Setup(models={}), False, "the server has no model guard: it has none."),
        (Setup(template="none"), False, "refuses the golden prompts (400: default chat template is no longer"),
        (Setup(template="none"), False, "provide a chat template); start the server with --chat-template"),
        (Setup(template="other"), False, "they have '<s> w10 [other]' where training had '<s> w10 [ask]'"),
        (Setup(template="other"), False, "given the trained prompt itself it answers as trained"),
        (Setup(template="double"), False, "'<s>' stands twice at the beginning of its prompts (a doubled BOS)"),
        (Setup(template="missing"), False, "its prompts lack the BOS '<s>' that training had"),
        (Setup(template="double", ids=False), False, "one token more than in training, as with a doubled BOS"),
        (Setup(template="missing", ids=False), False, "one token less than in training, as without its BOS"),
        (Setup(other_tokenizer=True), False, "other tokens of the same text, so its tokenizer is another base"),
        (Setup(stops=False), False, "5 of 5 answers go on after '</s>', where training has ended them: start the serv"),
        (Setup(stops=False, ids=False), False, "5 of 5 answers go on after '</s>'"),
        (Setup(stops=False, template="double"), False, "doubled BOS): let the template write it and the server add"),
        (Setup(models={"base": "base", "guard": "base"}), False, "it answers as the base model does, so the adapter"),
        (Setup(models={"base": "base", "guard": "base"}, ids=False), False, "it answers as the base model does"),
        (Setup(models={"guard": "base"}, parent=None), False, "it answers as the base model does, so the adapter does"),
        (Setup(models=WRONG_MODELS), False, "nor is that base model acme/base"),
        (Setup(models={"base": "wrong", "guard": "another"}), False, "serve the adapter on acme/base, in its"),
        (Setup(models={"base": "base", "guard": "another"}), False, "while its base model is the right one"),
        (Setup(models={"guard": "another"}, parent=None), False, "nor the base model's: it has another base model"),
        (Setup(penalty=True), False, "and without penalties they are: take repetition_penalty and the like out"),
        (Setup(shift=-0.9), False, "the trained ones with other probabilities (log-probs differ by up to 0.9)"),
        (Setup(shift=-0.02), True, "log-probs within 0.02"),
        (Setup(golden=AS_BASE), True, "5 of 5 answers are the trained ones"),
        (Setup(golden=AS_BASE, models={"guard": "base"}, parent=None), False, "it answers as the base model does"),
        (Setup(golden=AS_BASE, logprobs=False), None, "too alike to tell which the server gives"),
    ],
)  # fmt: skip
def test_the_line_says_what_is_wrong(tmp_path: Path, setup: Setup, verified: bool | None, sentence: str) -> None:
    report = verify(tmp_path, setup)
    assert sentence in report.message
    assert report.verified is verified
    assert "\n" not in report.message


def test_a_near_tie_is_no_fault(tmp_path: Path) -> None:
    class Rounding(Setup):
        def answer(self, model: str, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], list[float]]:
            ids, logprobs = super().answer(model, prompt, body)
            return ([ids[0], 44, EOS], logprobs[:3]) if prompt == self.golden[0].prompt_ids else (ids, logprobs)

    assert verify(tmp_path / "tied", Rounding(golden=TIED)).verified
    clear = verify(tmp_path / "clear", Rounding(golden=cases(4)))
    assert clear.verified is False
    assert "1 of 4 answers are not the trained ones" in clear.message
    assert [result.answer for result in clear.cases] == ["other", "same", "same", "same"]


def test_stop_texts_are_sent_since_no_server_can_know_them(tmp_path: Path) -> None:
    setup = Setup(golden=SPELT_OUT)
    report = verify(tmp_path, setup)
    assert all(body["stop"] == ["w98"] for body in setup.bodies if body["route"] == "/chat/completions")
    assert "clients have to send it as `stop`" in report.notes[0]


def test_a_server_that_adds_a_bos_to_text_is_a_hint_and_no_fault(tmp_path: Path) -> None:
    report = verify(tmp_path, Setup(adds_bos=True))
    assert report.verified
    assert "get '<s>' twice unless they send add_special_tokens: false" in report.notes[0]


def test_what_a_server_does_not_report_is_said(tmp_path: Path) -> None:
    (note,) = verify(tmp_path, Setup(ids=False, logprobs=False)).notes
    assert note == (
        "This server does not report prompts as tokens (their number was compared), answers as tokens (texts were "
        "compared), log-probs."
    )


def test_a_server_that_counts_only_what_it_had_not_cached_is_not_blamed(tmp_path: Path) -> None:
    class Caching(Setup):
        def prompt_tokens(self, prompt: list[int]) -> int:
            return 1

    report = verify(tmp_path, Caching(ids=False, completions=False))
    assert report.verified
    assert "it counts fewer tokens in prompts than training had" in report.message


def test_requests_are_greedy_and_leave_room_to_run_on(tmp_path: Path) -> None:
    setup = Setup()
    verify(tmp_path, setup)
    first = setup.bodies[0]
    assert first["temperature"] == 0
    assert first["max_tokens"] > len(setup.golden[0].ids)
    assert "stop" not in first


@pytest.mark.parametrize(
    ("setup", "sentence"),
    [
        (Setup(token="right"), r"refuses these credentials \(401\): name the variable"),
        (Setup(html=True), "answers with text/html that is no JSON object"),
        (Setup(fails=[302]), "redirects to nowhere"),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_sentence(tmp_path: Path, setup: Setup, sentence: str) -> None:
    with pytest.raises(ServerError, match=sentence):
        verify(tmp_path, setup, token="wrong-one")


def test_the_token_is_sent(tmp_path: Path) -> None:
    assert verify(tmp_path, Setup(token="right"), token="right").verified


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:9", "http://127.0.0.1:9/v1 cannot be reached"),
        ("ftp://host", "is no address of a server"),
        ("host:8000", "is no address of a server"),
        ("http://someone:secret@host", "Credentials do not belong"),
        ("http://host/v1?key=1", "leave out"),
    ],
)
def test_a_wrong_address_is_one_sentence(url: str, sentence: str) -> None:
    with pytest.raises(ServerError, match=sentence) as caught, Server(url, sleep=lambda _: None) as server:
        server.get("/models")
    assert "secret" not in str(caught.value)


def test_without_golden_prompts_there_is_nothing_to_ask(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", cases())
    (folder / "golden.jsonl").unlink()
    with Server("http://127.0.0.1:9") as server, pytest.raises(JobError, match="nothing to ask a server"):
        verify_server(open_adapter(str(folder), tmp_path, weights=False), server, "guard")
