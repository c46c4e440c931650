"""`make demo`: a real model judges requests it has never seen, is fine-tuned, and judges them again.

The training is `finetune run` with the job beside this file, as anybody would call it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from examples.safety.base_model import MODEL_ID, base_model
from finetune_cli.output import SHARED_CPU
from finetune_trainer.chat import ChatModel

HERE = Path(__file__).parent
OUTPUT = Path("finetune-output/safety")
SHOWN = 6
"""Rows of the table; the score counts all held-out requests."""
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Request:
    """One held-out request and the verdict that is right for it."""

    system: str
    text: str
    verdict: str


def held_out() -> list[Request]:
    """The requests that are never trained on."""
    rows = [json.loads(line)["messages"] for line in (HERE / "held-out.jsonl").read_text("utf-8").splitlines()]
    return [Request(system["content"], user["content"], answer["content"]) for system, user, answer in rows]


def answers(model: ChatModel, requests: Sequence[Request], what: str, console: Console) -> list[str]:
    """The model's answers, cut off when it rambles."""
    found = []
    for request in track(requests, what, console=console, transient=True):
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.text}]
        answer = model.answer(messages, max_new_tokens=MAX_NEW_TOKENS)
        found.append(answer.text + ("…" if answer.finish_reason == "length" else ""))
    return found


def comparison(requests: Sequence[Request], before: Sequence[str], after: Sequence[str]) -> Table:
    """Answers side by side, right ones in green."""
    table = Table(show_lines=True, title="Requests that were not in the training data", title_style="bold")
    for heading in ("request", "right", "before", "after"):
        table.add_column(heading, overflow="fold")
    rows = zip(requests[:SHOWN], before, after, strict=False)
    for request, old, new in rows:
        table.add_row(request.text, one_line(request.verdict), _marked(old, request), _marked(new, request))
    return table


def one_line(verdict: str) -> str:
    """A verdict's two lines in one."""
    return verdict.replace("\n", " / ")


def score(requests: Sequence[Request], given: Sequence[str]) -> str:
    """How many answers are exactly right, and how many are right about safe or unsafe alone."""
    exact = sum(answer == request.verdict for request, answer in zip(requests, given, strict=True))
    safety = sum(
        _first_line(answer) == _first_line(request.verdict) for request, answer in zip(requests, given, strict=True)
    )
    return f"{exact} of {len(requests)} exactly right, {safety} right about safe or unsafe"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _marked(answer: str, request: Request) -> Text:
    return Text(one_line(answer), "green" if answer == request.verdict else "red")


def main() -> int:
    """Run the demo; the exit code is that of `finetune run`."""
    console = Console(highlight=False)
    os.environ.update(SHARED_CPU | os.environ)
    base = base_model()
    requests = held_out()
    console.print(
        f"[bold]1. {MODEL_ID} as it is[/bold], asked about {len(requests)} requests it will not be trained on"
    )
    before = answers(ChatModel.load(base), requests, "Asking…", console)
    console.print(f"   {score(requests, before)}\n")

    # The weights come from this machine's cache; without it they would come from the Hub by model_id.
    job = os.path.relpath(HERE / "finetune.yaml")
    command = ["run", job, "--output-dir", str(OUTPUT), "--set", f"initial_base_model_ckpt_path={base}"]
    console.print("[bold]2. Fine-tuning[/bold] with LoRA on this machine")
    console.print(f"   $ finetune {' '.join(command)}", style="dim", soft_wrap=True)
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "finetune_cli", *command], check=False)
    if ended.returncode != 0:
        return ended.returncode
    console.print(f"   took {time.monotonic() - started:.0f} s\n")

    adapter = OUTPUT / "adapter"
    console.print("[bold]3. The same requests again[/bold], answered with the adapter")
    after = answers(ChatModel.load(adapter, base_model=str(base)), requests, "Asking…", console)
    console.print(comparison(requests, before, after))
    console.print(f"before: {score(requests, before)}")
    console.print(f"after:  {score(requests, after)}", style="bold")
    console.print(f"\nThe adapter is in {adapter}. `rm -r {OUTPUT}` and `make demo` train it anew.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
