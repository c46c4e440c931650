"""Creates the next attempt, or says in status why that cannot be done just now."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from finetune_api.status import Phase
from finetune_operator.attempts import Attempts, NameTaken
from finetune_operator.cache import BY_HAND_BACKOFF_LIMIT_SECONDS, CREATION_BACKOFF_LIMIT_SECONDS, CachedJob
from finetune_operator.errors import ApiError, Conflict, Forbidden, NotFound, SetupProblem
from finetune_operator.policy.decide import note_blocked, note_created
from finetune_operator.policy.nodes import nodes_to_avoid
from finetune_operator.policy.observed import PyTorchJobView
from finetune_operator.policy.plan import Plan, Timeouts
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.refusals import Refusal, refusal
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.view import View

_log = logging.getLogger(__name__)


class Creation:
    """Creates attempts.

    Args:
        attempts: the objects of attempts.
        authority: sees to it that trainers can trust the progress endpoint; None when there is none.
        timeouts: the operator's.
    """

    def __init__(self, attempts: Attempts, authority: CertificateAuthority | None, timeouts: Timeouts) -> None:
        self._attempts = attempts
        self._authority = authority
        self._timeouts = timeouts

    async def create(self, plan: Plan, number: int, view: View, now: datetime) -> PyTorchJobView | None:
        """Create attempt `number` and enter it into the plan's status; its PyTorchJob, or None.

        Raises:
            Conflict: somebody else was faster, or the spec is not kept any more: read the job.
            ApiError: the API server does not answer.
        """
        cached, job = view.cached, view.spec.job
        limit = CREATION_BACKOFF_LIMIT_SECONDS
        if job is None:
            raise Conflict(409, "Conflict", "The spec has to be read again.")
        avoid = nodes_to_avoid(view.observed.status.attempts)
        try:
            await self._trust(cached)
            made = await self._attempts.create(job, cached, number, avoid=avoid, live=view.live)
        except NameTaken as error:
            note_blocked(plan, OperatorReason.NAME_TAKEN, str(error))
            limit = BY_HAND_BACKOFF_LIMIT_SECONDS
        except ApiError as error:
            found = refusal(error)
            if found is None and not _namespace_goes(error):
                raise
            if found is not None:
                _enter(plan, found)
                limit = BY_HAND_BACKOFF_LIMIT_SECONDS if found.by_hand else limit
            # else the namespace is being deleted, and the job with it
        else:
            cached.creation_failures = 0
            note_created(plan, made, view.observed, now, self._timeouts)
            return made
        plan.again_at = now + timedelta(seconds=cached.creation_backoff_seconds(limit))
        return None

    async def _trust(self, cached: CachedJob) -> None:
        if self._authority is None:
            return
        try:
            await self._authority.ensure_ca(cached.key.namespace)
        except (SetupProblem, ApiError) as error:
            # Progress is never worth a training run: the pods start without it.
            _log.warning("%s/%s will show no progress: %s", *cached.key, error)


def _namespace_goes(error: ApiError) -> bool:
    return isinstance(error, NotFound) or (isinstance(error, Forbidden) and "being terminated" in error.message)


def _enter(plan: Plan, found: Refusal) -> None:
    if found.final:
        plan.conditions.stalled(Phase.PENDING, found.reason, found.sentence)
    else:
        note_blocked(plan, found.reason, found.sentence)
