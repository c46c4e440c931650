"""Last words between trainer and operator: whatever arrives is read without a fall, believed only where it is whole and
agrees with itself, and what we write ourselves is read exactly.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.outcome import (
    EXIT_CODES,
    TERMINATION_MESSAGE_LIMIT_BYTES,
    AdapterResult,
    CheckpointResult,
    DatasetResult,
    MetricsResult,
    Reason,
    TerminationMessage,
    VerifiedResult,
    is_retryable,
)
from finetune_api.status import FineTuneJobStatus
from finetune_api.verification import VerificationMessage
from finetune_operator.names import REPLICA_INDEX_LABEL
from finetune_operator.policy.decide import decide
from finetune_operator.policy.failure_reason import Verdict, judge
from finetune_operator.policy.observed import PodView, read_pod
from finetune_trainer.launch.failures import exit_code, last_words
from tests.operator.policy.views import ADAPTER, NOW, PATIENCE, WORKERS_UID, observed, pytorch_job, success

LIMIT = TERMINATION_MESSAGE_LIMIT_BYTES
whole = st.integers(0, 2**53)
figure = st.floats(allow_nan=False, allow_infinity=False)
digest = st.text("0123456789abcdef", min_size=64, max_size=64)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Or nothing."""
    return st.none() | strategy


verified = st.builds(
    VerifiedResult,
    tensors=st.integers(1, 2**53),
    moved_tensors=st.integers(1, 2**53),
    rows=whole,
    difference_from_training=maybe(figure),
    difference_from_base=maybe(figure),
)
adapters = st.builds(
    AdapterResult,
    uri=st.text(min_size=1, max_size=60),
    base_model=st.text(min_size=1, max_size=20),
    base_model_revision=maybe(st.text(max_size=20)),
    sha256=digest,
    size_bytes=whole,
    targets=maybe(st.text(max_size=20)),
    verified=maybe(verified),
)
datasets = st.builds(
    DatasetResult,
    rows=whole,
    trainable_tokens=whole,
    truncated_rows=whole,
    dropped_rows=whole,
    invalid_rows=whole,
    retokenized_rows=whole,
    sha256=maybe(digest),
)
metrics = st.builds(
    MetricsResult,
    train_loss=maybe(figure),
    eval_loss=maybe(figure),
    perplexity=maybe(figure),
    token_accuracy=maybe(figure),
)
checkpoints = st.builds(CheckpointResult, uri=st.text(min_size=1, max_size=60), step=whole)
parts = {
    "message": st.text(max_size=80),
    "rank": maybe(whole),
    "dataset": maybe(datasets),
    "metrics": maybe(metrics),
    "checkpoint": maybe(checkpoints),
}
succeeded = st.builds(TerminationMessage, succeeded=st.just(True), adapter=maybe(adapters), **parts)
failed = st.builds(
    TerminationMessage,
    succeeded=st.just(False),
    reason=maybe(st.sampled_from(Reason)),
    collateral=st.booleans(),
    **parts,
)
messages = succeeded | failed

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
FIELDS = [*TerminationMessage.model_fields, "uri", "sha256", "sizeBytes", "baseModel", "step", "verified"]
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner),
    max_leaves=15,
)
codes = st.none() | st.integers(-300, 600) | st.sampled_from([*EXIT_CODES.values(), 0, 137, 143, -(2**31), 2**31])
texts = st.one_of(
    st.binary(max_size=200).map(lambda data: data.decode(errors="replace")),
    st.text(st.characters(), max_size=200),
    anything.map(json.dumps),
    st.dictionaries(st.sampled_from(FIELDS), anything).map(json.dumps),
    messages.map(lambda message: message.to_bytes().decode()),
    st.tuples(messages, st.integers(0, 600)).map(lambda cut: cut[0].to_bytes().decode()[: cut[1]]),
)


def spoke(text: str, code: int | None, index: int = 0, reason: str = "Error") -> PodView:
    """A worker's pod that ended with that text and code."""
    ended = {"exitCode": code, "reason": reason, "message": text}
    return read_pod(
        {
            "metadata": {
                "name": "p",
                "uid": "u",
                "labels": {REPLICA_INDEX_LABEL: str(index)},
                "ownerReferences": [{"uid": WORKERS_UID}],
            },
            "status": {
                "phase": "Succeeded" if code == 0 else "Failed",
                "containerStatuses": [{"name": "pytorch", "state": {"terminated": ended}}],
            },
        }
    )


