"""The Job that verifies a published adapter: one pod, which opens it as a stranger would.

A node that takes the pod away costs nothing and a crash two more tries; a verdict is never repeated. It stays with its
pod, whose log says more, until the FineTuneJob goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.verification import COULD_NOT_TELL, NOT_AS_TRAINED
from finetune_operator.desired.attempt import attempt_job
from finetune_operator.desired.metadata import verification_metadata
from finetune_operator.desired.pod import verification_template
from finetune_operator.names import BATCH_GROUP, BATCH_VERSION, VERIFICATION_CONTAINER
from finetune_operator.settings import OperatorSettings

TRIES_AFTER_A_CRASH = 2
OUT_OF_MEMORY = 137
"""Exit code of a container that was killed; where no disruption did it, it was out of memory, as the next would be."""


def verification_job(
    job: FineTuneJob, attempt: int, address: str, settings: OperatorSettings, avoid: Sequence[str] = ()
) -> dict[str, Any]:
    """The batch Job that verifies the adapter at `address`, by the job of attempt number `attempt`, from 1.

    Its pod prefers nodes other than those in `avoid`; one that follows a crash does so too, and knows no more.
    """
    job = attempt_job(job, settings)
    metadata = verification_metadata(job)
    # Kueue's labels: where it manages Jobs, it suspends this one until there is quota.
    metadata["labels"] |= job.metadata.labels
    final = {"containerName": VERIFICATION_CONTAINER, "operator": "In"}
    return {
        "apiVersion": f"{BATCH_GROUP}/{BATCH_VERSION}",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "backoffLimit": TRIES_AFTER_A_CRASH,
            "activeDeadlineSeconds": settings.verification_seconds,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {**final, "values": [NOT_AS_TRAINED, COULD_NOT_TELL, OUT_OF_MEMORY]},
                    },
                ]
            },
            "template": verification_template(job, attempt, address, settings, avoid),
        },
    }
