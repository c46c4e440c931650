"""A wrong image is told from a broken node by what the runtime says."""

from __future__ import annotations

import pytest

from finetune_operator.policy.start_errors import image_is_at_fault

RUNC = "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: "

OF_THE_IMAGE = [
    'exec: "python": executable file not found in $PATH',
    f'{RUNC}unable to start container process: exec: "python": executable file not found in $PATH: unknown',
    f'{RUNC}unable to start container process: exec: "/opt/x": stat /opt/x: no such file or directory: unknown',
    f'{RUNC}unable to start container process: exec: "/opt/x": permission denied: unknown',
    "standard_init_linux.go:228: exec user process caused: exec format error",
    (
        "crun: executable file `python` not found in $PATH: No such file or directory: OCI runtime attempted to invoke "
        "a command that was not found"
    ),
    "crun: open executable: Permission denied: OCI permission denied",
    'error finding executable "python" in PATH [/usr/bin /bin]: no such file or directory',
]
OF_THE_NODE = [
    (
        f"{RUNC}unable to start container process: error during container init: error running prestart hook #0: exit "
        "status 1, stdout: , stderr: Auto-detected mode as 'legacy' nvidia-container-cli: initialization error: nvml "
        "error: driver/library version mismatch: unknown"
    ),
    (
        "nvidia-container-cli: initialization error: load library failed: libnvidia-ml.so.1: cannot open shared object "
        "file: no such file or directory"
    ),
    (
        f'{RUNC}unable to start container process: error mounting "/var/lib/kubelet/pods/x" to rootfs at "/x": '
        "stat /var/lib/kubelet/pods/x: no such file or directory: unknown"
    ),
    (
        "unable to retrieve OCI runtime error (open log.json: no such file or directory): exec: "
        '"nvidia-container-runtime": executable file not found in $PATH: <nil>: unknown'
    ),
    'failed to start shim: start failed: exec: "containerd-shim-runc-v2": executable file not found in $PATH',
    (
        f"{RUNC}error gathering device information while adding custom device: lstat /dev/nvidia0: no such file or "
        "directory: unknown"
    ),
    f"{RUNC}unable to apply cgroup configuration: open /sys/fs/cgroup/cpu.max: permission denied: unknown",
    "fork/exec /usr/bin/nvidia-container-runtime-hook: no such file or directory",
    "context deadline exceeded",
    "",
]


@pytest.mark.parametrize("text", OF_THE_IMAGE)
def test_an_image_without_the_program_is_at_fault(text: str) -> None:
    assert image_is_at_fault(text)


@pytest.mark.parametrize("text", OF_THE_NODE)
def test_everything_else_may_be_the_nodes(text: str) -> None:
    assert not image_is_at_fault(text)


def test_what_no_kubelet_passes_on_is_not_read() -> None:
    """Looking for words over any distance takes the square of a text's length."""
    assert image_is_at_fault("x" * 4000 + OF_THE_IMAGE[0])
    assert not image_is_at_fault("x" * 4096 + OF_THE_IMAGE[0])
