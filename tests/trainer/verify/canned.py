"""A language of words with its adapter's folder, and a real HTTP server that serves it, right or misconfigured."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from finetune_trainer.verify.golden import GOLDEN, GoldenCase, GoldenMessage

BOS, EOS, ASK, OTHER_ASK = 0, 1, 2, 3
_SPECIAL = ["<s>", "</s>", "[ask]", "[other]"]
_WORDS = [f"w{number}" for number in range(4, 100)]
Bodies = list[dict[str, Any]]


def tokenizer() -> Tokenizer:
    """One token per word."""
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(_SPECIAL + _WORDS)}, unk_token="w4"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens([AddedToken(text, special=True) for text in _SPECIAL])
    return made


def text(ids: list[int]) -> str:
    return " ".join(_WORDS[each - 4] for each in ids if each >= 4)


def case(number: int, **changes: Any) -> GoldenCase:
    """A question of one word; the trained answer and the base's differ at the second token."""
    word = 10 + number
    answer, base = [word, 60 + number, 70 + number, EOS], [word, 30 + number, 31, 32, 33, 34]
    values: dict[str, Any] = {
        "dtype": "float32",
        "messages": [GoldenMessage(role="user", content=text([word]))],
        "prompt": f"<s>{text([word])}[ask]",
        "prompt_ids": [BOS, word, ASK],
        "ids": answer,
        "text": text(answer),
        "finish": "stop",
        "logprobs": [-0.01] * 4,
        "margins": [4.0] * 4,
        "scale": 20.0,
        "base_ids": base,
        "base_text": text(base),
        "base_logprobs": [-0.5] * 6,
        "base_margins": [2.0] * 6,
        "stop_token_ids": [EOS],
        "stop_texts": [],
    }
    return GoldenCase(**(values | changes))


def cases(count: int = 5, **changes: Any) -> list[GoldenCase]:
    return [case(number, **changes) for number in range(count)]


