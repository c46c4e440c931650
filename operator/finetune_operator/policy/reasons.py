"""The reasons that the operator itself gives, beside those of the trainer's last words (`finetune_api.outcome.Reason`).

Each is one CamelCase word in the conditions of a job; docs/reference/status.md says what to do about each.
"""

from __future__ import annotations

from enum import StrEnum


class OperatorReason(StrEnum):
    """Why a job is where it is, as far as the trainer did not say so."""

    SUCCEEDED = "Succeeded"
    SUSPENDED = "Suspended"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    RETRIES_EXHAUSTED = "RetriesExhausted"
    NO_PROGRESS = "NoProgress"

    # An attempt ended. Disruptions do not count against backoffLimit.
    DISRUPTED = "Disrupted"
    WORKERS_DELETED = "WorkersDeleted"
    WORKERS_FAILED = "WorkersFailed"
    RESULT_MISSING = "ResultMissing"
    TRAINER_CRASHED = "TrainerCrashed"
    TRAINER_NOT_STARTED = "TrainerNotStarted"

    # A job waits. They come and go.
    WAITING_FOR_QUOTA = "WaitingForQuota"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONFIGURATION_MISSING = "ConfigurationMissing"
    CONTAINER_START_FAILED = "ContainerStartFailed"
    PODS_NOT_CREATED = "PodsNotCreated"
    PODS_NOT_STARTED = "PodsNotStarted"
    PODS_STILL_ENDING = "PodsStillEnding"
    NAME_TAKEN = "NameTaken"
    TRAINING_OPERATOR_MISSING = "TrainingOperatorMissing"
    TRAINING_OPERATOR_UNAVAILABLE = "TrainingOperatorUnavailable"
    ADMISSION_UNAVAILABLE = "AdmissionUnavailable"
    CREATION_FORBIDDEN = "CreationForbidden"


class VerificationReason(StrEnum):
    """Why the condition Verified is what it is."""

    PENDING = "VerificationPending"
    VERIFYING = "Verifying"
    AS_TRAINED = "AsTrained"
    NOT_AS_TRAINED = "NotAsTrained"
    FAILED = "VerificationFailed"


ENDS_OF_ATTEMPTS = (
    OperatorReason.SUCCEEDED,
    OperatorReason.SUSPENDED,
    OperatorReason.DEADLINE_EXCEEDED,
    OperatorReason.DISRUPTED,
    OperatorReason.WORKERS_DELETED,
    OperatorReason.WORKERS_FAILED,
    OperatorReason.RESULT_MISSING,
    OperatorReason.TRAINER_CRASHED,
    OperatorReason.TRAINER_NOT_STARTED,
)
"""Those that an attempt ends with, beside a trainer's own."""

ENDS_OF_JOBS = (OperatorReason.RETRIES_EXHAUSTED, OperatorReason.NO_PROGRESS)
"""Those that only a job ends with: no further attempt is made."""