def judged(*pods: PodView) -> Verdict:
    """What the operator makes of it."""
    made = judge(pytorch_job(nodes=len(pods)), pods, now=NOW, group_end_seconds=30)
    assert isinstance(made, Verdict)
    return made


@given(messages)
def test_what_a_trainer_writes_the_operator_reads_exactly(sent: TerminationMessage) -> None:
    data = sent.to_bytes()
    assert len(data) <= LIMIT
    assert TerminationMessage.parse(data) == TerminationMessage.parse(data.decode()) == sent
    assert spoke(data.decode(), 0).last_words == sent


@given(st.sampled_from([None, True, False]), st.text(max_size=200))
def test_a_verdict_is_read_exactly(said: bool | None, message: str) -> None:
    sent = VerificationMessage(verified=said, message=message)
    assert VerificationMessage.parse(sent.to_bytes()) == sent


@given(
    messages | st.builds(VerificationMessage, verified=st.none() | st.booleans(), message=st.text(max_size=60)),
    st.data(),
)
def test_of_a_text_that_was_cut_off_nothing_but_words_is_missing(
    sent: TerminationMessage | VerificationMessage, draw: st.DataObject
) -> None:
    """A kubelet keeps less where somebody adds containers to the pod; it counts bytes and not characters."""
    whole = sent.to_bytes()
    kept = draw.draw(st.integers(0, len(whole) - 1))
    read = type(sent).parse(whole[:kept])
    assert read == type(sent).parse(whole[:kept].decode(errors="replace"))
    assert (read is not None) == (whole.rindex(b'"message":"') + len(b'"message":"') <= kept)
    if read is not None:
        assert read.model_copy(update={"message": ""}) == sent.model_copy(update={"message": ""})
        assert read == sent or (read.message.endswith("…") and sent.message.startswith(read.message[:-1]))


@pytest.mark.parametrize("escape", ["\\", "\\u", "\\u0", "\\u00", "\\u000"])
def test_half_an_escape_is_no_word(escape: str) -> None:
    text = '{"version":1,"succeeded":false,"reason":"DataInvalid","collateral":false,"message":"Row 7\\n' + escape
    read = TerminationMessage.parse(text)
    assert read is not None
    assert (read.reason, read.message) == (Reason.DATA_INVALID, "Row 7\n…")


@pytest.mark.parametrize(
    "text",
    [
        # An older trainer wrote its sentence before the rest, so more than words may be lost.
        '{"version":1,"succeeded":false,"reason":"PeerFailed","message":"It was ano',
        '{"message":"It was ano',
        '{"version":1,"succeeded":true,"collateral":false,"adapter":{"message":"s3://mod',
        '{"version":2,"succeeded":false,"collateral":false,"message":"From the fut',
        '{"version":1,"succeeded":false,"collateral":false,"message":"Whole.","rank":',
        # More than any kubelet passes on.
        '{"version":1,"succeeded":false,"collateral":false,"message":"' + "x" * LIMIT,
    ],
)
def test_where_more_than_words_may_be_lost_nothing_is_believed(text: str) -> None:
    assert TerminationMessage.parse(text) is None


@pytest.mark.parametrize(
    "said",
    [
        {"succeeded": "yes"},
        {"succeeded": 1},
        {"succeeded": "true"},
        {"succeeded": False, "collateral": "no"},
        {"succeeded": False, "rank": "3"},
        {"succeeded": False, "rank": 3.0},
        {"succeeded": True, "version": "1"},
        {"succeeded": True, "version": 2},
        {"succeeded": True, "version": None},
        # It contradicts itself.
        {"succeeded": True, "reason": "DataInvalid"},
        {"succeeded": True, "collateral": True},
    ],
)
def test_what_no_trainer_of_ours_says_is_not_believed(said: dict[str, Any]) -> None:
    assert TerminationMessage.parse(json.dumps(said)) is None


@pytest.mark.parametrize("said", [{"verified": "yes"}, {"verified": 1}, {"verified": 0}, {"verified": "false"}])
def test_nor_is_such_a_verdict(said: dict[str, Any]) -> None:
    assert VerificationMessage.parse(json.dumps(said)) is None


@given(st.binary(max_size=5000) | texts)
@example(b'{"succeeded":' + b"[" * 4000)
@example("\ud800")
@example(b"\xef\xbb\xbf{}")
@example('{"succeeded": ' + "9" * 4000 + "}")
def test_no_text_is_too_odd_to_be_read(data: bytes | str) -> None:
    for kind in (TerminationMessage, VerificationMessage):
        read = kind.parse(data)
        if read is not None:
            assert kind.parse(read.to_bytes()) is not None


