"""Turns whatever ended a worker into the last words of its rank.

Only a JobError knows the user's sentence. Of the rest a few kinds are recognised by type or text (memory, disk,
a peer that went away, a stop); everything else is an internal error, which another attempt may survive.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator, Mapping

from finetune_api.outcome import EXIT_CODES, Reason, TerminationMessage
from finetune_trainer.errors import JobError
from finetune_trainer.signals import StopRequested

_QUOTED_TEXT_LIMIT = 300
"""Characters of a foreign error text that are quoted in our sentence."""

# The texts below come from libraries that raise a bare RuntimeError: torch, gloo, NCCL, safetensors.
_GPU_MEMORY = re.compile(
    r"(CUDA|HIP) (error: )?out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED", re.I
)
_HOST_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)|Cannot allocate memory"
    r"|DataLoader worker \(pid\(?s?\)? [\d, ]+\) is killed by signal: Killed"
)
_DISK = re.compile(r"No space left on device|Disk quota exceeded", re.I)
_SHARED_MEMORY = re.compile(r"unable to (write to|allocate|open|mmap) .*shared memory|\bshm\b|/torch_\d+", re.I)
_PEER = re.compile(
    r"gloo/transport|failed to pass monitoredBarrier"
    r"|ncclRemoteError|remote process exited or there was a network error"
    r"|Watchdog caught collective operation timeout|NCCL communicator was aborted"
    r"|Connection (closed|reset) by peer|store.*(Broken pipe|timed out|timeout)|wait timeout after",
    re.I,
)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY|API_KEY", re.I)
_SHORTEST_SECRET = 8
"""Shorter values are left alone: replacing them would shred ordinary text and hide little."""


def exit_code(message: TerminationMessage) -> int:
    """Exit code of a process whose last words are `message`; 0 after success."""
    return 0 if message.succeeded else EXIT_CODES[message.reason or Reason.INTERNAL_ERROR]


def redact(text: str, environ: Mapping[str, str]) -> str:
    """`text` without the values of secrets that came in through the environment."""
    secrets = (value for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET)
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def last_words(error: BaseException, *, rank: int, world_size: int, environ: Mapping[str, str]) -> TerminationMessage:
    """The termination message of a rank that `error` ended."""
    reason, sentence = _classify(error, rank=rank, world_size=world_size)
    return TerminationMessage(
        succeeded=False,
        reason=reason,
        message=redact(sentence, environ)[:4096],
        collateral=reason is Reason.PEER_FAILED,
        rank=rank,
    )


def _classify(error: BaseException, *, rank: int, world_size: int) -> tuple[Reason, str]:
    if isinstance(error, JobError):
        return error.reason, error.message
    if isinstance(error, StopRequested | KeyboardInterrupt):
        return Reason.TERMINATED, stopped_sentence(checkpoint_saved=False)
    if (known := _known(error, rank, peers=world_size > 1)) is not None:
        return known
    return Reason.INTERNAL_ERROR, (
        f"The trainer failed unexpectedly at rank {rank} with {quoted(error)}; "
        "the log holds the stack trace, and another attempt may succeed."
    )


def _known(error: BaseException, rank: int, *, peers: bool) -> tuple[Reason, str] | None:
    """What memory, a disk or, where there are `peers`, another rank did; None where it was none of them."""
    for link in _chain(error):
        known = out_of_memory(link, rank) or _disk(link, rank) or (_peer(link, rank) if peers else None)
        if known is not None:
            return known
    return None


def has_other_cause(error: Exception) -> bool:
    """Whether memory, a disk or another rank failed, and not the foreign code that was run and raised `error`."""
    return _known(error, rank=0, peers=True) is not None or any(map(_unreadable, _chain(error)))


def stopped_sentence(*, checkpoint_saved: bool) -> str:
    """What a job that was asked to stop says."""
    if checkpoint_saved:
        return "The attempt was stopped and saved a checkpoint; start the job again to go on from there."
    return "The attempt was stopped before it saved a checkpoint; start the job again to go on from the last one."


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def out_of_memory(error: BaseException, rank: int) -> tuple[Reason, str] | None:
    """Reason and sentence if `error` says that memory ran out; None if it says something else."""
    # Looked up, never imported: a worker that failed before it needed torch should not load it to say so.
    torch_error = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    text = str(error)
    if (torch_error is not None and isinstance(error, torch_error)) or _GPU_MEMORY.search(text):
        return Reason.OUT_OF_MEMORY, (
            f"Rank {rank} ran out of GPU memory: lower context_length (where rows are padded, "
            "train_batch_size_per_device), set gradient_checkpointing: true or sharding: fsdp, or ask for GPUs with "
            "more memory."
        )
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or no_memory or _HOST_MEMORY.search(text):
        return Reason.OUT_OF_MEMORY, host_memory_sentence(f"Rank {rank} ran out of main memory")
    return None


def host_memory_sentence(what_happened: str) -> str:
    """`what_happened` followed by the advice for too little main memory."""
    return (
        f"{what_happened}: lower context_length (where rows are padded, train_batch_size_per_device), set "
        "gradient_checkpointing: true, or give each worker more memory."
    )


def _disk(error: BaseException, rank: int) -> tuple[Reason, str] | None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    if not full and not _DISK.search(text):
        return None
    if _SHARED_MEMORY.search(text):
        return Reason.DISK_FULL, (
            f"Rank {rank} found no room in /dev/shm: give each worker more memory, which bounds it in a cluster, or "
            "this machine a larger /dev/shm."
        )
    place = f" while it wrote {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return Reason.DISK_FULL, (
        f"Rank {rank} found the disk full{place}: free space there, or use a larger one: workers.cache and "
        "output.uri in a cluster, FINETUNE_CACHE_DIR and --output-dir on one machine."
    )


def _unreadable(error: BaseException) -> bool:
    """Whether a disk or a mounted volume did not answer."""
    return isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE)


def _peer(error: BaseException, rank: int) -> tuple[Reason, str] | None:
    distributed = sys.modules.get("torch.distributed")
    network_errors = tuple(
        kind for name in ("DistNetworkError", "DistStoreError") if (kind := getattr(distributed, name, None))
    )
    if not isinstance(error, network_errors) and not _PEER.search(str(error)):
        return None
    return Reason.PEER_FAILED, (
        f"Rank {rank} lost the connection to another worker, which is where the cause is to be found ({quoted(error)})."
    )


def quoted(error: BaseException) -> str:
    """Kind and first line of a foreign error, to be shown within a sentence of ours."""
    lines = str(error).strip().splitlines()
    text = lines[0][:_QUOTED_TEXT_LIMIT] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
