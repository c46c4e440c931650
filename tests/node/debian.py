"""What a bare Debian machine lacks of a node's programs, installed when the tests run as root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

PROGRAMS: Mapping[str, str] = {
    "buildah": "buildah",
    "conntrack": "conntrack",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "iptables": "iptables",
    "modprobe": "kmod",
    "nsenter": "util-linux",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
"""Program -> its Debian package."""


class MachineError(RuntimeError):
    """This machine cannot be a node; the text says what it lacks."""


def ensure_programs() -> None:
    """Install what is missing.

    Raises:
        MachineError: this is not root, or no Debian, or a package cannot be installed.
    """
    if os.geteuid() != 0:
        raise MachineError("A real node needs root: run `make e2e` as root.")
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise MachineError(f"A real node needs {', '.join(missing)}: install them, or run this on Debian.")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    options = ["--quiet=2", "--yes", "--no-install-recommends"]
    for command in (["apt-get", "--quiet=2", "update"], ["apt-get", *options, "install", *missing]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise MachineError(f"{', '.join(missing)} cannot be installed:\n{done.stdout}{done.stderr}")
