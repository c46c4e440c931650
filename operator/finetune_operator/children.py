"""A job's PyTorchJobs and living pods as their watches last told, so that most reconciles need not read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

from finetune_operator.desired.fingerprint import is_edited
from finetune_operator.names import (
    ATTEMPT_LABEL,
    JOB_UID_LABEL,
    PYTORCH_CONTAINER,
    PYTORCH_PLURAL,
    VERIFICATION_CONTAINER,
    child_name,
    verification_name,
)
from finetune_operator.policy.observed import (
    BATCH_KIND,
    PYTORCH_KIND,
    PodView,
    PyTorchJobView,
    is_made_by,
    is_owned,
    read_pod,
    read_pytorch_job,
)
from finetune_operator.queue import Key
from finetune_operator.wire import Raw

View = TypeVar("View")


class _Seen(NamedTuple, Generic[View]):
    version: str
    """resourceVersion."""
    uid: str
    generation: int | None
    attempt: int
    view: View


@dataclass(slots=True)
class Children:
    """The PyTorchJobs of one job, and those of its pods that have not ended."""

    key: Key
    """The job's."""
    job_uid: str
    doubts: int = 0
    """How often something came to an end, or may have."""
    settled: int = 0
    """How many of those were made up for by reading what there is."""
    _pytorch_jobs: dict[str, _Seen[PyTorchJobView]] = field(default_factory=dict)
    _pods: dict[str, _Seen[PodView]] = field(default_factory=dict)

    def of_attempt(self, attempt: int) -> tuple[PyTorchJobView | None, Sequence[PodView]]:
        """The PyTorchJob of an attempt, if it is known, and its living pods in their order."""
        found = next((seen.view for seen in self._pytorch_jobs.values() if seen.attempt == attempt), None)
        pods = [seen.view for seen in self._pods.values() if seen.attempt == attempt]
        if found is not None:
            pods = [pod for pod in pods if pod.owner_uid == found.uid]
        return found, sorted(pods, key=lambda pod: pod.index)

    @property
    def must_be_read(self) -> bool:
        """Whether what there is has to be read from the API server: something has ended, or may have."""
        return self.doubts != self.settled

    def made(self, raw: Raw) -> PyTorchJobView | None:
        """Keep a PyTorchJob that we have created just now; as the policies see it, or None if it is not the job's."""
        self._keep(self._pytorch_jobs, raw, _attempt(raw), lambda raw, _: self._view(raw), deleted=False)
        found = self._pytorch_jobs.get(raw["metadata"]["name"])
        return found.view if found is not None else None

    def seen(self, kind: str, raw: Raw, *, deleted: bool = False) -> bool:
        """Keep what a watch told or what was read; whether it is news for a reconcile.

        Args:
            kind: PYTORCH_PLURAL or PODS_PLURAL.
            raw: the object.
            deleted: it is gone, or, as a pod, it has ended: only living ones are watched.
        """
        attempt = _attempt(raw)
        if kind == PYTORCH_PLURAL:
            return self._keep(self._pytorch_jobs, raw, attempt, self._pytorch_job_view, deleted=deleted)
        container = PYTORCH_CONTAINER if attempt else VERIFICATION_CONTAINER
        return self._keep(
            self._pods,
            raw,
            attempt,
            lambda raw, _: read_pod(raw, container) if self._is_own_pod(raw) else None,
            deleted=deleted,
        )

    def is_current(self, kind: str, metadata: Mapping[str, Any]) -> bool:
        """Whether nothing newer is listed than what is known."""
        kept = self._of(kind).get(metadata["name"])
        if kept is None:
            raw = {"metadata": metadata}
            return not (is_owned(raw, self.job_uid) if kind == PYTORCH_PLURAL else self._is_own_pod(raw))
        return not is_newer(metadata["resourceVersion"], kept.version)

    def version_of(self, kind: str, metadata: Mapping[str, Any]) -> str | None:
        """The resourceVersion that is known of an object; None where it is another of its name, or unknown."""
        kept = self._of(kind).get(metadata["name"])
        return kept.version if kept is not None and kept.uid == metadata["uid"] else None

    def keep_only(self, kind: str, names: set[str], newest: str) -> bool:
        """Drop those of a kind that have other names and are no newer than `newest`; whether there were any."""
        kept = self._of(kind)
        gone = [name for name, seen in kept.items() if name not in names and not is_newer(seen.version, newest)]
        for name in gone:
            del kept[name]
        self.doubts += bool(gone)
        return bool(gone)

    def forget(self, name: str) -> None:
        """We deleted the PyTorchJob of that name."""
        self._pytorch_jobs.pop(name, None)

    @property
    def living(self) -> bool:
        """Whether there is a pod, or a PyTorchJob that is neither at its end nor on its way out."""
        return bool(self._pods) or any(not is_over(seen.view) for seen in self._pytorch_jobs.values())

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return not self._pytorch_jobs and not self._pods

    def _of(self, kind: str) -> dict[str, Any]:
        return self._pytorch_jobs if kind == PYTORCH_PLURAL else self._pods

    def _keep(self, kept: dict[str, Any], raw: Raw, attempt: int, view: Any, *, deleted: bool) -> bool:
        metadata = raw["metadata"]
        name, uid = metadata["name"], metadata["uid"]
        before: _Seen[Any] | None = kept.get(name)
        if deleted:
            if before.uid == uid if before is not None else view(raw, None) is not None:
                kept.pop(name, None)
                self.doubts += 1
                return True
            return False
        if before is not None and before.uid == uid and not is_newer(metadata["resourceVersion"], before.version):
            return False
        now = view(raw, before)
        if now is None:
            # It is not ours any more, or ours is gone and another has its name.
            lost = before is not None and (before.uid == uid or is_newer(metadata["resourceVersion"], before.version))
            if lost:
                del kept[name]
                self.doubts += 1
            return lost
        kept[name] = _Seen(metadata["resourceVersion"], uid, metadata.get("generation"), attempt, now)
        return before is None or before.view != now

    def _pytorch_job_view(self, raw: Raw, before: _Seen[PyTorchJobView] | None) -> PyTorchJobView | None:
        metadata, view = raw["metadata"], self._view(raw)
        if view is None or is_over(view):
            return view  # nobody is told of an edit any more, and thousands of them are read at a start
        if before is not None and before.uid == metadata["uid"] and before.generation == metadata.get("generation"):
            edited = before.view.edited  # the spec is the same, so its fingerprint is
        else:
            edited = is_edited(raw)
        return replace(view, edited=edited)

    def _is_own_pod(self, raw: Raw) -> bool:
        """Whether an attempt of the job, or its verification, controls the pod: anybody can write labels on theirs.

        By the owner's name, since a pod may be seen before its owner is. The policies go by its uid.
        """
        attempt = _attempt(raw)
        if attempt:
            return is_made_by(raw, PYTORCH_KIND, child_name(self.key.name, self.job_uid, attempt))
        return is_made_by(raw, BATCH_KIND, verification_name(self.key.name, self.job_uid))

    def _view(self, raw: Raw) -> PyTorchJobView | None:
        watched = (raw["metadata"].get("labels") or {}).get(JOB_UID_LABEL) == self.job_uid  # nothing is told of others
        ours = watched and is_owned(raw, self.job_uid)
        return read_pytorch_job(raw, _attempt(raw)) if ours else None


def is_calm(pytorch_job: PyTorchJobView | None, pods: Sequence[PodView]) -> bool:
    """Whether an attempt starts or runs and nothing of it is at an end."""
    if pytorch_job is None or pytorch_job.deleting or pytorch_job.ended or pytorch_job.suspended:
        return False
    if pytorch_job.pods_ended and len(pods) < pytorch_job.nodes:
        return False  # those that have ended are not watched, and may have done so before this process was there
    return not any(pod.ended or pod.deleting or pod.disruption for pod in pods)


def is_over(pytorch_job: PyTorchJobView) -> bool:
    """Whether nothing more will come of it by itself."""
    return pytorch_job.ended or pytorch_job.deleting


def is_newer(version: str, than: str) -> bool:
    """Whether resourceVersion `version` is later than the other one.

    Kubernetes compares them as numbers since 1.35. Of others it is only known whether they differ.
    """
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than


def _attempt(raw: Raw) -> int:
    """Number of the attempt that an object belongs to by its label; 0 for none."""
    text = (raw["metadata"].get("labels") or {}).get(ATTEMPT_LABEL)
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 10 else 0
