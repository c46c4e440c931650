"""Why a container could not be started: its image has no such program, or its node is broken.

Kubelet and runtime have one word for both, and only the runtime's sentence tells more. The first comes back with every
attempt; the second (a GPU driver that does not load, a mount that hangs) may not on another node.
"""

from __future__ import annotations

import re

NEVER_STARTED = ("ContainerCannotRun", "StartError", "RunContainerError")
"""The kubelet's words for a command that could not be run at all."""

# As runc, crun and gVisor say it.
_NO_PROGRAM = re.compile(
    r"executable file .{0,300}not found"
    r"|exec format error"
    r"|\bexec(utable)?\b.{0,300}(no such file or directory|permission denied)",
    re.IGNORECASE | re.DOTALL,
)
# What the runtime runs or mounts itself before it comes to the image's program; it, too, may be missing on a node.
_OF_THE_NODE = re.compile(
    r"nvidia|\bhook|\bmount|cgroup|/dev/|/proc/|/sys/|start shim|containerd-shim|-runtime\b", re.IGNORECASE
)


_READ_CHARACTERS = 4096
"""Of a text; a kubelet passes on no more."""


def image_is_at_fault(message: str) -> bool:
    """Whether the runtime says that the image has no program to run, and nothing that speaks for the node instead."""
    text = message[:_READ_CHARACTERS]
    return _NO_PROGRAM.search(text) is not None and _OF_THE_NODE.search(text) is None
