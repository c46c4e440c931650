"""What a person reads from the worker, to the letter."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from finetune_trainer.train.console import Console, human_duration


def written(use: Callable[[Console], None], environ: dict[str, str] | None = None) -> list[str]:
    stream = io.StringIO()
    use(Console.from_environment(environ or {}, stream))
    return stream.getvalue().splitlines()


def test_a_step_is_one_line() -> None:
    def use(console: Console) -> None:
        console.step(12, 100, loss=1.2341, learning_rate=1e-4, tokens_per_second=1812.4, remaining_seconds=200.4)

    assert written(use) == ["step 12/100  loss 1.234  lr 1.0e-04  1,812 tokens/s  3 min 20 s left"]


def test_what_was_not_measured_is_left_out() -> None:
    def use(console: Console) -> None:
        console.step(12, 100, loss=0.0)
        console.evaluation(12, 100, loss=None)

    assert written(use) == ["step 12/100  loss 0.000", "evaluation at step 12/100  loss not measured"]


def test_an_evaluation_is_one_line() -> None:
    def use(console: Console) -> None:
        console.evaluation(50, 100, loss=0.5, perplexity=1.6487, token_accuracy=0.8734)

    assert written(use) == ["evaluation at step 50/100  loss 0.500  perplexity 1.65  token accuracy 87.3%"]


def test_a_quiet_console_leaves_out_what_a_progress_bar_shows() -> None:
    def use(console: Console) -> None:
        console.phase("Loading the model")
        console.preparing("Tokenizing train.jsonl", 1, 2)
        console.step(1, 2, loss=1.0)
        console.evaluation(1, 2, loss=1.0)
        console.warning("deepspeed is not acted on.")

    quiet = ["Loading the model", "evaluation at step 1/2  loss 1.000", "warning: deepspeed is not acted on."]
    assert written(use, {"FINETUNE_CONSOLE": "quiet"}) == quiet
    assert len(written(use)) == 5


def test_preparation_says_its_beginning_its_end_and_between_them_little() -> None:
    stream = io.StringIO()
    now = [0.0]
    console = Console(stream, clock=lambda: now[0], preparation_seconds=5)
    for seconds, done in ((0, 0), (1, 100), (4.9, 200), (5, 300), (6, 400), (7, 1000)):
        now[0] = seconds
        console.preparing("Tokenizing train.jsonl", done, 1000)
    console.preparing("Reading valid.jsonl", 1500, None)
    assert stream.getvalue().splitlines() == [
        "Tokenizing train.jsonl: 0 of 1,000 rows  0 %",
        "Tokenizing train.jsonl: 300 of 1,000 rows  30 %",
        "Tokenizing train.jsonl: 1,000 of 1,000 rows  100 %",
        "Reading valid.jsonl: 1,500 rows",
    ]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (97200, "1 d 03 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, expected: str) -> None:
    assert human_duration(seconds) == expected
