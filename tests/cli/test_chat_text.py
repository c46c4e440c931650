"""Which part of what a model generates is its message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_api.answer_literals import answer_literals
from finetune_trainer.errors import JobError
from finetune_trainer.published.stops import Stops, message_in

SPELT_OUT = Stops((), ("</s>",), answer_literals("", " </s>", ""))
ONE_TOKEN = Stops((2,), (), answer_literals("", "<|im_end|>\n", ""))
HEADED = Stops((), ("</s>",), answer_literals("A: ", " </s>", "A:"))
NAMED = Stops((2,), (), answer_literals("<|im_start|>bot\n", "<|im_end|>\n", ""))


@pytest.mark.parametrize(
    ("generated", "stops", "finished", "expected"),
    [
        ("unsafe\nO3", SPELT_OUT, False, ("unsafe\nO3", False)),
        # What may become the end of the turn is held back until it is known.
        ("unsafe\nO3 ", SPELT_OUT, False, ("unsafe\nO3", False)),
        ("unsafe\nO3 </", SPELT_OUT, False, ("unsafe\nO3", False)),
        ("unsafe\nO3 </s>", SPELT_OUT, False, ("unsafe\nO3", True)),
        ("unsafe\nO3 </s> and on", SPELT_OUT, False, ("unsafe\nO3", True)),
        ("a </b", SPELT_OUT, False, ("a </b", False)),
        ("one two ", SPELT_OUT, True, ("one two ", False)),
        ("half a \ufffd", ONE_TOKEN, False, ("half a ", False)),
        ("half a \ufffd", ONE_TOKEN, True, ("half a \ufffd", False)),
        ("a < b", ONE_TOKEN, False, ("a < b", False)),
        ("", ONE_TOKEN, True, ("", False)),
        # What the format writes before the message is no part of it.
        (" ", HEADED, False, ("", False)),
        (" safe", HEADED, False, ("safe", False)),
        (" safe ", HEADED, True, ("safe ", False)),
        (" safe </s>", HEADED, False, ("safe", True)),
        ("<|im_start|>b", NAMED, False, ("", False)),
        ("<|im_start|>bot\nyes", NAMED, False, ("yes", False)),
        ("bo", NAMED, False, ("", False)),
        ("bo", NAMED, True, ("bo", False)),
    ],
)
def test_the_message_ends_before_its_end_of_turn(
    generated: str, stops: Stops, finished: bool, expected: tuple[str, bool]
) -> None:
    text, _, ended = message_in(generated, stops, ended=False, finished=finished)
    assert (text, ended) == expected


def test_what_was_said_is_all_before_the_stop() -> None:
    assert message_in(" safe </s> and on", HEADED, ended=False, finished=True) == ("safe", " safe ", True)
    assert message_in("yes", ONE_TOKEN, ended=True, finished=True) == ("yes", "yes", True)


def test_text_that_was_shown_is_never_taken_back() -> None:
    whole = "Prices: 3 < 4 </ end </s>"
    shown = ""
    for length in range(len(whole) + 1):
        text, _, _ = message_in(whole[:length], SPELT_OUT, ended=False, finished=False)
        assert text.startswith(shown)
        shown = text
    assert shown == "Prices: 3 < 4 </ end"


def test_stops_come_from_the_adapters_own_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "stop_strings": ["</s>"]}))
    (tmp_path / "prompt_format.yaml").write_text(
        'prompt_format: {system: "{instruction}", user: "{instruction}", assistant: "{instruction} </s>"}\n'
        'stopping_sequences: ["</s>"]\n'
    )
    assert Stops.read(tmp_path, eos_token_id=0) == Stops((2, 7), ("</s>",), SPELT_OUT.literals)


def test_a_plain_model_folder_stops_at_its_tokenizers_end_of_sequence(tmp_path: Path) -> None:
    assert Stops.read(tmp_path, eos_token_id=2) == Stops((2,), (), answer_literals("", "", ""))


def test_a_damaged_prompt_format_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "prompt_format.yaml").write_text("prompt_format: {system: 1}\n")
    with pytest.raises(JobError, match="copy the adapter again"):
        Stops.read(tmp_path, eos_token_id=2)