@given(st.lists(st.tuples(texts, codes), min_size=1, max_size=3))
def test_no_ends_are_too_odd_to_be_judged(ends: list[tuple[str, int | None]]) -> None:
    pods = [spoke(text, code, index) for index, (text, code) in enumerate(ends)]
    verdict = judged(*pods)
    assert verdict.message
    assert verdict.exit_code is None or 0 <= verdict.exit_code <= 255
    if verdict.succeeded:
        # Never without the whole word of rank 0 about an adapter.
        assert pods[0].last_words is not None
        assert pods[0].last_words.succeeded
        assert pods[0].last_words.adapter is not None
    status = FineTuneJobStatus(attempt=1)
    made = decide(observed(status, pytorch_job(nodes=len(pods)), pods), NOW, PATIENCE).status
    body = made.model_dump(mode="json", by_alias=True)
    assert FineTuneJobStatus.model_validate(json.loads(json.dumps(body))) == made


def agrees(words: TerminationMessage, code: int) -> bool:
    """Whether the launcher could have ended with that code after such words, or been killed after them."""
    killed = 128 < code <= 192
    if words.succeeded:
        return code == 0
    wanted = exit_code(words)
    return code != 0 and (is_retryable(code) == is_retryable(wanted) or killed)


sure = failed.map(
    lambda words: words.model_copy(
        update={
            "collateral": False,
            "reason": words.reason
            if words.reason not in (None, Reason.TERMINATED, Reason.PEER_FAILED)
            else Reason.DATA_INVALID,
        }
    )
)


@given(sure, codes.map(lambda code: code or 0))
@example(TerminationMessage(succeeded=False, reason=Reason.DATA_INVALID), 128)
@example(TerminationMessage(succeeded=False, reason=Reason.DATA_INVALID), 192)
@example(TerminationMessage(succeeded=False, reason=Reason.DATA_INVALID), 193)
def test_words_that_the_exit_code_does_not_bear_out_are_said_to_be_so(words: TerminationMessage, code: int) -> None:
    verdict = judged(spoke(words.to_bytes().decode(), code))
    assert not verdict.succeeded
    assert (verdict.reason, verdict.retryable) == (words.reason, is_retryable(exit_code(words)))
    said = f"(Its container ended with exit code {code}, which says otherwise.)"
    assert (said in verdict.message) is not agrees(words, code)


@given(codes)
def test_an_adapter_is_one_although_its_container_ended_badly(code: int | None) -> None:
    verdict = judged(spoke(success().to_bytes().decode(), code))
    assert verdict.succeeded
    said = f" (Its container ended with exit code {code}, which says otherwise.)" if code else ""
    assert verdict.message == f"The adapter is at {ADAPTER.uri}.{said}"


@given(codes)
def test_a_success_without_an_adapter_is_none(code: int | None) -> None:
    words = TerminationMessage(succeeded=True, message="Fine.")
    verdict = judged(spoke(words.to_bytes().decode(), code))
    assert not verdict.succeeded
    if code == 0:
        assert verdict.reason == "ResultMissing"
    else:
        assert (verdict.reason, "but named no adapter" in verdict.message) == ("TrainerCrashed", True)


@given(codes)
def test_silence_is_judged_by_the_exit_code_alone(code: int | None) -> None:
    verdict = judged(spoke("", code))
    assert not verdict.succeeded
    assert verdict.retryable is (code is None or code == 0 or is_retryable(code))
    assert verdict.counted


@pytest.mark.parametrize("code", [-(2**31), -9, -1, 128, 255, 256, 2**31])
def test_a_code_that_no_program_gives_is_the_worlds(code: int) -> None:
    assert is_retryable(code)


class OddError(Exception):
    """Whose text is anything."""


@given(st.text(st.characters(), max_size=6000), st.integers(0, 9), st.integers(1, 4))
def test_whatever_ends_a_trainer_arrives(text: str, rank: int, world_size: int) -> None:
    words = last_words(OddError(text), rank=rank, world_size=world_size, environ={"HF_TOKEN": "hf_secret_secret"})
    read = TerminationMessage.parse(words.to_bytes())
    assert read is not None
    assert (read.reason, read.rank, read.collateral) == (words.reason, rank, words.collateral)
    verdict = judged(spoke(words.to_bytes().decode(), exit_code(words)))
    assert verdict.retryable is is_retryable(exit_code(words))
    assert "says otherwise" not in verdict.message
