"""Which end is the cause: every kind of end against every other, and what a stop makes of them."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.outcome import EXIT_CODES, CheckpointResult, Reason, TerminationMessage, is_retryable
from finetune_trainer.launch.root_cause import RankEnd, conclude

CHECKPOINT = CheckpointResult(uri="/out/checkpoints/step-00000007", step=7)


def said(reason: Reason, *, checkpoint: CheckpointResult | None = None) -> TerminationMessage:
    collateral = reason is Reason.PEER_FAILED
    return TerminationMessage(
        succeeded=False, reason=reason, message=f"{reason}.", collateral=collateral, checkpoint=checkpoint
    )


def end(
    rank: int, what: Reason | int | None, *, at: float = 100.0, checkpoint: CheckpointResult | None = None
) -> RankEnd:
    """An end with last words (a reason), or in silence with an exit code."""
    if isinstance(what, Reason):
        return RankEnd(rank, EXIT_CODES[what], said(what, checkpoint=checkpoint), at)
    return RankEnd(rank, what, None, at)


def success(rank: int, code: int = 0) -> RankEnd:
    return RankEnd(rank, code, TerminationMessage(succeeded=True, rank=rank), 100.0)


# In each pair the first end is the cause, although it comes last.
OUTWEIGHS: dict[str, tuple[Reason | int, Reason | int]] = {
    "the user's error, a full store": (Reason.DATA_INVALID, Reason.STORAGE_UNAVAILABLE),
    "the user's error, a bug": (Reason.DATA_INVALID, Reason.INTERNAL_ERROR),
    "the user's error, a kill": (Reason.DATA_INVALID, -signal.SIGKILL),
    "the user's error, a peer failure": (Reason.DATA_INVALID, Reason.PEER_FAILED),
    "the hub, a kill": (Reason.HUB_UNAVAILABLE, -signal.SIGKILL),
    "a kill, a bug: the bug may be an echo nobody recognised": (-signal.SIGKILL, Reason.INTERNAL_ERROR),
    "a segmentation fault, a peer failure": (-signal.SIGSEGV, Reason.PEER_FAILED),
    "a bug, the peer's abort": (Reason.INTERNAL_ERROR, -signal.SIGABRT),
    "a silent exit, the peer's abort": (3, -signal.SIGABRT),
    "a silent exit with 0, a peer failure": (0, Reason.PEER_FAILED),
    "a bug, a peer failure": (Reason.INTERNAL_ERROR, Reason.PEER_FAILED),
    "a bug, the launcher's SIGTERM to a survivor": (Reason.INTERNAL_ERROR, Reason.TERMINATED),
    "an abort, the launcher's SIGTERM to a survivor": (-signal.SIGABRT, -signal.SIGTERM),
    "a peer failure, a survivor stopped in silence": (Reason.PEER_FAILED, -signal.SIGTERM),
}


@pytest.mark.parametrize(("cause", "echo"), OUTWEIGHS.values(), ids=OUTWEIGHS)
@pytest.mark.parametrize("cause_rank", [0, 1])
def test_the_cause_outweighs_its_echo(cause: Reason | int, echo: Reason | int, cause_rank: int) -> None:
    verdict = conclude([end(1 - cause_rank, echo, at=100.0), end(cause_rank, cause, at=101.0)])
    assert verdict == conclude([end(cause_rank, cause, at=101.0)])


@pytest.mark.parametrize(("reason", "code"), EXIT_CODES.items())
def test_last_words_decide_the_exit_code(reason: Reason, code: int) -> None:
    """Whatever became of the process afterwards: communication libraries abort while they shut down."""
    for process_code in (code, -signal.SIGABRT, 1, 0, None):
        verdict = conclude([RankEnd(0, process_code, said(reason), 100.0)])
        assert (verdict.message.reason, verdict.exit_code) == (reason, code)


SILENT: dict[str, tuple[int | None, int, int, Reason, str]] = {
    "kill -9": (-signal.SIGKILL, 0, 137, Reason.INTERNAL_ERROR, "most likely for want of memory"),
    "the out-of-memory killer": (
        -signal.SIGKILL,
        1,
        EXIT_CODES[Reason.OUT_OF_MEMORY],
        Reason.OUT_OF_MEMORY,
        "was ended by the kernel's out-of-memory killer",
    ),
    "a segmentation fault while something else ran out of memory": (
        -signal.SIGSEGV,
        1,
        139,
        Reason.INTERNAL_ERROR,
        "ended by SIGSEGV",
    ),
    "a signal without a name": (-signal.SIGRTMIN - 1, 0, 128 + signal.SIGRTMIN + 1, Reason.INTERNAL_ERROR, "signal 35"),
    "exit 1": (1, 0, EXIT_CODES[Reason.INTERNAL_ERROR], Reason.INTERNAL_ERROR, "exit code 1"),
    "exit 0": (0, 0, EXIT_CODES[Reason.INTERNAL_ERROR], Reason.INTERNAL_ERROR, "exit code 0"),
}


@pytest.mark.parametrize(("code", "oom_kills", "exit_code", "reason", "says"), SILENT.values(), ids=SILENT)
def test_an_end_without_last_words_gets_a_sentence(
    code: int | None, oom_kills: int, exit_code: int, reason: Reason, says: str
) -> None:
    verdict = conclude([end(3, code)], oom_kills=oom_kills)
    assert (verdict.exit_code, verdict.message.reason) == (exit_code, reason)
    assert says in verdict.message.message
    assert "Rank 3" in verdict.message.message


def test_among_equals_the_first_is_the_cause() -> None:
    ends = [end(0, Reason.DATA_INVALID, at=101.0), end(1, Reason.CONTEXT_TOO_LONG, at=100.5)]
    assert conclude(ends).message.reason is Reason.CONTEXT_TOO_LONG


def test_a_kill_long_after_the_first_end_is_the_launcher_s_own() -> None:
    hung, crashed = end(0, -signal.SIGKILL, at=130.0), end(1, -signal.SIGABRT, at=100.0)
    assert conclude([hung, crashed]).exit_code == 128 + signal.SIGABRT
    prompt = end(0, -signal.SIGKILL, at=101.0)
    assert conclude([prompt, crashed]).exit_code == 128 + signal.SIGKILL


@pytest.mark.parametrize(("grace_seconds", "seconds"), [(25.0, 24.1), (3.0, 2.1), (1.0, 1.5), (600.0, 599.0)])
def test_a_rank_that_hung_until_its_grace_was_over_was_not_killed_from_outside(
    grace_seconds: float, seconds: float
) -> None:
    ends = [end(0, Reason.PEER_FAILED, at=100.0), end(1, -signal.SIGKILL, at=100.0 + seconds)]
    assert conclude(ends, grace_seconds=grace_seconds).message.reason is Reason.PEER_FAILED


def test_a_kill_soon_after_another_s_end_is_the_cause_however_long_the_grace() -> None:
    ends = [end(0, Reason.PEER_FAILED, at=100.5), end(1, -signal.SIGKILL, at=100.0)]
    assert all(conclude(ends, grace_seconds=grace).exit_code == 128 + signal.SIGKILL for grace in (1.0, 25.0, 600.0))


def test_rank_0_s_success_is_the_attempt_s() -> None:
    """The adapter is published whole by then."""
    for other in (end(1, -signal.SIGKILL), end(1, Reason.PEER_FAILED), success(1, -signal.SIGABRT)):
        assert conclude([success(0, -signal.SIGABRT), other]).exit_code == 0
    assert conclude([success(0)], stopped_by="SIGTERM").exit_code == 0


def test_another_node_succeeds_only_with_all_its_ranks() -> None:
    assert conclude([success(8), success(9)]).exit_code == 0
    assert conclude([success(8), end(9, Reason.INTERNAL_ERROR)]).exit_code == EXIT_CODES[Reason.INTERNAL_ERROR]
    assert conclude([end(8, Reason.PEER_FAILED), success(9)]).message.collateral


def test_a_stop_reports_the_checkpoint_that_was_saved() -> None:
    ends = [end(0, Reason.TERMINATED, checkpoint=CHECKPOINT), end(1, Reason.TERMINATED), end(2, None)]
    verdict = conclude(ends, stopped_by="SIGTERM")
    assert (verdict.exit_code, verdict.message.checkpoint) == (143, CHECKPOINT)


@pytest.mark.parametrize("what", [None, -signal.SIGKILL, Reason.INTERNAL_ERROR, Reason.PEER_FAILED, 1])
def test_a_stop_explains_what_follows_from_it(what: Reason | int | None) -> None:
    """Data loaders that were stopped, peers that went away: after a stop, nothing of that is the cause."""
    verdict = conclude([end(0, what), end(1, what)], stopped_by="SIGTERM")
    assert (verdict.exit_code, verdict.message.reason) == (143, Reason.TERMINATED)
    assert "before it saved a checkpoint" in verdict.message.message


def test_a_user_s_error_found_during_a_stop_is_still_told() -> None:
    verdict = conclude([end(0, Reason.TERMINATED), end(1, Reason.DATA_INVALID)], stopped_by="SIGTERM")
    assert verdict.message.reason is Reason.DATA_INVALID


def test_a_survivor_s_checkpoint_is_kept_with_the_cause() -> None:
    ends = [end(0, Reason.PEER_FAILED, checkpoint=CHECKPOINT), end(1, -signal.SIGSEGV)]
    assert conclude(ends).message.checkpoint == CHECKPOINT


KINDS: list[Reason | int | None] = [*Reason, None, 0, 1, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT]


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    times=st.lists(st.integers(0, 60), min_size=6, max_size=6),
    stopped_by=st.sampled_from([None, "SIGTERM"]),
    data=st.data(),
)
def test_a_failure_always_has_a_sentence_and_the_order_of_ends_never_matters(
    kinds: list[Reason | int | None], times: list[int], stopped_by: str | None, data: st.DataObject
) -> None:
    ends = [end(rank, kind, at=float(at)) for rank, (kind, at) in enumerate(zip(kinds, times, strict=False))]
    verdict = conclude(ends, stopped_by=stopped_by)
    assert verdict == conclude(data.draw(st.permutations(ends)), stopped_by=stopped_by)
    assert not verdict.message.succeeded
    assert verdict.exit_code != 0
    assert verdict.message.message.endswith(".")
    if not any(isinstance(kind, Reason) for kind in kinds):
        assert is_retryable(verdict.exit_code), "only last words make it the user's failure"
