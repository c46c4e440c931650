"""Runs this node's workers under torch elastic, from the PET_* variables of a PyTorchJob or on this machine alone.

Elastic does rendezvous, ranks and the killing of survivors. Its command line `torchrun` is not used, because it
turns every exit code into 1; its restarts are not used either: an attempt is whole or over.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.launch import environment
from finetune_trainer.launch.cores import threads_here

_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of them is there on a Linux machine with GPUs: NVIDIA's, AMD's, those of Windows below its Linux."""


@dataclass(frozen=True)
class ProcessFailure:
    """A worker process that did not end with exit code 0."""

    code: int
    """Exit code, or minus the number of the signal that ended it."""
    at: float
    """Seconds since the epoch, to the second."""


@dataclass(frozen=True)
class NodeSettings:
    """How many workers run here and where they meet those of other nodes."""

    nproc: int
    """Worker processes on this node."""
    alone: bool
    """True when no other node takes part: the workers then meet on the loopback address, which needs no name service,
    even in a pod whose PET_MASTER_ADDR would need one."""


def node_settings(environ: Mapping[str, str], *, gpus: int) -> NodeSettings:
    """The settings of this node.

    Raises:
        JobError: InvalidSpec for a variable that is no number, WorldSizeMismatch for more workers than GPUs.
    """
    nproc = environment.whole_number(environ, environment.NPROC_PER_NODE)
    if nproc is None and environ.get("PET_NPROC_PER_NODE") not in ("auto", "gpu", "cpu"):
        # "auto" is the training operator's default and would start a worker per core on a node without GPUs.
        nproc = environment.whole_number(environ, "PET_NPROC_PER_NODE")
    if nproc is None:
        nproc = max(1, gpus)
    if 0 < gpus < nproc:
        raise JobError(
            Reason.WORLD_SIZE_MISMATCH,
            f"{nproc} worker processes are to run on this node, which shows {gpus} GPUs: make the numbers equal, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU.",
        )
    most_nodes = environ.get("PET_NNODES", "1").rpartition(":")[2]
    return NodeSettings(nproc=nproc, alone=most_nodes == "1")


def torch_arguments(settings: NodeSettings, *, free_port: int, log_dir: Path, worker: Sequence[str]) -> list[str]:
    """Arguments for torch.distributed.run. What they leave open (addresses, node rank) it takes from PET_* itself."""
    arguments = [
        f"--nproc-per-node={settings.nproc}",
        "--max-restarts=0",
        "--monitor-interval=0.1",
        # Stop signals are the launcher's own affair (stop.py); elastic insists on handling at least one.
        "--signals-to-handle=SIGUSR2",
        "--redirects=0",
        "--tee=0",
        f"--log-dir={log_dir}",
    ]
    if settings.alone:
        arguments += [
            "--nnodes=1",
            "--node-rank=0",
            "--rdzv-backend=static",
            f"--rdzv-endpoint=127.0.0.1:{free_port}",
            "--local-addr=127.0.0.1",
        ]
    return [*arguments, "--module", *worker]


def worker_defaults(settings: NodeSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that workers get unless they are set already."""
    defaults = {
        "OMP_NUM_THREADS": str(threads_here(settings.nproc)),
    }
    if visible_gpus():
        if "PYTORCH_CUDA_ALLOC_CONF" not in environ:
            # Every pack has another length: without it, free memory lies in pieces that no further one fits into.
            defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    else:
        # Threads that spin while they wait take the cores of those that work, and a pod's CPU quota with them.
        defaults |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    if settings.alone:
        # gloo otherwise looks the host name up, which fails without a network.
        defaults["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    return {name: value for name, value in defaults.items() if name not in environ}


def visible_gpus() -> int:
    """GPUs that this process may use, without creating a context on any of them."""
    if sys.platform == "linux" and not any(Path(file).exists() for file in _GPU_FILES):
        # Loading PyTorch takes seconds.
        return 0
    import torch

    return torch.cuda.device_count()


def find_free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_workers(arguments: Sequence[str]) -> dict[int, ProcessFailure]:
    """Run this node's workers to their end; the failed ones by global rank, none after success.

    Raises:
        Exception: what torch raises when the nodes do not find each other.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    if "LOGLEVEL" not in os.environ:
        # Elastic reports in its own words what root_cause says better. LOGLEVEL=INFO, torch's own switch, shows it.
        logging.disable(logging.CRITICAL)
    options = parse_args(list(arguments))  # type: ignore[no-untyped-call] # torch annotates neither
    options.standalone = False
    with _own_host_name():
        try:
            run(options)  # type: ignore[no-untyped-call] # see above
        except ChildFailedError as error:
            return {
                rank: ProcessFailure(code=failure.exitcode, at=float(failure.timestamp or time.time()))
                for rank, failure in error.failures.items()
            }
    return {}


@contextmanager
def _own_host_name() -> Iterator[None]:
    """Spare elastic the reverse lookups of our own host name, with which it labels every event it records.

    Each blocks for seconds where the name server does not answer: on laptops, and in containers without a network.
    """
    getfqdn = socket.getfqdn
    socket.getfqdn = lambda name="": name or socket.gethostname()
    try:
        yield
    finally:
        socket.getfqdn = getfqdn
