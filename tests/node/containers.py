"""Container images made on this machine alone: a Debian base, ours from their Containerfiles, and the node's own.

Layers are kept in the cache, so that a second run builds what has changed and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from examples.safety.base_model import cache_dir
from tests.node.debian import MachineError
from tests.tools.build import binary

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-dev", "python3-venv")
"""What python:3.12-slim has, too, and the Containerfiles rely on."""
BASE = f"localhost/python-{SUITE}:1"
PAUSE = "localhost/pause:1"
"""Holds a pod's network; a node cannot pull the usual one here."""
TRAINING_OPERATOR = "localhost/training-operator:v1.9.4"
OPERATOR = "localhost/finetune-operator:0.1.0"
TRAINER = "localhost/finetune-trainer:0.1.0"
CERTIFICATES = Path("/etc/ssl/certs")


class Images:
    """Builds images and hands them out as archives."""

    def __init__(self, log: Path) -> None:
        """Images of the cache.

        Args:
            log: takes what the builds say.
        """
        self.log = log
        self._storage = cache_dir() / "containers"
        self._storage.mkdir(parents=True, exist_ok=True)
        # What holds until the machine is started anew.
        self._options = ["--root", str(self._storage / "root"), "--runroot", "/run/finetune-containers"]

    names = (PAUSE, TRAINING_OPERATOR, OPERATOR, TRAINER)
    """What `build_all` makes."""

    def build_all(self) -> None:
        """Build what a node with the operator needs.

        Raises:
            MachineError: a build failed; the text holds the end of what it said.
        """
        self._ensure_base()
        self._from_files(PAUSE, BASE, {}, ["/usr/bin/sleep", "infinity"])
        manager = binary("training-operator.v1")
        self._from_files(TRAINING_OPERATOR, "scratch", {manager: "/manager"}, ["/manager"])
        self._build_ours()

    @contextmanager
    def archive(self, name: str) -> Iterator[Path]:
        """The image as a file that `ctr image import` takes, as long as this lasts."""
        with tempfile.TemporaryDirectory(dir=self._storage) as folder:
            path = Path(folder) / "image.tar"
            self.buildah("push", "--quiet", name, f"docker-archive:{path}:{name}")
            yield path

    @contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """The image's files, as long as this lasts."""
        container = self.buildah("from", name).strip()
        try:
            yield Path(self.buildah("mount", container).strip())
        finally:
            self.buildah("rm", container)

    def buildah(self, *arguments: str | Path) -> str:
        """Output of a buildah command.

        Raises:
            MachineError: it failed.
        """
        return self._run(["buildah", *self._options, *map(str, arguments)])

    def _ensure_base(self) -> None:
        if self._has(BASE):
            return
        with tempfile.TemporaryDirectory(dir=self._storage) as name:
            folder = Path(name) / "root"
            self._run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(folder)])
            shutil.rmtree(folder / "var" / "cache" / "apt", ignore_errors=True)
            self._from_files(BASE, "scratch", {folder: "/"}, ["/bin/sh"], user="0")

    def _from_files(
        self, name: str, base: str, files: dict[Path, str], command: Sequence[str], *, user: str = "65532:65532"
    ) -> None:
        """An image of `base` with files, which runs `command`."""
        if self._has(name) and not files:
            return
        container = self.buildah("from", base).strip()
        try:
            for source, target in files.items():
                self.buildah("copy", "--quiet", container, source, target)
            words = ", ".join(f'"{word}"' for word in command)
            self.buildah("config", "--entrypoint", f"[{words}]", "--cmd", "", "--user", user, container)
            self.buildah("commit", "--quiet", container, name)
        finally:
            self.buildah("rm", container)

    def _build_ours(self) -> None:
        """Both, by the script that users call."""
        options = ["--build-arg", f"BASE_IMAGE={BASE}", "--network", "host"]
        # The environment that runs the tests holds most of the same wheels.
        downloads = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
        if downloads.is_dir():
            options += ["--volume", f"{downloads}:/root/.cache/uv"]
        if os.environ.get("SSL_CERT_FILE"):
            # Behind a proxy with a certificate authority of its own.
            options += ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
            bundle = CERTIFICATES / "ca-certificates.crt"
            options += [word for name in ("PIP_CERT", "SSL_CERT_FILE") for word in ("--build-arg", f"{name}={bundle}")]
        environment = {
            "CONTAINER_TOOL": "buildah",
            "REGISTRY": "localhost",
            "BUILDAH_OPTIONS": " ".join(self._options),
        }
        self._run([str(ROOT / "scripts" / "images.sh"), *options], environment)

    def _has(self, name: str) -> bool:
        return bool(self.buildah("images", "--quiet", "--filter", f"reference={name}").strip())

    def _run(self, command: list[str], environment: dict[str, str] | None = None) -> str:
        settings = {"STORAGE_DRIVER": "overlay", "BUILDAH_ISOLATION": "chroot", **(environment or {})}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=log, text=True
            )
            log.write(done.stdout)
        if done.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise MachineError(f"{' '.join(command[:4])} … failed; {self.log} ends with:\n{tail}")
        return done.stdout
