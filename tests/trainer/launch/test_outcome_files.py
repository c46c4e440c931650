"""What ranks leave for the launcher, and what the kernel knows of their end."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.outcome import Reason, TerminationMessage
from finetune_trainer.launch import outcome_files
from finetune_trainer.launch.memory_events import oom_kills

FAILED = TerminationMessage(succeeded=False, reason=Reason.DATA_INVALID, message="m", rank=11)


def test_a_rank_that_started_is_known_even_when_it_said_nothing(tmp_path: Path) -> None:
    assert not outcome_files.any_started(tmp_path)
    for rank in (2, 11):
        outcome_files.mark_started(tmp_path, rank)
    outcome_files.write_outcome(tmp_path, 11, FAILED)
    assert outcome_files.any_started(tmp_path)
    records = outcome_files.read_all(tmp_path)
    assert {rank: record.outcome for rank, record in records.items()} == {2: None, 11: FAILED}
    assert records[2].written_at is None
    assert records[11].written_at is not None


def test_the_first_words_stay(tmp_path: Path) -> None:
    outcome_files.write_outcome(tmp_path, 0, FAILED)
    outcome_files.write_outcome(tmp_path, 0, TerminationMessage(succeeded=True))
    assert outcome_files.read_all(tmp_path)[0].outcome == FAILED
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.json"]


@pytest.mark.parametrize("text", ["", "{", "not JSON", '{"succeeded": "perhaps"}'])
def test_what_is_no_message_counts_as_silence(text: str, tmp_path: Path) -> None:
    outcome_files.mark_started(tmp_path, 0)
    (tmp_path / "rank-0.json").write_text(text)
    (tmp_path / "elastic").mkdir()
    assert outcome_files.read_all(tmp_path) == {0: outcome_files.RankRecord(outcome=None, written_at=None)}


@pytest.mark.parametrize(
    ("cgroup", "events", "kills"),
    [
        ("0::/\n", {"memory.events": "low 0\noom 1\noom_kill 2\n"}, 2),
        ("0::/user.slice/app\n", {"user.slice/app/memory.events": "oom_kill 0\n"}, 0),
        ("4:memory:/pod\n0::/\n", {}, None),
        ("4:memory:/pod\n", {"memory.events": "oom_kill 2\n"}, None),
        ("0::/\n", {"memory.events": "low 0\n"}, None),
    ],
    ids=["a pod", "a laptop", "the root cgroup", "cgroup v1", "an old kernel"],
)
def test_the_kernel_s_count_of_out_of_memory_kills(
    cgroup: str, events: dict[str, str], kills: int | None, tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, text in events.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert oom_kills(tmp_path / "proc", tmp_path / "cgroup") == kills
