"""Creates the next attempt, or says in status why that cannot be done just now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from finetune_api.job import FineTuneJob
from finetune_api.outcome import Reason
from finetune_api.status import Phase
from finetune_operator.attempts import Attempts, NameTaken
from finetune_operator.errors import ApiError, Forbidden, Invalid, NotFound, SetupProblem, Unavailable
from finetune_operator.memory import Known
from finetune_operator.policy.conditions import stalled
from finetune_operator.policy.decide import note_created, note_hindered
from finetune_operator.policy.observed import PyTorchJobView
from finetune_operator.policy.plan import ObservedState, Plan, Timeouts
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.progress.authority import CertificateAuthority

HINDERED_LIMIT_SECONDS = 30.0
"""Longest wait between two tries to create an attempt (seconds)."""

_log = logging.getLogger(__name__)


async def create_attempt(
    plan: Plan,
    number: int,
    job: FineTuneJob,
    known: Known,
    observed: ObservedState,
    now: datetime,
    timeouts: Timeouts,
    *,
    attempts: Attempts,
    authority: CertificateAuthority | None,
) -> PyTorchJobView | None:
    """Create attempt `number` and enter it into the plan's status; its PyTorchJob, or None.

    Raises:
        ApiError: the API server does not answer, or somebody else was faster.
    """
    try:
        if authority is not None:
            await _trust(authority, known)
        pytorch_job = await attempts.create(job, known, number)
    except NameTaken as error:
        _hindered(plan, known, OperatorReason.NAME_TAKEN, str(error), observed, now)
    except Invalid as error:
        sentence = f"The API server refuses the workers of this job: {error}. Change workers, or report it."
        stalled(
            plan.status, Phase.PENDING, Reason.INVALID_SPEC, sentence, now=now, generation=observed.desired.generation
        )
        plan.again_at = now + timedelta(seconds=hindered_seconds(known))
    except (NotFound, Forbidden, Unavailable) as error:
        reason = _reason(error)
        if reason is not None:
            _hindered(plan, known, reason, _SENTENCES[reason](error), observed, now)
        elif isinstance(error, Forbidden):
            # The namespace is being deleted, and the job with it.
            plan.again_at = now + timedelta(seconds=hindered_seconds(known))
        else:
            raise
    else:
        known.hindered = 0
        note_created(plan, pytorch_job, observed, now, timeouts)
        return pytorch_job
    return None


async def _trust(authority: CertificateAuthority, known: Known) -> None:
    try:
        await authority.ensure_ca(known.key.namespace)
    except (SetupProblem, Forbidden) as error:
        # Progress is never worth a training run: the pods start without it.
        _log.warning("%s/%s will show no progress: %s", *known.key, error)


def _reason(error: ApiError) -> OperatorReason | None:
    """What hinders; None when nothing in particular does and another look is all that helps."""
    text = error.message
    if isinstance(error, NotFound):
        return OperatorReason.TRAINING_OPERATOR_MISSING
    if isinstance(error, Forbidden):
        return None if "being terminated" in text else OperatorReason.CREATION_FORBIDDEN
    return OperatorReason.TRAINING_OPERATOR_UNAVAILABLE if "webhook" in text else None


_SENTENCES: dict[OperatorReason, Callable[[ApiError], str]] = {
    OperatorReason.TRAINING_OPERATOR_MISSING: lambda _: (
        "The cluster has no PyTorchJob kind: have Kubeflow's training operator (v1) installed, and the job starts by "
        "itself."
    ),
    OperatorReason.CREATION_FORBIDDEN: lambda error: (
        f"The workers may not be created ({error.message}): ask for less, or have the quota or permission raised; the "
        "job starts by itself then."
    ),
    OperatorReason.TRAINING_OPERATOR_UNAVAILABLE: lambda error: (
        "Kubeflow's training operator, or whoever else is asked about PyTorchJobs (such as Kueue), does not answer "
        f"({error.message}): the job starts by itself once it does."
    ),
}


def _hindered(
    plan: Plan, known: Known, reason: OperatorReason, sentence: str, observed: ObservedState, now: datetime
) -> None:
    note_hindered(plan, reason, sentence, observed, now)
    plan.again_at = now + timedelta(seconds=hindered_seconds(known))


def hindered_seconds(known: Known) -> float:
    """How long to wait after one more try in a row that created nothing (seconds)."""
    known.hindered += 1
    return min(HINDERED_LIMIT_SECONDS, 0.5 * 2.0 ** min(known.hindered, 10))
