"""Checkpoints: what is damaged or has values that are no numbers is never gone on from, what is whole is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.checkpoint_files import ADAPTER
from finetune_trainer.train.state import adapter_state
from tests.trainer.checkpoints import save_checkpoint

RUN = {"seed": 1}


class Output:
    """An output with checkpoints of some steps; the adapter's one value is the step."""

    def __init__(self, folder: Path, losses: dict[int, float | None], keep: int = 9) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self.checkpoints = Checkpoints(LocalStore(folder / "out"), RUN, keep)
        for step, loss in losses.items():
            self.save(step, loss)

    def save(self, step: int, loss: float | None = None, value: float | None = None) -> None:
        save_checkpoint(self.checkpoints, self.folder / f"made-{step}", step, loss=loss, value=value)

    def file(self, step: int, name: str) -> Path:
        return self.folder / "out" / "checkpoints" / f"step-{step:08d}" / name

    def newest(self) -> int | None:
        found = self.checkpoints.newest(self.folder / "resume", self.warnings.append)
        assert (self.folder / "resume").exists() == (found is not None)
        if found is not None:
            assert load_file(self.folder / "resume" / ADAPTER)["a"].item() == found.step
        return found.step if found else None

    def best(self) -> int | None:
        found = self.checkpoints.best(self.folder / "best", self.warnings.append)
        return found.step if found else None

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.checkpoints.all()]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", [ADAPTER, "optimizer.pt"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    output = Output(tmp_path, {1: None, 2: None, 3: None})
    damage(output.file(3, name))
    assert output.newest() == 2
    assert len(output.warnings) == 1
    assert "step-00000003 is not used, because it is damaged" in output.warnings[0]
    # It would otherwise be kept as the newest, and those made again before it be pruned.
    assert output.steps() == [1, 2]


def test_what_a_killed_attempt_left_of_a_checkpoint_goes_with_the_next_one(tmp_path: Path) -> None:
    output = Output(tmp_path, {1: None, 2: None, 3: None, 5: None})
    output.file(1, "manifest.json").unlink()
    # Whoever wrote this manifest may be able to read it.
    output.file(2, "manifest.json").write_bytes(b'{"version": 2, "files": {}}')
    output.file(5, "manifest.json").unlink()
    output.save(4)
    folders = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert folders == [f"step-{step:08d}" for step in (2, 3, 4, 5)]


@pytest.mark.parametrize("content", [b"{}", b"{", b"", b"\xff\x00", b"[]", b'{"version": 2, "files": {}}'])
def test_a_checkpoint_whose_manifest_cannot_be_read_gives_way_with_a_warning(tmp_path: Path, content: bytes) -> None:
    output = Output(tmp_path, {1: None, 2: None})
    output.file(2, "manifest.json").write_bytes(content)
    assert output.newest() == 1
    (warning,) = output.warnings
    assert "step-00000002 is not used" in warning
    assert "manifest" in warning


def test_without_a_whole_checkpoint_the_run_begins_anew(tmp_path: Path) -> None:
    output = Output(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        cut(output.file(step, ADAPTER))
    assert output.newest() is None
    assert len(output.warnings) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_no_number_is_not_gone_on_from(tmp_path: Path, value: float) -> None:
    output = Output(tmp_path, {1: None})
    output.save(2, value=value)
    assert output.newest() == 1
    assert "no numbers" in output.warnings[0]


def test_a_damaged_best_checkpoint_is_not_published(tmp_path: Path) -> None:
    output = Output(tmp_path, {1: 0.5, 2: 0.3, 3: 0.4})
    flip(output.file(2, ADAPTER))
    assert output.best() == 3


def test_another_runs_checkpoint_is_refused_whole_or_not(tmp_path: Path) -> None:
    output = Output(tmp_path, {1: None})
    cut(output.file(1, ADAPTER))
    other = Checkpoints(LocalStore(tmp_path / "out"), {"seed": 2}, 1)
    with pytest.raises(JobError, match="seed was 1 and is now 2") as caught:
        other.newest(tmp_path / "resume", output.warnings.append)
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    assert output.steps() == [1]


def test_an_adapter_that_is_no_number_ends_the_run_and_names_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.zeros(2)}
    monkeypatch.setattr("finetune_trainer.train.state.adapter_tensors", lambda _model: tensors)
    assert adapter_state(None, 7) == tensors
    tensors["b"] = torch.tensor([1.0, torch.nan])
    with pytest.raises(JobError, match=r"After step 7 .*in b\), 1 of its 2 tensors: lower learning_rate") as caught:
        adapter_state(None, 7)
    assert caught.value.reason is Reason.LOSS_DIVERGED
