"""Reads and creates the Job that verifies an adapter, or says in status why that cannot be done just now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from finetune_api.status import FineTuneJobStatus
from finetune_operator.attempts import Attempts, NameTaken, name_taken
from finetune_operator.cache import CachedJob
from finetune_operator.cluster import Cluster
from finetune_operator.desired import verification_job
from finetune_operator.desired.continuation import continued
from finetune_operator.errors import ApiError, Conflict, Forbidden, Invalid, Unavailable
from finetune_operator.names import VERIFICATION_CONTAINER, verification_name
from finetune_operator.policy.decide import problems_sentence
from finetune_operator.policy.nodes import nodes_to_avoid
from finetune_operator.policy.observed import PodView, VerificationView, is_owned, read_pod, read_verification
from finetune_operator.policy.plan import Plan, Timeouts
from finetune_operator.policy.verification import give_up, is_under_way, note_blocked, note_created
from finetune_operator.settings import OperatorSettings
from finetune_operator.view import View

MOST_PODS = 100
"""So many pods of a verification are looked at, the youngest: each follows one that was taken away."""


class Verifications:
    """The Jobs that verify adapters in the cluster."""

    def __init__(self, cluster: Cluster, settings: OperatorSettings, attempts: Attempts, timeouts: Timeouts) -> None:
        self._cluster = cluster
        self._settings = settings
        self._attempts = attempts
        self._timeouts = timeouts

    async def read(self, cached: CachedJob, status: FineTuneJobStatus) -> VerificationView | None:
        """The Job of a job's verification, if there is one of ours, and its pods."""
        namespace = cached.key.namespace
        try:
            found = await self._cluster.get_batch_job(namespace, verification_name(cached.key.name, cached.uid))
        except Forbidden:
            if is_under_way(status):
                raise
            # Whoever lacks this right lacks the other one too, and says so when it tries to create the Job.
            return None
        if found is None or not is_owned(found, cached.uid):
            return None
        view = read_verification(found, ())
        del found  # somebody may have filled it
        pods: list[PodView] = []
        async for raw in self._cluster.list_batch_job_pods(namespace, uid=view.uid):
            # Anybody can label others as its own, of 1.4 MB each: none is kept as it was read.
            pod = read_pod(raw, VERIFICATION_CONTAINER)
            if pod.owner_uid == view.uid:
                pods = _youngest([*pods, pod]) if len(pods) >= 2 * MOST_PODS else [*pods, pod]
                self._attempts.note_pod(cached, raw, pod)
        return replace(view, pods=_youngest(pods))

    async def begin(self, plan: Plan, view: View, now: datetime) -> None:
        """Create the Job and enter it into the plan's status, or what hinders that.

        Raises:
            ApiError: the API server does not answer, or somebody else was faster.
        """
        cached, attempt = view.cached, plan.status.attempt
        if attempt is None or await self._attempts.config_map(cached, attempt) is None:
            give_up(plan, "The ConfigMap of the last attempt is gone, and with it the job to verify by.")
            return
        try:
            found = await self._create(plan, attempt, view)
        except Invalid as error:
            give_up(plan, f"The API server refuses the Job of the verification: {error}")
        except (_Hindered, NameTaken, Forbidden, Unavailable) as error:
            again_at = now + timedelta(seconds=cached.creation_backoff_seconds())
            note_blocked(plan, _sentence(error), again_at, now, self._timeouts)
        else:
            cached.creation_failures = 0
            note_created(plan, found, now, self._timeouts)

    async def _create(self, plan: Plan, attempt: int, view: View) -> VerificationView:
        cached, written, problems = view.cached, view.spec.job, view.spec.desired.problems
        if written is None or problems:
            sentence = problems_sentence(problems) if problems else "it cannot be read."
            raise _Hindered(f"Of the spec as it is now no verification can be made: {sentence}")
        job = continued(written, await self._attempts.first_config_map(cached))
        address = plan.status.adapter.uri if plan.status.adapter is not None else ""
        body = verification_job(job, attempt, address, self._settings, nodes_to_avoid(plan.status.attempts))
        namespace, name = cached.key.namespace, body["metadata"]["name"]
        try:
            made = await self._cluster.create_batch_job(namespace, body)
        except Conflict:
            found = await self._cluster.get_batch_job(namespace, name)
            if found is None:
                raise
            if not is_owned(found, cached.uid):
                raise name_taken("Job", namespace, name) from None
            made = found
        return read_verification(made, ())


def _youngest(pods: Iterable[PodView]) -> list[PodView]:
    """At most MOST_PODS of them, oldest first."""
    order = sorted(pods, key=lambda pod: (pod.created_at or datetime.max.replace(tzinfo=UTC), pod.name))
    return order[-MOST_PODS:]


class _Hindered(Exception):  # noqa: N818
    """The Job cannot be made just now; the text is a sentence."""


def _sentence(error: Exception) -> str:
    """What hinders.

    Raises:
        Unavailable: `error`, when it is nothing in particular and another look is all that helps.
    """
    if isinstance(error, Forbidden):
        return (
            f"The Job that verifies the adapter may not be created ({error.message}): have the quota or permission "
            "raised."
        )
    if isinstance(error, ApiError):
        if "webhook" not in error.message:
            raise error
        return f"Whoever is asked about Jobs (such as Kueue) does not answer ({error.message})."
    return str(error)
