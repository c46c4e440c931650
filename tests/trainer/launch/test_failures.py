"""What ended a worker, and the reason that machines and people then read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed

from finetune_api.outcome import EXIT_CODES, Reason
from finetune_trainer.errors import JobError
from finetune_trainer.launch.failures import exit_code, has_other_cause, last_words, redact
from finetune_trainer.signals import StopRequested

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17632. "
    "This is typically caused by a remote worker crashing."
)

ERRORS: dict[str, tuple[BaseException, Reason, str]] = {
    "a foreseen failure": (
        JobError(Reason.MODEL_NOT_FOUND, "No such model."),
        Reason.MODEL_NOT_FOUND,
        "No such model.",
    ),
    "Ctrl-C": (KeyboardInterrupt(), Reason.TERMINATED, "was stopped"),
    "a stop signal": (StopRequested("SIGTERM"), Reason.TERMINATED, "was stopped"),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to"), Reason.OUT_OF_MEMORY, "GPU memory"),
    "GPU memory, from the driver": (RuntimeError("CUDA error: out of memory"), Reason.OUT_OF_MEMORY, "GPU memory"),
    "GPU memory, from cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        Reason.OUT_OF_MEMORY,
        "gradient_checkpointing",
    ),
    "main memory": (MemoryError(), Reason.OUT_OF_MEMORY, "main memory"),
    "main memory, from torch": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        Reason.OUT_OF_MEMORY,
        "train_batch_size_per_device",
    ),
    "main memory, from fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), Reason.OUT_OF_MEMORY, "main memory"),
    "a killed data loader": (
        RuntimeError("DataLoader worker (pid 4242) is killed by signal: Killed. "),
        Reason.OUT_OF_MEMORY,
        "main memory",
    ),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), Reason.DISK_FULL, "/cache/x"),
    "a spent quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), Reason.DISK_FULL, "disk full"),
    "a full disk, from Rust": (RuntimeError("No space left on device (os error 28)"), Reason.DISK_FULL, "disk full"),
    "a full /dev/shm": (
        RuntimeError("unable to write to file </torch_12_3>: No space left on device (28)"),
        Reason.DISK_FULL,
        "more memory",
    ),
    "a lost peer, gloo": (RuntimeError(GLOO), Reason.PEER_FAILED, "lost the connection"),
    "a silent peer, gloo": (
        RuntimeError("[gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation"),
        Reason.PEER_FAILED,
        "Timed out",
    ),
    "a lost store": (torch.distributed.DistStoreError("wait timeout after 300000ms"), Reason.PEER_FAILED, "lost"),
    "a lost network": (
        torch.distributed.DistNetworkError("The client socket has timed out"),
        Reason.PEER_FAILED,
        "lost",
    ),
    "a lost peer, NCCL": (
        torch.distributed.DistBackendError(
            "NCCL error in: NCCLUtils.hpp:268, ncclRemoteError: A call failed possibly due to a network error"
        ),
        Reason.PEER_FAILED,
        "lost",
    ),
    "NCCL used wrongly": (
        torch.distributed.DistBackendError("NCCL error in: init.cpp:1, invalid usage: Duplicate GPU detected"),
        Reason.INTERNAL_ERROR,
        "Duplicate GPU",
    ),
    "a bug": (ValueError("odd\nsecond line"), Reason.INTERNAL_ERROR, "ValueError: odd; the log"),
    "a bug without words": (ZeroDivisionError(), Reason.INTERNAL_ERROR, "with ZeroDivisionError; the log"),
    "sys.exit(0) in a library": (SystemExit(0), Reason.INTERNAL_ERROR, "SystemExit"),
    "sys.exit(2) in a library": (SystemExit(2), Reason.INTERNAL_ERROR, "SystemExit"),
}


@pytest.mark.parametrize(("error", "reason", "says"), ERRORS.values(), ids=ERRORS)
def test_what_ended_a_worker_has_a_reason_and_a_sentence(error: BaseException, reason: Reason, says: str) -> None:
    message = last_words(error, rank=3, world_size=4, environ={})
    assert message.reason is reason
    assert says in message.message
    assert message.message.endswith((".", ")."))
    assert (message.succeeded, message.rank) == (False, 3)
    assert message.collateral == (reason is Reason.PEER_FAILED)
    assert exit_code(message) == EXIT_CODES[reason]


FOREIGN = {name: row for name, row in ERRORS.items() if name != "a foreseen failure" and isinstance(row[0], Exception)}


@pytest.mark.parametrize(("error", "reason", "_says"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_code_is_not_blamed_for_what_the_machine_or_another_rank_did(
    error: Exception, reason: Reason, _says: str
) -> None:
    assert has_other_cause(error) == (reason is not Reason.INTERNAL_ERROR)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_foreign_code_is_not_blamed_for_a_volume_that_does_not_answer(number: int) -> None:
    assert has_other_cause(OSError(number, os.strerror(number), "/model/config.json"))
    assert not has_other_cause(OSError("there is no file named config.json"))


def test_alone_nobody_can_be_lost() -> None:
    assert last_words(RuntimeError(GLOO), rank=0, world_size=1, environ={}).reason is Reason.INTERNAL_ERROR


@contextmanager
def raised_from(cause: BaseException) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RuntimeError("could not save") from (cause if error.args else None)


def test_a_cause_is_found_below_the_errors_that_wrap_it() -> None:
    with pytest.raises(RuntimeError) as caught, raised_from(OSError(errno.ENOSPC, "No space left on device", "/out")):
        raise ValueError("wrapped")
    assert last_words(caught.value, rank=0, world_size=1, environ={}).reason is Reason.DISK_FULL


def test_an_error_that_was_put_aside_is_no_cause() -> None:
    error = RuntimeError("other")
    error.__context__ = MemoryError()
    assert last_words(error, rank=0, world_size=1, environ={}).reason is Reason.OUT_OF_MEMORY
    error.__suppress_context__ = True
    assert last_words(error, rank=0, world_size=1, environ={}).reason is Reason.INTERNAL_ERROR


def test_secrets_of_the_environment_are_not_repeated() -> None:
    environ = {
        "HF_TOKEN": "hf_0123456789",
        "AWS_SECRET_ACCESS_KEY": "hf_0123456789/and-more",
        "API_KEY": "short",
        "HOME": "/home/somebody",
    }
    text = "401 for hf_0123456789/and-more and hf_0123456789 in /home/somebody, short"
    assert redact(text, environ) == "401 for *** and *** in /home/somebody, short"
    assert "hf_" not in last_words(ValueError(text), rank=0, world_size=1, environ=environ).message


def test_an_endless_error_text_still_fits() -> None:
    for error in (ValueError("x" * 100_000), JobError(Reason.DATA_INVALID, "ü" * 100_000)):
        assert len(last_words(error, rank=0, world_size=1, environ={}).to_bytes()) <= 4096
