"""What killed tokenizations leave behind is removed, what others work on is not, and damage is made good."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finetune_trainer.data.dataset import DataSource, prepare
from finetune_trainer.data.scratch import scratch_folder, sweep
from finetune_trainer.data.tokenized_data import DAMAGED, TokenizedData
from tests.real_tokenizers import smollm2
from tests.trainer.data.test_dataset import source
from tests.trainer.run.tiny_job import CHATML, rows, write_rows

MAKER = """
import sys, pathlib
from finetune_trainer.data.scratch import scratch_folder
with scratch_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "ids.bin").write_bytes(bytes(100))
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_killed_makers_folder_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    (tmp_path / ".tokenizing-older").mkdir()
    with (
        scratch_folder(tmp_path) as mine,
        subprocess.Popen(
            [sys.executable, "-c", MAKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as maker,
    ):
        assert maker.stdout is not None
        theirs = Path(maker.stdout.readline().strip())
        sweep(tmp_path)
        assert (theirs / "ids.bin").is_file()
        assert mine.is_dir()
        maker.send_signal(signal.SIGKILL)
        maker.wait()
        sweep(tmp_path)
        assert not theirs.exists()
        assert mine.is_dir()
    # Whose it is nobody can tell.
    assert [path.name for path in tmp_path.iterdir()] == [".tokenizing-older"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(bytes(8))


def zero(file: Path) -> None:
    whole = np.load(file)
    np.save(file, np.zeros_like(whole))


FILES = ("ids.bin", "trained.bin", "sequences.npy", "trained.npy", "rows.npy", "lines.npy", "stats.json")
DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    *((name, damage) for name in FILES for damage in (cut, Path.unlink)),
    ("ids.bin", grow),
    ("trained.bin", grow),
    ("sequences.npy", zero),
    ("rows.npy", zero),
    ("stats.json", lambda file: file.write_text("{}")),
    ("stats.json", lambda file: file.write_text('{"rows": 1, "unknown": 2}')),
    ("stats.json", lambda file: file.write_text("[]")),
    ("lines.npy", lambda file: np.save(file, np.zeros(3))),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """20 rows."""
    folder = tmp_path_factory.mktemp("data")
    return source(write_rows(folder / "train.jsonl", rows(20)), smollm2(), CHATML)


def test_damage_of_every_file_is_noticed(data: DataSource, tmp_path: Path) -> None:
    folder = prepare(data, tmp_path / "cache").folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(whole) == sorted(FILES)
    for name, damage in DAMAGE:
        damage(folder / name)
        with pytest.raises(DAMAGED):
            TokenizedData(folder)
        (folder / name).write_bytes(whole[name])
    assert len(TokenizedData(folder)) == 20


def test_damaged_data_are_made_again(data: DataSource, tmp_path: Path) -> None:
    folder = prepare(data, tmp_path / "cache").folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    cut(folder / "ids.bin")
    assert len(prepare(data, tmp_path / "cache")) == 20
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert list((tmp_path / "cache").iterdir()) == [folder]
