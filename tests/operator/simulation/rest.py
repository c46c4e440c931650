"""What must hold once everything was delivered and nothing is due: the world is as it was asked for, and stays so."""

from __future__ import annotations

import json

from finetune_operator.names import ATTEMPT_LABEL, JOB_UID_LABEL, SPEC_KEY, WORKER_REPLICA, child_name
from finetune_operator.queue import Key
from finetune_operator.wire import Raw
from tests.operator.simulation.actors import is_over
from tests.operator.simulation.clients import NAMESPACE, is_going, owner_uid
from tests.operator.simulation.model import Model, ends_of
from tests.operator.simulation.world import World

AT_WORK = {"Preparing", "Running", "Publishing"}


def check(world: World, model: Model) -> None:
    """Check a world that has settled.

    Raises:
        AssertionError: says what did not hold.
    """
    jobs = world.client.find("finetunejobs")
    for job in jobs:
        status = job.get("status") or {}
        if is_going(job):
            _holds_nothing(world, model, job)
        else:
            assert status["observedGeneration"] == job["metadata"]["generation"]
            expected = _expected(world, model, job)
            assert status["phase"] in expected, f"{status} at rest, not {expected}"
    keys = [Key(NAMESPACE, job["metadata"]["name"]) for job in jobs]
    _writes_nothing(world, keys)
    for operator in world.alive:  # after a resync
        assert sorted(operator.cache.all_keys()) == keys, "what is kept outlives its job, or is missing"
        assert operator.cache.size()[1] <= len(_uids(world)), "children are kept that are gone"


def _uids(world: World) -> set[str]:
    """uids of all jobs of which there is something."""
    children = [raw for plural in ("pytorchjobs", "pods") for raw in world.client.find(plural, labels=JOB_UID_LABEL)]
    labelled = {raw["metadata"]["labels"][JOB_UID_LABEL] for raw in children}
    return labelled | {job["metadata"]["uid"] for job in world.client.find("finetunejobs")}


def _writes_nothing(world: World, keys: list[Key]) -> None:
    """Neither from what the watches told nor from what is read, and nor does an operator that has just begun."""

    def reconcile(*, live: bool) -> None:
        for operator in world.alive:
            for key in keys:
                cached = operator.cache.find(key)
                if live and cached is not None:
                    cached.raw = None
                operator.queue.add(key)

    assert world.writes_during(lambda: reconcile(live=False)) == []
    assert world.writes_during(lambda: reconcile(live=True)) == []
    for operator in world.alive:
        operator.resync()
    world.pass_time(10.0)
    assert [operator.heartbeat.missed for operator in world.alive] == [0] * len(world.alive)
    assert world.writes_during(world.start_operator) == []
    world.operators[-1].crash()


def _expected(world: World, model: Model, job: Raw) -> set[str]:
    status, spec, metadata = job["status"], job["spec"], job["metadata"]
    end = model.ends.get(metadata["uid"])
    if end is not None:
        _holds_nothing(world, model, job)
        return {"Succeeded"} if end["status"] == "True" else {"Failed"}
    ended, attempt = len(status.get("attempts", ())), status.get("attempt", 0)
    if attempt > ended:
        assert not spec.get("suspend"), "a suspended job has an open attempt"
        return _doing(world, job, attempt)
    child = world.client.get("pytorchjobs", child_name(metadata["name"], metadata["uid"], attempt))
    if spec.get("suspend"):
        return {"Suspended"}
    why = set()
    if model.holding(metadata["uid"]) or (child is not None and owner_uid(child) == metadata["uid"]):
        why.add("Retrying")
    following = child_name(metadata["name"], metadata["uid"], ended + 1)
    found = [world.client.get(kind, following) for kind in ("pytorchjobs", "configmaps")]
    if [raw for raw in found if raw is not None and owner_uid(raw) != metadata["uid"]]:
        why.add("Pending")
    if not _can_be_trained(world, job):
        why.add("Pending")
    assert why, f"nothing holds the next attempt back: {status}"
    return why


def _can_be_trained(world: World, job: Raw) -> bool:
    """Whether its spec is valid, and is what the first attempt was made of."""
    path, metadata = job["spec"]["train_path"], job["metadata"]
    first = world.client.get("configmaps", child_name(metadata["name"], metadata["uid"], 1))
    if path.startswith("/"):
        return False
    if first is None or owner_uid(first) != metadata["uid"] or job["status"].get("attempt") is None:
        return True
    return bool(json.loads(first["data"][SPEC_KEY])["train_path"] == path)


def _doing(world: World, job: Raw, attempt: int) -> set[str]:
    uid = job["metadata"]["uid"]
    child = world.client.get("pytorchjobs", child_name(job["metadata"]["name"], uid, attempt))
    assert child is not None, "an open attempt without PyTorchJob"
    assert owner_uid(child) == uid, "an open attempt with the PyTorchJob of somebody else"
    assert not is_going(child), "an open attempt whose PyTorchJob is on its way out"
    ends = [item["type"] for item in child["status"]["conditions"] if item["type"] in ("Failed", "Succeeded")]
    assert not ends, f"an open attempt whose PyTorchJob has {ends}"
    if child["spec"]["runPolicy"].get("suspend"):
        return {"Queued"}
    labels = f"{JOB_UID_LABEL}={uid},{ATTEMPT_LABEL}={attempt}"
    pods = [pod for pod in world.client.find("pods", labels=labels) if owner_uid(pod) == child["metadata"]["uid"]]
    assert not pods or not all(is_over(pod) for pod in pods), "an open attempt that is over"
    assert not [pod for pod in pods if "Succeeded" in ends_of(pod)], "an open attempt that has an adapter"
    started = [pod for pod in pods if pod["status"]["phase"] != "Pending"]
    nodes = child["spec"]["pytorchReplicaSpecs"][WORKER_REPLICA]["replicas"]
    return AT_WORK if len(started) >= nodes else {"Starting"}


def _holds_nothing(world: World, model: Model, job: Raw) -> None:
    uid = job["metadata"]["uid"]
    found = [raw for raw in world.client.find("pytorchjobs") if owner_uid(raw) == uid]
    # One that somebody's finalizer holds keeps its pods.
    children = {raw["metadata"]["uid"] for raw in found if not is_going(raw)}
    held = [pod["metadata"]["name"] for pod in model.holding(uid) if owner_uid(pod) in children]
    assert not held, f"a job at its end holds {held}"
