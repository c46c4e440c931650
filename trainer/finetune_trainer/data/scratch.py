"""Folders that are being filled, and the end of those whose maker was killed.

A maker holds a lock on a file in its folder for as long as it lives, whatever ends it. Where a file system has no
locks, folders of killed makers stay.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".tokenizing-"
_OWNER = ".owner"


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A folder in `cache` that is gone after the block, unless it was renamed; its lock ends with the block.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache))
    try:
        # Locked before it has its name: nobody may find it without a lock and think that its maker is gone.
        with (folder / f"{_OWNER}.new").open("w") as owner:
            with suppress(OSError):
                fcntl.flock(owner, fcntl.LOCK_EX)
            Path(owner.name).rename(folder / _OWNER)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def release(folder: Path) -> None:
    """Take out of a scratch folder what is not its content."""
    (folder / _OWNER).unlink()


def sweep(cache: Path) -> None:
    """Remove the scratch folders in `cache` whose makers are gone; whatever cannot be removed stays."""
    for folder in cache.glob(f"{_PREFIX}*"):
        with suppress(OSError), (folder / _OWNER).open("r+") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
