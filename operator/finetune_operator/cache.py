"""What the watches have told of jobs, and what the operator keeps of each between two reconciles.

All of it can be lost at any time, since status and the cluster hold the truth, and none of it outlives its job. What
is kept is never older than what this process itself wrote last: an object that is older than the one kept is ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.status import Phase
from finetune_operator.children import Children, is_newer
from finetune_operator.kept import kept
from finetune_operator.names import FINETUNE_PLURAL, JOB_NAME_LABEL, JOB_UID_LABEL, child_name, pod_name, stem
from finetune_operator.policy.plan import DesiredState
from finetune_operator.queue import Key
from finetune_operator.wire import Raw

CREATION_BACKOFF_LIMIT_SECONDS = 30.0
"""Longest wait between two tries to create an attempt or a verification (seconds)."""
BY_HAND_BACKOFF_LIMIT_SECONDS = 300.0
"""The same where nothing helps but that somebody does something about it (seconds)."""


@dataclass(frozen=True)
class ParsedSpec:
    """A spec, parsed and checked."""

    generation: int
    labels: Mapping[str, str]
    """The job's, which its generation does not count."""
    desired: DesiredState
    job: FineTuneJob | None
    """None for a spec with problems, and once an attempt was made of it: it is large."""
    gpus_per_node: int = 0


@dataclass(slots=True)
class CachedJob:
    """One job."""

    key: Key
    uid: str
    version: str = ""
    """resourceVersion of the newest object that was seen, or of our own last write."""
    raw: Raw | None = None
    """What is kept of that object, without its spec once that is parsed; None where it has to be read."""
    spec: ParsedSpec | None = None
    phase: Phase | None = None
    gpus: int = 0
    """GPUs of the current attempt while it runs."""
    attempt: int | None = None
    """Number of the current attempt while it is open."""
    newest_attempt: int | None = None
    """Number of the newest attempt that status knows, open or not."""
    pytorch_job_uid: str = ""
    """uid of its PyTorchJob."""
    workers: tuple[int, str] | None = None
    """Number of the newest attempt whose PyTorchJob was seen, and its uid: what its pods say is believed without it."""
    size: tuple[int, int] | None = None
    """Number of the newest attempt that was read, and of its pods."""
    ending_since: datetime | None = None
    """When it was first seen that the current attempt is ending; None while it is not."""
    creation_failures: int = 0
    """Tries in a row that could not create the next attempt, or the verification."""
    waiting: tuple[str, datetime] | None = None
    """Why it waits, and when that was first seen; None while it does not."""
    verifying: bool = False
    """It has succeeded, and the verdict on its adapter is awaited."""
    done: bool = False
    """It has ended, and nothing is left to be done but to wait for its TTL."""

    def creation_backoff_seconds(self, limit: float = CREATION_BACKOFF_LIMIT_SECONDS) -> float:
        """How long to wait after one more try in a row that created nothing, at most `limit` (seconds)."""
        self.creation_failures += 1
        return min(limit, 0.5 * 2.0 ** min(self.creation_failures, 10))

    @property
    def ended(self) -> bool:
        """Whether it has succeeded or failed, and no verdict is awaited."""
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED) and not self.verifying

    def note_wait(self, reason: str | None, now: datetime) -> None:
        """It waits for that reason, or for none. Another reason begins another wait."""
        if reason is None:
            self.waiting = None
        elif self.waiting is None or self.waiting[0] != reason:
            self.waiting = (reason, now)