def adapter_folder(folder: Path, golden: list[GoldenCase]) -> Path:
    """What a verification of a server reads."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/base"}))
    (folder / GOLDEN).write_bytes(b"".join(each.line() for each in golden))
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@dataclass
class Setup:
    """How a server is set up; as it stands, it serves the adapter as trained."""

    golden: list[GoldenCase] = field(default_factory=cases)
    models: dict[str, str] = field(default_factory=lambda: {"base": "base", "guard": "trained"})
    """Whose answers each name gives: trained, base, another or wrong."""
    parent: str | None = "base"
    template: str = "trained"
    """trained, other, double, missing, or none: requests are refused."""
    stops: bool = True
    penalty: bool = False
    """Answers change unless a request has a penalty of its own."""
    ids: bool = True
    """Whether ids are reported."""
    logprobs: bool = True
    usage: bool = True
    completions: bool = True
    strict: bool = False
    """Unknown fields are refused."""
    shift: float = 0.0
    """Added to the log-probs of the adapter."""
    other_tokenizer: bool = False
    adds_bos: bool = False
    """To prompts that are text."""
    token: str | None = None
    fails: list[int] = field(default_factory=list)
    """Statuses of the first answers."""
    html: bool = False
    bodies: Bodies = field(default_factory=list)
    """Of the requests it got."""

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids that its template makes."""
        words = [_WORDS.index(word) + 4 for message in messages for word in message["content"].split()]
        ids = [BOS, *words, OTHER_ASK if self.template == "other" else ASK]
        ids = [each + 1 for each in ids] if self.other_tokenizer else ids
        return {"double": [BOS, *ids], "missing": ids[1:]}.get(self.template, ids)

    def prompt_tokens(self, prompt: list[int]) -> int:
        """How many it says there are."""
        return len(prompt)

    def answer(self, model: str, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """(ids, log-probs), the end of the turn included if it stops there."""
        known = next((each for each in self.golden if each.prompt_ids == prompt), None)
        whose = self.models[model]
        if known is None or whose == "wrong":
            ids, logprobs = [90, 91, 92], [-1.0] * 3
        elif whose == "another":
            ids, logprobs = [known.ids[0], 80, EOS], [-0.01] * 3
        elif whose == "trained":
            ids, logprobs = list(known.ids), [each + self.shift for each in known.logprobs]
        else:
            ids, logprobs = list(known.base_ids), list(known.base_logprobs)
        if self.penalty and "repetition_penalty" not in body and whose == "trained":
            ids = [ids[0], 85, 86, EOS]
        stop = body.get("stop") or []
        if not self.stops or (EOS not in ids and not any(each in text(ids) for each in stop)):
            ids = ids + [50] * 40
        return ids[: body["max_tokens"]], (logprobs + [-2.0] * 64)[: min(len(ids), body["max_tokens"])]


class _Handler(BaseHTTPRequestHandler):
    setup_: Setup

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        setup = self.setup_
        if refusal := self._refusal():
            self._send(*refusal)
            return
        entries = [
            {"id": name, "object": "model", "parent": setup.parent if whose != "base" else None}
            for name, whose in setup.models.items()
        ]
        self._send(200, {"object": "list", "data": entries})

    def do_POST(self) -> None:
        self._send(*self._posted())

    def _posted(self) -> tuple[int, Any]:
        setup, route = self.setup_, self.path.removeprefix("/v1")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        setup.bodies.append({"route": route, **body})
        if refusal := self._refusal():
            return refusal
        known = {"model", "messages", "temperature", "max_tokens", "stop", "repetition_penalty"}
        if setup.strict and (unknown := set(body) - known):
            return 400, {"error": {"message": f"Unknown parameter: {min(unknown)}"}}
        if route == "/chat/completions":
            if setup.template == "none":
                message = "default chat template is no longer allowed, so you must provide a chat template"
                return 400, {"error": {"message": message}}
            prompt = setup.prompt(body["messages"])
        elif route == "/completions" and setup.completions:
            prompt = body["prompt"]
            if isinstance(prompt, str):
                prompt = tokenizer().encode(prompt.replace("[", " [").replace("<s>", "<s> ")).ids
                prompt = [each + 1 for each in prompt] if setup.other_tokenizer else prompt
                prompt = [BOS, *prompt] if setup.adds_bos and body.get("add_special_tokens", True) else prompt
        else:
            return 404, {"detail": "Not Found"}
        return 200, self._answer(body, prompt, chat=route == "/chat/completions")

    def _answer(self, body: dict[str, Any], prompt: list[int], *, chat: bool) -> dict[str, Any]:
        setup = self.setup_
        ids, logprobs = setup.answer(body["model"], prompt, body)
        ended = EOS in ids and setup.stops
        shown = text(ids)
        for stop in body.get("stop") or []:
            if stop in shown:
                shown, ended = shown[: shown.index(stop)], True
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice |= {"message": {"role": "assistant", "content": shown}} if chat else {"text": shown}
        answer: dict[str, Any] = {"choices": [choice]}
        if setup.usage:
            answer["usage"] = {"prompt_tokens": setup.prompt_tokens(prompt), "completion_tokens": len(ids)}
        if setup.ids and body.get("return_token_ids"):
            choice["token_ids"] = ids
            (answer if chat else choice)["prompt_token_ids"] = prompt
        if setup.logprobs and body.get("logprobs"):
            entries = [{"token": "", "logprob": value} for value in logprobs]
            choice["logprobs"] = {"content": entries} if chat else {"token_logprobs": logprobs}
        return answer

    def _refusal(self) -> tuple[int, Any] | None:
        setup = self.setup_
        if setup.fails:
            return setup.fails.pop(0), {"error": {"message": "busy"}}
        if setup.token and self.headers.get("Authorization") != f"Bearer {setup.token}":
            return 401, {"error": "Unauthorized"}
        return (200, "<html><body>Welcome</body></html>") if setup.html else None

    def _send(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(setup: Setup) -> Iterator[str]:
    """The address of a server that is set up like this."""
    handler = type("Handler", (_Handler,), {"setup_": setup})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
