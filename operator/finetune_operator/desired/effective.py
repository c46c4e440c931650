"""The job that an attempt trains: what its author wrote, with the contract's defaults and the platform team's."""

from __future__ import annotations

from typing import Any

from finetune_api.accelerators import accelerator_type
from finetune_api.defaults import effective_job as with_contract_defaults
from finetune_api.job import FineTuneJob, Metadata, Output
from finetune_api.workers import Cache, ClaimReference, Workers
from finetune_operator.names import KUEUE_PRIORITY_LABEL, KUEUE_QUEUE_LABEL
from finetune_operator.settings import OperatorSettings


def effective_job(job: FineTuneJob, settings: OperatorSettings) -> FineTuneJob:
    """`job` with everything filled in that does not need the data; idempotent.

    Of its metadata only name, namespace, uid and Kueue's labels stay: the rest changes while an attempt runs, or is
    nobody's business who reads the job in a pod.

    Raises:
        ValueError: the job contradicts itself (`finetune_api.rules.spec_problems` says so beforehand).
    """
    metadata = Metadata(
        name=job.metadata.name,
        namespace=job.metadata.namespace,
        uid=job.metadata.uid,
        labels=_queue_labels(job, settings),
    )
    effective = with_contract_defaults(job.model_copy(update={"metadata": metadata, "status": None}))
    changes: dict[str, Any] = {"workers": _workers(effective, settings)}
    if effective.spec.output is None and settings.default_output_uri:
        changes["output"] = Output(uri=settings.default_output_uri)
    return effective.model_copy(update={"spec": effective.spec.model_copy(update=changes)})


def _workers(job: FineTuneJob, settings: OperatorSettings) -> Workers:
    workers = job.spec.workers
    changes: dict[str, Any] = {}
    if workers.image is None:
        changes["image"] = settings.trainer_image
    if workers.resources is None and settings.default_resources is not None:
        changes["resources"] = settings.default_resources
    if workers.cache is None and settings.cache_claim:
        changes["cache"] = Cache(persistent_volume_claim=ClaimReference(claim_name=settings.cache_claim))
    accelerator = accelerator_type(job.spec.worker_resources)
    if accelerator in settings.accelerator_node_selectors:
        # What the author wrote by hand is more exact than what a name stands for.
        changes["node_selector"] = {**settings.accelerator_node_selectors[accelerator], **workers.node_selector}
    return workers.model_copy(update=changes)


def _queue_labels(job: FineTuneJob, settings: OperatorSettings) -> dict[str, str]:
    labels = job.metadata.labels
    queue = labels.get(KUEUE_QUEUE_LABEL) or settings.queue_name
    priority = labels.get(KUEUE_PRIORITY_LABEL)
    return {
        **({KUEUE_QUEUE_LABEL: queue} if queue else {}),
        **({KUEUE_PRIORITY_LABEL: priority} if priority else {}),
    }
