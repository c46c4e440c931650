"""The PyTorchJob of an attempt: workers only, no elasticPolicy (docs/decisions/0007-worker-only-pytorchjob.md).

Of the training operator's life cycle nothing is used: its deadline does not fire, its TTL and backoffLimit do not
hold, and its restarts leave half a group. An attempt is whole or over; what comes next, policy decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_operator.desired.attempt import attempt_job
from finetune_operator.desired.environment import processes_per_node
from finetune_operator.desired.fingerprint import FINGERPRINT_ANNOTATION, fingerprint
from finetune_operator.desired.metadata import child_metadata
from finetune_operator.desired.pod import pod_template
from finetune_operator.names import PYTORCH_GROUP, PYTORCH_VERSION, WORKER_REPLICA
from finetune_operator.settings import OperatorSettings


def pytorch_job(
    job: FineTuneJob, attempt: int, settings: OperatorSettings, avoid: Sequence[str] = ()
) -> dict[str, Any]:
    """The PyTorchJob of attempt number `attempt`, from 1, whose pods prefer nodes other than those in `avoid`."""
    job = attempt_job(job, settings)
    metadata = child_metadata(job, attempt)
    # Kueue's labels, the only ones that attempt_job leaves. runPolicy.suspend is Kueue's own from the start.
    metadata["labels"] |= job.metadata.labels
    made: dict[str, Any] = {
        "apiVersion": f"{PYTORCH_GROUP}/{PYTORCH_VERSION}",
        "kind": "PyTorchJob",
        "metadata": metadata,
        "spec": {
            # A text: the schema refuses a number.
            "nprocPerNode": str(processes_per_node(job.spec.workers)),
            # Pods stay until the cause of an end is recorded; then the operator deletes the whole PyTorchJob.
            "runPolicy": {"cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": {
                WORKER_REPLICA: {
                    "replicas": job.spec.workers.nodes,
                    "restartPolicy": "Never",
                    "template": pod_template(job, attempt, settings, avoid),
                }
            },
        },
    }
    metadata["annotations"] = {FINGERPRINT_ANNOTATION: fingerprint(made)}
    return made
