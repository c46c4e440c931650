"""The job that `finetune run` leaves beside an adapter's folder: it knows where the base model is on this machine."""

from __future__ import annotations

from pathlib import Path

from finetune_api.job import FineTuneJob
from finetune_api.load import load_job_file

JOB_FILE = "job.yaml"


def job_beside(adapter: Path) -> FineTuneJob | None:
    """The job beside the folder `adapter`, or None where there is none that can be read."""
    file = adapter.absolute().parent / JOB_FILE
    return load_job_file(file).job if file.is_file() else None