class Cache:
    """All jobs and their children.

    Args:
        forgotten: called with the uid of every job of which nothing is kept any more.
    """

    def __init__(self, forgotten: Callable[[str], None] = lambda _: None) -> None:
        self._forgotten = forgotten
        self._jobs: dict[Key, CachedJob] = {}
        self._stems: dict[tuple[str, str], CachedJob] = {}
        """Namespace and what the names of a job's children begin with -> the job."""
        self._children: dict[tuple[str, str, str], Children] = {}
        """Namespace, the job's name and its uid -> its children; they may be seen before their job is.

        Both, since anybody can write either on an object: what names another job tells nothing of this one.
        """
        self._newest: dict[str, str] = {}
        """Kind -> the latest resourceVersion that was seen."""
        self.synced = False
        """Everything was listed once: what is not known of a job is not there."""

    def job_seen(self, raw: Raw) -> CachedJob | None:
        """Keep a FineTuneJob that was read, or that a watch told of; None for one that is no news."""
        metadata = raw["metadata"]
        key = Key(metadata["namespace"], metadata["name"])
        cached = self._jobs.get(key)
        self._note_told(FINETUNE_PLURAL, metadata["resourceVersion"])
        if cached is None or cached.uid != metadata["uid"]:
            self.forget(key)
            cached = self._jobs[key] = CachedJob(key, metadata["uid"])
            self._stems[key.namespace, stem(key.name, cached.uid)] = cached
        elif not is_newer(metadata["resourceVersion"], cached.version):
            return None
        cached.version, cached.raw = metadata["resourceVersion"], kept(raw)
        return cached

    def job_read(self, raw: Raw) -> CachedJob:
        """Keep a FineTuneJob that was read just now, unless a watch has told of a newer one while it was on its way."""
        seen = self.job_seen(raw)
        if seen is not None:
            return seen
        cached = self._jobs[Key(raw["metadata"]["namespace"], raw["metadata"]["name"])]
        if not is_newer(cached.version, raw["metadata"]["resourceVersion"]):
            cached.raw = kept(raw)
        return cached

    def child_seen(self, kind: str, raw: Raw, *, deleted: bool) -> Key | None:
        """Keep a PyTorchJob or pod that a watch told of; the job that it belongs to, or None for no news."""
        self._note_told(kind, raw["metadata"]["resourceVersion"])
        children = self._children_of(raw["metadata"])
        if children is None:
            return None
        news = children.seen(kind, raw, deleted=deleted)
        # A job that is known has the uid that the object names.
        cached = self._jobs.get(children.key)
        if cached is None or cached.ended:
            # Of a job that has ended it only matters whether something still runs; of none, nothing does.
            news = cached is not None and children.living
            if cached is not None or children.empty:
                self._children.pop((*children.key, children.job_uid), None)
        return children.key if news else None

    def children(self, key: Key, uid: str) -> Children:
        """What is known of the children of the job with that name and uid."""
        found = self._children.get((*key, uid))
        if found is None:
            found = self._children[*key, uid] = Children(key, uid)
        return found

    def release_children(self, cached: CachedJob) -> None:
        """Nothing is to be kept of a job's children any more."""
        self._children.pop((*cached.key, cached.uid), None)

    def find(self, key: Key) -> CachedJob | None:
        """What is kept of the job called `key`."""
        return self._jobs.get(key)

    def forget(self, key: Key) -> None:
        """Drop the job and its children."""
        cached = self._jobs.pop(key, None)
        if cached is not None:
            self.release_children(cached)
            self._stems.pop((key.namespace, stem(key.name, cached.uid)), None)
            self._forgotten(cached.uid)

    def unlisted(self, namespace: str | None, listed: set[tuple[str, str]], newest: str) -> Sequence[Key]:
        """Jobs in a namespace, or (None) all, that are not among the listed and no newer than `newest`."""
        here = ((key, cached) for key, cached in self._jobs.items() if namespace in (None, key.namespace))
        return [key for key, cached in here if key not in listed and not is_newer(cached.version, newest)]

    def unfinished(self) -> Sequence[Key]:
        """Jobs that have not ended, as far as is known."""
        return [key for key, cached in self._jobs.items() if not cached.ended]

    def all_keys(self) -> Sequence[Key]:
        """All jobs."""
        return list(self._jobs)

    def is_current(self, kind: str, raw: Raw) -> bool:
        """Whether a job or child is known as it is listed, or nobody has to know it."""
        metadata = raw["metadata"]
        if kind == FINETUNE_PLURAL:
            cached = self._jobs.get(Key(metadata["namespace"], metadata["name"]))
            same = cached is not None and cached.uid == metadata["uid"]
            return same and not is_newer(metadata["resourceVersion"], cached.version if cached else "")
        labels = metadata.get("labels") or {}
        cached = self._jobs.get(Key(metadata.get("namespace", ""), labels.get(JOB_NAME_LABEL, "")))
        if cached is None or cached.uid != labels.get(JOB_UID_LABEL) or cached.ended or cached.done:
            return True
        return self.children(cached.key, cached.uid).is_current(kind, metadata)

    def newest(self, kind: str) -> str:
        """The latest resourceVersion of a kind that was seen; empty for none."""
        return self._newest.get(kind, "")

    def is_rewound(self, kind: str, raw: Raw, newest: str) -> bool:
        """Whether an object that is listed is older than it was known to be before it was listed.

        Args:
            kind: of the object.
            raw: the object, or its metadata alone.
            newest: what `newest` was before the list was asked for, which then is of that moment at least.
        """
        metadata = raw["metadata"]
        if kind == FINETUNE_PLURAL:
            cached = self._jobs.get(Key(metadata["namespace"], metadata["name"]))
            known = cached.version if cached is not None and cached.uid == metadata["uid"] else None
        else:
            labels = metadata.get("labels") or {}
            place = (metadata["namespace"], labels.get(JOB_NAME_LABEL, ""), labels.get(JOB_UID_LABEL, ""))
            children = self._children.get(place)
            known = children.version_of(kind, metadata) if children is not None else None
        if not known or not (known.isdecimal() and newest.isdecimal()) or is_newer(known, newest):
            return False
        return is_newer(known, metadata["resourceVersion"])

    def keep_only(
        self, kind: str, namespaces: Sequence[str | None], listed: set[tuple[str, str]], newest: str
    ) -> set[Key]:
        """Drop children of a kind that are not among the listed (namespace, name); the jobs that had any.

        Args:
            kind: PYTORCH_PLURAL or PODS_PLURAL.
            namespaces: where was listed.
            listed: what there was.
            newest: what `newest` was before. What is newer may be younger than the list.
        """
        names: dict[str, set[str]] = {}
        for namespace, name in listed:
            names.setdefault(namespace, set()).add(name)
        bereft = set()
        for place, children in list(self._children.items()):
            if None in namespaces or children.key.namespace in namespaces:
                lost = children.keep_only(kind, names.get(children.key.namespace, set()), newest)
                cached = self._jobs.get(children.key)
                if cached is not None and cached.uid == children.job_uid:
                    if lost:
                        bereft.add(children.key)
                elif children.empty or self.synced:
                    # All jobs were listed: there is none, whatever labels and owners say.
                    del self._children[place]
        return bereft

    def size(self) -> tuple[int, int]:
        """Number of jobs, and of jobs with children, of which something is kept."""
        return len(self._jobs), len(self._children)

    def current_attempt(self, namespace: str, name: str, uid: str) -> tuple[int, str] | None:
        """Number of the job's current attempt and uid of its PyTorchJob; None when it is not known."""
        cached = self._jobs.get(Key(namespace, name))
        if cached is None or cached.uid != uid or cached.attempt is None or not cached.pytorch_job_uid:
            return None
        return cached.attempt, cached.pytorch_job_uid

    def expects(self, namespace: str, pod: str) -> bool:
        """Whether a pod of that name may be the first worker of a job's open attempt."""
        cached = self._stems.get((namespace, pod.rpartition("-worker-")[0].rpartition("-")[0]))
        if cached is None or cached.attempt is None:
            return False
        return pod == pod_name(child_name(cached.key.name, cached.uid, cached.attempt), 0)

    def open_namespaces(self) -> set[str]:
        """Namespaces in which an attempt is open."""
        return {key.namespace for key, cached in self._jobs.items() if cached.attempt is not None}

    def phases(self) -> Mapping[Phase, int]:
        """Number of jobs in each phase."""
        return Counter(cached.phase for cached in self._jobs.values() if cached.phase is not None)

    def longest_waits(self, now: datetime) -> Mapping[str, float]:
        """By what jobs wait for: how long the one has waited that has waited longest (seconds)."""
        since: dict[str, datetime] = {}
        for reason, begun in (cached.waiting for cached in self._jobs.values() if cached.waiting is not None):
            since[reason] = min(begun, since.get(reason, begun))
        return {reason: (now - begun).total_seconds() for reason, begun in since.items()}

    def gpus(self) -> int:
        """GPUs of all attempts that run."""
        return sum(cached.gpus for cached in self._jobs.values())

    def _note_told(self, kind: str, version: str) -> None:
        if is_newer(version, self._newest.get(kind, "")):
            self._newest[kind] = version

    def _children_of(self, metadata: Mapping[str, Any]) -> Children | None:
        """The children among which an object belongs by its labels; None where nobody has to know it."""
        labels, namespace = metadata.get("labels") or {}, metadata.get("namespace")
        name, uid = labels.get(JOB_NAME_LABEL), labels.get(JOB_UID_LABEL)
        if not (namespace and name and uid):
            return None
        cached = self._jobs.get(Key(namespace, name))
        if cached is not None and (cached.uid != uid or cached.done):
            # Those of another job of that name, or of one of which nothing is awaited.
            self._children.pop((namespace, name, uid), None)
            return None
        return self.children(Key(namespace, name), uid)
