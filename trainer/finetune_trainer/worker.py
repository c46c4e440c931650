"""One rank of a job: what the launcher starts, once per device."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from finetune_api.defaults import effective_job
from finetune_api.load import load_job_file
from finetune_api.outcome import Reason, TerminationMessage
from finetune_trainer.errors import JobError
from finetune_trainer.train.collective import TIMEOUT, Ranks


def main(job_path: Path) -> TerminationMessage:
    """Run the job in `job_path` on this rank.

    Raises:
        JobError: whatever is foreseen to go wrong.
    """
    _quiet_libraries()
    loaded = load_job_file(job_path)
    if loaded.job is None:
        raise JobError(Reason.INVALID_SPEC, "; ".join(f"{error.path}: {error.message}" for error in loaded.errors))
    device = _set_up_device()
    run_job = _imported()
    ranks = Ranks()
    with ranks.failing_together():
        notices = [str(warning.message) for warning in loaded.warnings]
        result = run_job(effective_job(loaded.job), notices, device, ranks)
    # Not after a failure: tearing down a group whose other ranks are gone may wait for them forever.
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def _imported() -> Callable[..., TerminationMessage]:
    """The run, imported late: libraries take seconds, and a bad job should not wait for them.

    All that they make stays, so nothing is collected meanwhile, nor looked through ever after: a tenth of the time.
    """
    gc.disable()
    try:
        from finetune_trainer.model.quantized import import_bitsandbytes

        import_bitsandbytes()
        from finetune_trainer.run import run_job
    finally:
        gc.freeze()
        gc.enable()
    return run_job


def _set_up_device() -> torch.device:
    """This rank's device, and the process group when there are several ranks."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend="nccl" if gpu else "gloo", timeout=TIMEOUT)
    else:
        # accelerate would take them for a group, and wrap even one process in DDP.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    return torch.device("cuda", local_rank) if gpu else torch.device("cpu")


def _quiet_libraries() -> None:
    """Our own lines say what happens; the libraries' progress bars and banners would bury them."""
    # transformers registers its own progress reporter when it sees our endpoint; ours is the one that reports.
    os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft|accelerate)\b")
