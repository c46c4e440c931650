"""What a job's author should know in this cluster, although the job will be done."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.accelerators import KEY, accelerator_notice, accelerator_type
from finetune_api.defaults import notices
from finetune_api.job import FineTuneJob
from finetune_api.problem import Problem, first_ones
from finetune_operator.desired.addresses import claims
from finetune_operator.desired.effective import effective_job
from finetune_operator.settings import OperatorSettings


def cluster_notices(job: FineTuneJob, settings: OperatorSettings) -> list[Problem]:
    """What to say about `job`: the contract's notices with those of this cluster, the first. Paths start at its top.

    Args:
        job: as its author wrote it; on a job with its defaults filled in, notices about absent keys are missing.
        settings: the operator's, which decide what an accelerator's name means.
    """
    unsure = accelerator_notice(job.spec.worker_resources)
    found = [
        *(notice.below("spec") for notice in notices(job) if notice != unsure),
        *_accelerator(job, settings),
        *_shared_claims(effective_job(job, settings)),
    ]
    return first_ones(found)


def _accelerator(job: FineTuneJob, settings: OperatorSettings) -> Iterator[Problem]:
    name = accelerator_type(job.spec.worker_resources)
    if name is not None and name not in settings.accelerator_node_selectors:
        yield Problem(
            f"spec.{KEY}",
            f"{name} has no effect, since this operator has no node selector for it: write workers.nodeSelector, or "
            f"have {name} added to the operator's accelerator_node_selectors.",
        )


def _shared_claims(job: FineTuneJob) -> Iterator[Problem]:
    """Claims that pods on several machines mount. `job` is a result of `effective_job`."""
    workers = job.spec.workers
    if workers.nodes == 1:
        return
    named = dict.fromkeys(claims(job), "spec")
    if workers.cache is not None and workers.cache.persistent_volume_claim is not None:
        named.setdefault(workers.cache.persistent_volume_claim.claim_name, "spec.workers.cache")
    for index, volume in enumerate(workers.volumes):
        if volume.persistent_volume_claim is not None:
            named.setdefault(volume.persistent_volume_claim.claim_name, f"spec.workers.volumes[{index}]")
    for claim, place in named.items():
        yield Problem(
            place,
            f"all {workers.nodes} nodes mount claim {claim}: it must allow that (ReadWriteMany, or ReadOnlyMany where "
            "nothing is written), or pods on other machines will not start.",
        )
