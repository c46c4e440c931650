"""Where a job's results go, computed in one place by operator, trainer and command line."""

from __future__ import annotations

from finetune_api.job import FineTuneJob

UID_CHARACTERS = 8
"""Characters of the uid that tell two jobs of the same name apart."""


def output_address(job: FineTuneJob) -> str | None:
    """The address that holds `adapter/`, `checkpoints/` and the report, or None when the job names no output.

    In a cluster it is `<output.uri>/<namespace>/<name>/<first 8 of uid>`, so that jobs cannot overwrite each other;
    a job without a uid runs locally and uses the output as it is written. A repository of the Hub holds one adapter,
    where everybody looks for it, and is used as it is written too.
    """
    spec = job.spec
    base = spec.output.uri if spec.output else spec.output_dir
    if base is None:
        return None
    if job.metadata.uid is None or base.lower().startswith("hf://"):
        return base
    parts = [
        base.rstrip("/"),
        job.metadata.namespace or "default",
        job.metadata.name,
        job.metadata.uid[:UID_CHARACTERS],
    ]
    return "/".join(parts)


def working_name(job: FineTuneJob) -> str:
    """What a job's checkpoints and logs are kept under where its address holds nothing but the adapter.

    On the Hub this is a branch. Two jobs never share it; a job finds its own again.
    """
    uid = f"-{job.metadata.uid[:UID_CHARACTERS]}" if job.metadata.uid else ""
    namespace = f"{job.metadata.namespace}-" if job.metadata.uid and job.metadata.namespace else ""
    return f"finetune-{namespace}{job.metadata.name}{uid}"
