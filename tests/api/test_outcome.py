"""A trainer's last words arrive whole, within the kubelet's limit, whatever was said."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api.outcome import (
    EXIT_CODES,
    FIRST_RETRYABLE_EXIT_CODE,
    MESSAGE_ROOM_BYTES,
    TERMINATION_MESSAGE_LIMIT_BYTES,
    AdapterResult,
    CheckpointResult,
    DatasetResult,
    Metric,
    MetricsResult,
    ProgressReport,
    Reason,
    TerminationMessage,
    TrainerStatus,
    is_retryable,
)

ADAPTER = AdapterResult(
    uri="s3://bucket/job/adapter",
    base_model="meta-llama/Meta-Llama-3-8B",
    base_model_revision="main",
    sha256="0" * 64,
    size_bytes=2**35,
)
DATASET = DatasetResult(
    rows=10**9, trainable_tokens=10**12, truncated_rows=1, dropped_rows=2, invalid_rows=3, sha256="f" * 64
)
METRICS = MetricsResult(train_loss=1.25, eval_loss=0.1, perplexity=1e300, token_accuracy=0.0)
CHECKPOINT = CheckpointResult(uri="s3://bucket/job/checkpoints/step-00000010", step=10)
FULL = TerminationMessage(
    succeeded=True,
    message="Done.",
    rank=3,
    adapter=ADAPTER,
    dataset=DATASET,
    metrics=METRICS,
    checkpoint=CHECKPOINT,
)


def test_a_message_arrives_as_it_was_sent() -> None:
    assert TerminationMessage.parse(FULL.to_bytes()) == FULL


def test_a_message_is_json_in_the_spelling_of_kubernetes_without_what_is_unknown() -> None:
    message = TerminationMessage(succeeded=False, reason=Reason.DATA_INVALID, message="No rows.", dataset=DATASET)
    assert json.loads(message.to_bytes()) == {
        "version": 1,
        "succeeded": False,
        "reason": "DataInvalid",
        "message": "No rows.",
        "collateral": False,
        "dataset": {
            "rows": 10**9,
            "trainableTokens": 10**12,
            "truncatedRows": 1,
            "droppedRows": 2,
            "invalidRows": 3,
            "retokenizedRows": 0,
            "sha256": "f" * 64,
        },
    }


_CHARACTERS = ["a", "é", "中", "😀", "\n", '"', "\\", "\x01", "\u2028"]


@pytest.mark.parametrize("character", _CHARACTERS)
@pytest.mark.parametrize("length", [3000, 4096, 100_000])
def test_a_huge_message_is_shortened_and_everything_else_stays(character: str, length: int) -> None:
    sent = TerminationMessage.model_validate({**FULL.model_dump(), "message": character * length})
    data = sent.to_bytes()
    assert len(data) <= TERMINATION_MESSAGE_LIMIT_BYTES
    read = TerminationMessage.parse(data)
    assert read is not None
    assert read.model_copy(update={"message": ""}) == sent.model_copy(update={"message": ""})
    assert read.message.strip(character) in ("", "…")
    # At least a third of the room is used, else the sentence would lose its point.
    assert len(data) > TERMINATION_MESSAGE_LIMIT_BYTES * 2 // 3 or read.message == sent.message


def test_a_message_that_fits_is_never_shortened() -> None:
    bare = len(TerminationMessage(succeeded=False).to_bytes())
    room = TERMINATION_MESSAGE_LIMIT_BYTES - bare
    exact = TerminationMessage(succeeded=False, message="x" * room)
    assert len(exact.to_bytes()) == TERMINATION_MESSAGE_LIMIT_BYTES
    assert TerminationMessage.parse(exact.to_bytes()) == exact
    longer = TerminationMessage.parse(TerminationMessage(succeeded=False, message="x" * (room + 1)).to_bytes())
    assert longer is not None
    assert longer.message.endswith("x…")


def test_addresses_that_leave_no_room_give_way_to_the_sentence() -> None:
    long = "é" * 2048
    sent = FULL.model_copy(
        update={
            "message": "m" * 400,
            "adapter": ADAPTER.model_copy(update={"uri": long}),
            "checkpoint": CHECKPOINT.model_copy(update={"uri": long}),
        }
    )
    read = TerminationMessage.parse(sent.to_bytes())
    assert len(sent.to_bytes()) <= TERMINATION_MESSAGE_LIMIT_BYTES
    assert read is not None
    assert (read.checkpoint, read.adapter) == (None, None)
    assert (read.message, read.dataset, read.metrics) == (sent.message, DATASET, METRICS)


@pytest.mark.parametrize("room", [-100, 1, MESSAGE_ROOM_BYTES - 1])
def test_the_checkpoint_gives_way_before_the_adapter(room: int) -> None:
    adapter = ADAPTER.model_copy(update={"uri": "a" * 1900})
    sent = FULL.model_copy(update={"adapter": adapter, "message": "", "checkpoint": CheckpointResult(uri="", step=1)})
    checkpoint = CheckpointResult(uri="c" * (TERMINATION_MESSAGE_LIMIT_BYTES - len(sent.to_bytes()) - room), step=1)
    sent = sent.model_copy(update={"checkpoint": checkpoint, "message": "m" * 3000})
    read = TerminationMessage.parse(sent.to_bytes())
    assert read is not None
    assert (read.checkpoint, read.adapter) == (None, adapter)
    assert len(read.message) > MESSAGE_ROOM_BYTES


def test_what_fits_keeps_everything_however_tightly() -> None:
    sent = FULL.model_copy(update={"adapter": ADAPTER.model_copy(update={"uri": "a" * 1500})})
    room = TERMINATION_MESSAGE_LIMIT_BYTES - len(sent.to_bytes()) + len(CHECKPOINT.uri)
    sent = sent.model_copy(update={"checkpoint": CHECKPOINT.model_copy(update={"uri": "c" * room})})
    assert len(sent.to_bytes()) == TERMINATION_MESSAGE_LIMIT_BYTES
    assert TerminationMessage.parse(sent.to_bytes()) == sent


def test_a_checkpoint_that_leaves_room_for_the_sentence_stays() -> None:
    sent = FULL.model_copy(update={"message": "m" * 4096})
    read = TerminationMessage.parse(sent.to_bytes())
    assert read is not None
    assert (read.checkpoint, read.adapter) == (CHECKPOINT, ADAPTER)


@given(
    st.text(st.characters(), max_size=300).map(lambda text: text * 20),
    st.text(max_size=200).map(lambda text: text * 8),
    st.text(max_size=100).map(lambda text: text * 5),
    st.booleans(),
)
def test_any_message_fits_and_is_read_again(message: str, uri: str, model: str, succeeded: bool) -> None:
    sent = TerminationMessage(
        succeeded=succeeded,
        message=message,
        adapter=AdapterResult(uri=uri, base_model=model, sha256="0" * 64, size_bytes=0),
        dataset=DATASET,
        checkpoint=CheckpointResult(uri=uri, step=0),
    )
    data = sent.to_bytes()
    assert len(data) <= TERMINATION_MESSAGE_LIMIT_BYTES
    read = TerminationMessage.parse(data)
    assert read is not None
    assert (read.succeeded, read.dataset) == (succeeded, DATASET)
    assert bool(read.message) == bool(sent.message)


def test_a_lone_surrogate_in_a_file_name_does_not_silence_the_trainer() -> None:
    message = TerminationMessage(succeeded=False, message="\udcff.yaml does not exist.")
    assert json.loads(message.to_bytes())["message"] == "?.yaml does not exist."


def test_unknown_fields_are_dropped_so_that_old_readers_meet_new_writers() -> None:
    written = json.loads(FULL.to_bytes())
    written["energy"] = 1
    written["adapter"]["licence"] = {"name": "x"}
    written["metrics"]["bleu"] = 0.5
    assert TerminationMessage.parse(json.dumps(written)) == FULL


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Killed",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        FULL.to_bytes()[:60],
        b'{"succeeded": true, "version": 2}',
        b'{"succeeded": false, "reason": "Tired"}',
        b'{"succeeded": true, "rank": -1}',
        b'{"succeeded": true, "adapter": {"uri": "a"}}',
        '{"succeeded": "perhaps"}',
    ],
)
def test_another_programs_last_words_are_no_message(data: bytes | str) -> None:
    assert TerminationMessage.parse(data) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["train_loss", "eval_loss", "perplexity", "token_accuracy"])
def test_a_figure_that_is_no_number_is_never_sent(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        MetricsResult.model_validate({name: value})


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_figure_that_is_no_number_is_never_read(word: str) -> None:
    assert TerminationMessage.parse(f'{{"succeeded": true, "metrics": {{"trainLoss": {word}}}}}') is None


@pytest.mark.parametrize(
    ("result", "wrong"),
    [
        (ADAPTER, {"sha256": "0" * 63}),
        (ADAPTER, {"sha256": "G" * 64}),
        (ADAPTER, {"sizeBytes": -1}),
        (ADAPTER, {"format": "gguf"}),
        (DATASET, {"rows": -1}),
        (CHECKPOINT, {"step": -1}),
    ],
)
def test_a_result_out_of_bounds_is_refused(result: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        type(result).model_validate({**result.model_dump(), **wrong})


USERS = {reason for reason, code in EXIT_CODES.items() if code < FIRST_RETRYABLE_EXIT_CODE}


def test_every_reason_has_an_exit_code_of_its_own() -> None:
    assert set(EXIT_CODES) == set(Reason)
    assert len(set(EXIT_CODES.values())) == len(Reason)
    # 0-2 are success, Python's own and the shell's; 126 and 127 the shell's; a process's code is a byte.
    assert all(2 < code < 126 or 128 <= code <= 255 for code in EXIT_CODES.values())


def test_only_the_worlds_failures_are_tried_again() -> None:
    assert set(Reason) - USERS == {
        Reason.TERMINATED,
        Reason.HUB_UNAVAILABLE,
        Reason.STORAGE_UNAVAILABLE,
        Reason.PEER_FAILED,
        Reason.PACKS_TOO_LARGE,
        Reason.INTERNAL_ERROR,
    }
    assert all(is_retryable(code) == (reason not in USERS) for reason, code in EXIT_CODES.items())


@pytest.mark.parametrize(
    ("code", "retried"), [(0, False), (1, False), (127, False), (128, True), (137, True), (255, True)]
)
def test_an_exit_code_says_whether_to_try_again(code: int, retried: bool) -> None:
    assert is_retryable(code) is retried


def _status(**metrics: str) -> TrainerStatus:
    named = [Metric(name=name, value=value) for name, value in metrics.items()]
    return TrainerStatus(metrics=named, last_updated_time="2026-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("0.5", 0.5),
        ("0", 0.0),
        ("-1e-3", -0.001),
        ("nan", None),
        ("NaN", None),
        ("inf", None),
        ("-Infinity", None),
        ("1e999", None),
        ("", None),
        ("None", None),
        ("0.5 nats", None),
    ],
)
def test_a_metric_is_a_finite_number_or_absent(value: str, number: float | None) -> None:
    status = _status(loss=value)
    assert status.number("loss") == number
    assert status.text("loss") == value
    assert status.number("eval_loss") is None
    assert status.text("eval_loss") is None


def test_a_progress_report_is_read_as_kubeflows_callback_sends_it() -> None:
    body = {
        "trainerStatus": {
            "progressPercentage": 45,
            "estimatedRemainingSeconds": 120,
            "metrics": [{"name": "loss", "value": "0.4"}],
            "lastUpdatedTime": "2026-01-01T00:00:00Z",
            "somethingNew": True,
        }
    }
    status = ProgressReport.model_validate(body).trainer_status
    assert (status.progress_percentage, status.estimated_remaining_seconds) == (45, 120)
    assert status.number("loss") == 0.4
    del body["trainerStatus"]["somethingNew"]
    assert json.loads(ProgressReport(trainer_status=status).model_dump_json()) == body


@pytest.mark.parametrize(
    "wrong",
    [
        {"progressPercentage": 101},
        {"progressPercentage": -1},
        {"estimatedRemainingSeconds": -1},
        {"metrics": [{"name": "loss", "value": "0"}] * 257},
        {"metrics": [{"name": "n" * 129, "value": "0"}]},
        {"metrics": [{"name": "loss", "value": 0.5}]},
        {"lastUpdatedTime": None},
    ],
)
def test_a_progress_report_out_of_bounds_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainerStatus.model_validate({"lastUpdatedTime": "2026-01-01T00:00:00Z", **wrong})
