"""What an operator may ask for, and what it may say: judged when its request arrives, by what the server holds then.

The model knows nothing of how the operator decides. It notes what happened to each attempt, and how each job ended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from finetune_api.outcome import TerminationMessage
from finetune_operator.names import ATTEMPT_LABEL, JOB_UID_LABEL, REPLICA_INDEX_LABEL
from finetune_operator.wire import Raw
from tests.operator.simulation.actors import is_over
from tests.operator.simulation.clients import Client, is_going, owner_uid
from tests.operator.simulation.server import Change, SimulatedServer
from tests.operator.simulation.wire import Call

UNCOUNTED = ("Suspended", "Disrupted", "WorkersDeleted", "DeadlineExceeded")
GROWING = ("attempt", "failures", "activeSeconds")
_HIDDEN = {"ResultMissing", "WorkersFailed", "Disrupted"}
"""For what a pod without our labels may have said."""
_CODES = {0: "ResultMissing", 137: "Disrupted", 139: "TrainerCrashed"}


class Model:
    """Judges what operators do; `witness` raises an AssertionError that says what did not hold."""

    def __init__(self, server: SimulatedServer) -> None:
        self._client = Client(server)
        self.happened: dict[tuple[str, int], set[str]] = defaultdict(set)
        """uid of a job and number of an attempt -> reasons for which that may end."""
        self.ends: dict[str, Raw] = {}
        """uid of a job -> its condition Succeeded, once that was True or False."""
        self._jobs: set[str] = set()
        """uids of all jobs that there ever were."""
        self._attempts: dict[str, tuple[str, int]] = {}
        """uid of a PyTorchJob or pod -> uid of its job, and number of its attempt."""
        self._released: set[str] = set()
        """uids of PyTorchJobs that an operator deleted."""
        server.listeners.append(self._note)

    def witness(self, call: Call, sent: Sequence[Call]) -> None:
        """A request is about to be carried out.

        Args:
            call: the request.
            sent: what the same operator sent before.
        """
        mine = [one for one in sent if one.task == call.task]
        reads = [one for one in mine if one.method == "GET" and one.place.plural == "finetunejobs" and one.place.name]
        read_at = reads[-1].version if reads else None
        match call.method, call.place.plural:
            case "POST", "pytorchjobs":
                self._may_create(call, read_at)
            case "DELETE", _:
                self._may_delete(call, read_at)
            case "PUT", "finetunejobs":
                assert call.place.part == "status"
                self._may_say(call, read_at)
            case _:
                assert call.method == "GET" or call.place.plural in ("configmaps", "events"), f"nobody asked for {call}"

    def _may_create(self, call: Call, read_at: int | None) -> None:
        labels = call.body["metadata"]["labels"]
        uid, number = labels[JOB_UID_LABEL], int(labels[ATTEMPT_LABEL])
        assert number == 1 or read_at is not None, "a further attempt is made of what a watch told"
        others = [raw for raw in self._client.find("pytorchjobs") if owner_uid(raw) == uid]
        assert {raw["metadata"]["name"] for raw in others} <= {call.body["metadata"]["name"]}, "two attempts at once"
        holding = [pod["metadata"]["labels"][ATTEMPT_LABEL] for pod in self.holding(uid)]
        assert set(holding) <= {str(number)}, "pods of an earlier attempt still hold machines"
        job = self._job(uid)
        if job is None or read_at is None or int(job["metadata"]["resourceVersion"]) > read_at:
            return  # it has changed since: at rest nothing may be left of that
        status, spec = job.get("status") or {}, job["spec"]
        assert uid not in self.ends, "an attempt after the end"
        assert number == 1 + len(status.get("attempts", ())), "an attempt is left out, or made twice"
        assert status.get("failures", 0) <= spec.get("backoffLimit", 3), "one attempt more than allowed"
        assert not spec.get("suspend"), "an attempt of a suspended job"
        assert not is_going(job), "an attempt of a job that is on its way out"

    def _may_delete(self, call: Call, read_at: int | None) -> None:
        assert read_at is not None, "something is deleted because of what a watch told"
        meant = call.body["preconditions"]
        found = self._client.get(call.place.plural, call.place.name)
        if found is None or found["metadata"]["uid"] != meant["uid"]:
            return
        if call.place.plural == "finetunejobs":
            if meant["resourceVersion"] == found["metadata"]["resourceVersion"]:
                assert meant["uid"] in self.ends, "a job is deleted that has not ended"
                assert found["spec"].get("ttlSecondsAfterFinished") is not None, "a job is deleted that was to stay"
            return
        assert owner_uid(found) in self._jobs, "something of somebody else's is deleted"
        self._released.add(meant["uid"])

    def _may_say(self, call: Call, read_at: int | None) -> None:
        said, after = call.body["metadata"], call.body["status"]
        job = self._job(said["uid"])
        if job is None or said["resourceVersion"] != job["metadata"]["resourceVersion"]:
            return  # it is refused
        before = job.get("status") or {}
        old = {condition["type"]: condition for condition in before.get("conditions", ())}
        for condition in after["conditions"]:
            was = old.get(condition["type"], {})
            moved = was.get("lastTransitionTime") != condition["lastTransitionTime"]
            assert not moved or was.get("status") != condition["status"], "a transition without a change"
        assert after["observedGeneration"] <= job["metadata"]["generation"]
        for figure in GROWING:
            assert after.get(figure, 0) >= before.get(figure, 0), f"{figure} went back"
        assert _step(after) >= _step(before), "the checkpoint went back"
        attempts, known = after.get("attempts", []), before.get("attempts", [])
        assert attempts[: len(known)] == known, "the past is told anew"
        assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1))
        assert after.get("failures", 0) == sum(one["counted"] and one["reason"] != "Succeeded" for one in attempts)
        for attempt in attempts[len(known) :]:
            assert read_at is not None, "an attempt ends because of what a watch told"
            self._may_end(job, attempt, read_at)

    def _may_end(self, job: Raw, attempt: Raw, read_at: int) -> None:
        uid, number, reason = job["metadata"]["uid"], attempt["number"], attempt["reason"]
        allowed = set(self.happened[uid, number])
        allowed |= {"Suspended"} if job["spec"].get("suspend") else set()
        allowed |= {"DeadlineExceeded"} if job["spec"].get("activeDeadlineSeconds") else set()
        assert reason in allowed, f"attempt {number} ended with {reason}, but what happened is {sorted(allowed)}"
        assert reason == "PeerFailed" or attempt["counted"] == (reason not in UNCOUNTED), attempt
        for pod in self._client.find("pods", labels=f"{JOB_UID_LABEL}={uid},{ATTEMPT_LABEL}={number}"):
            if int(pod["metadata"]["resourceVersion"]) <= read_at and "Succeeded" in ends_of(pod):
                child = next((raw for raw in self._client.find("pytorchjobs") if _uid(raw) == owner_uid(pod)), None)
                queued = child is None or child["spec"]["runPolicy"].get("suspend") or owner_uid(child) != uid
                assert reason == "Succeeded" or queued, f"{reason}, although there is an adapter"

    def holding(self, uid: str) -> list[Raw]:
        """Pods with the labels of a job that hold machines."""
        return [pod for pod in self._client.find("pods", labels=f"{JOB_UID_LABEL}={uid}") if not is_over(pod)]

    def _job(self, uid: str) -> Raw | None:
        return next((raw for raw in self._client.find("finetunejobs") if _uid(raw) == uid), None)

    def _note(self, change: Change) -> None:
        raw = change.after or change.before or {}
        if change.place.plural == "finetunejobs":
            self._jobs.add(_uid(raw))
            found = [item for item in (raw.get("status") or {}).get("conditions", ()) if item["type"] == "Succeeded"]
            if found and found[0]["status"] != "Unknown":
                kept = self.ends.setdefault(_uid(raw), found[0])
                assert kept == found[0], "the end has changed"
            assert _uid(raw) not in self.ends or found, "the end is gone"
            return
        labels = raw["metadata"].get("labels") or {}
        if JOB_UID_LABEL in labels and ATTEMPT_LABEL in labels:
            self._attempts[_uid(raw)] = labels[JOB_UID_LABEL], int(labels[ATTEMPT_LABEL])
        if _uid(raw) not in self._attempts:
            return
        happened = self.happened[self._attempts[_uid(raw)]]
        goes = change.after is None or is_going(raw)
        if change.place.plural == "pods":
            hidden = _HIDDEN if JOB_UID_LABEL not in labels else set()
            happened |= ends_of(raw) | ({"Disrupted"} if goes else set()) | hidden
        elif change.place.plural == "pytorchjobs":
            ours = owner_uid(raw) == self._attempts[_uid(raw)][0]
            happened |= {"WorkersDeleted"} if not ours or (goes and _uid(raw) not in self._released) else set()
            if any(item["type"] == "Failed" for item in (raw.get("status") or {}).get("conditions", ())):
                happened |= {"Disrupted", "WorkersFailed"}


def ends_of(pod: Raw) -> set[str]:
    """The reason for which a pod has ended; Succeeded where it is the first worker's and names an adapter."""
    statuses = pod["status"].get("containerStatuses") or [{}]
    ended = statuses[0].get("state", {}).get("terminated")
    if ended is None:
        return set()
    words = TerminationMessage.parse(ended.get("message", ""))
    if words is None:
        return {_CODES[ended["exitCode"]]}
    if words.succeeded:
        return {"Succeeded"} if pod["metadata"]["labels"][REPLICA_INDEX_LABEL] == "0" else {"ResultMissing"}
    return {"Disrupted" if words.reason == "Terminated" else str(words.reason)}


def _step(status: Raw) -> int:
    return int((status.get("checkpoint") or {}).get("step", 0))


def _uid(raw: Raw) -> str:
    return str(raw["metadata"]["uid"])
