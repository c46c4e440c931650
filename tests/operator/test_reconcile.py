"""One reconcile after another, by hand: what is asked for, what is kept, and what becomes of refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest

from finetune_api.load import load_manifest
from finetune_operator import observe
from finetune_operator.errors import ApiError, api_error
from finetune_operator.names import FINETUNE_PLURAL, KUEUE_QUEUE_LABEL, PYTORCH_PLURAL
from finetune_operator.progress.sender import Sender
from finetune_operator.queue import NotBefore
from finetune_operator.reconcile import (
    BACKOFF_LIMIT_SECONDS,
    FIRST_BACKOFF_SECONDS,
    FIRST_CONFLICT_SECONDS,
)
from finetune_operator.wire import Raw
from tests.operator.desk import KEY, Desk, always
from tests.operator.simulation.actors import End
from tests.operator.simulation.author import FINALIZER, NAME, report
from tests.operator.simulation.clients import NAMESPACE


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_a_label_that_nobody_copies_costs_no_parse(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    load = load_manifest

    def counting(raw: Mapping[str, Any]) -> Any:
        parsed.append(raw["metadata"]["uid"])
        return load(raw)

    monkeypatch.setattr(observe, "load_manifest", counting)
    raw = desk.apply(suspend=True)
    desk.settle()
    assert len(parsed) == 1
    for number in range(20):
        desk.client.patch(raw, {"metadata": {"labels": {"team": str(number)}}})
        desk.reconcile()
    assert len(parsed) == 1
    desk.client.patch(raw, {"metadata": {"labels": {KUEUE_QUEUE_LABEL: "other"}}})
    desk.reconcile()
    assert len(parsed) == 2


def test_of_a_job_that_is_suspended_nothing_is_kept_that_its_author_can_fill(desk: Desk) -> None:
    raw = desk.apply(suspend=True)
    filled = {f"label-{number}": "x" for number in range(1000)}
    desk.client.patch(raw, {"metadata": {"labels": {**filled, KUEUE_QUEUE_LABEL: "other"}, "annotations": filled}})
    desk.settle()
    cached = desk.cached()
    assert cached.raw is not None
    assert cached.raw["metadata"]["labels"] == {KUEUE_QUEUE_LABEL: "other"}
    assert cached.spec is not None
    assert cached.spec.job is not None
    assert (cached.spec.job.metadata.labels, cached.spec.job.metadata.annotations) == ({KUEUE_QUEUE_LABEL: "other"}, {})
    desk.client.patch(raw, {"spec": {"suspend": False}})
    desk.settle()
    (made,) = desk.client.find(PYTORCH_PLURAL)
    assert made["metadata"]["labels"][KUEUE_QUEUE_LABEL] == "other"
    assert not made["metadata"]["labels"].keys() & filled.keys()


def test_a_spec_that_is_too_large_to_be_kept_is_read_when_it_is_its_turn(desk: Desk) -> None:
    raw = desk.apply(workers={"env": [{"name": f"NAME_{number}", "value": "x" * 1000} for number in range(30)]})
    desk.cache.job_seen(raw)
    kept = desk.cached().raw
    assert kept is not None
    assert "spec" not in kept
    desk.settle()
    assert [made["metadata"]["name"] for made in desk.client.find(PYTORCH_PLURAL)]


def test_a_spec_is_not_kept_once_its_attempt_is_there(desk: Desk) -> None:
    desk.apply()
    desk.settle()
    cached = desk.cached()
    assert cached.spec is not None
    assert cached.spec.job is None
    assert cached.raw is not None
    assert "spec" not in cached.raw


def test_nor_by_an_operator_that_finds_the_attempt(desk: Desk) -> None:
    desk.apply()
    desk.settle()
    desk.cache.forget(KEY)
    desk.reconcile()
    assert desk.cached().attempt == 1
    spec = desk.cached().spec
    assert spec is not None
    assert spec.job is None


@pytest.mark.parametrize("how", [End.ADAPTER, End.USER_ERROR])
@pytest.mark.parametrize("ttl", [None, 3600])
def test_no_spec_is_kept_of_a_job_that_has_ended(desk: Desk, how: End, ttl: int | None) -> None:
    desk.apply(ttlSecondsAfterFinished=ttl)
    desk.settle()
    desk.kubelet.run(desk.pods()[0])
    desk.kubelet.end(desk.pods()[0], how)
    desk.settle()
    assert desk.job()["status"]["phase"] == ("Succeeded" if how is End.ADAPTER else "Failed")
    again = desk.reconcile()
    assert (again, desk.cached().done) == (ttl, ttl is None)
    assert desk.cached().spec is None
    raw = desk.cached().raw
    assert (raw is None) == (ttl is None)
    assert raw is None or set(raw) == {"apiVersion", "kind", "metadata", "status"}
    if ttl is not None:
        desk.wait(ttl)
        desk.reconcile()
        assert desk.client.find(FINETUNE_PLURAL) == []


def test_a_job_that_has_ended_is_looked_after_until_its_pytorchjob_is_over(desk: Desk) -> None:
    """Its queue may have stopped it meanwhile, and may let it go on, with new pods."""
    desk.apply()
    desk.settle()
    desk.kubelet.run(desk.pods()[0])
    desk.kubelet.end(desk.pods()[0], End.ADAPTER)
    for _ in range(3):
        desk.reconcile()
    assert desk.job()["status"]["phase"] == "Succeeded"
    assert not desk.cached().done
    desk.settle()
    assert desk.cached().done


def test_a_spec_is_kept_until_the_verdict_on_the_adapter(desk: Desk) -> None:
    desk.apply(output={"uri": "s3://models/team", "verify": True})
    desk.settle()
    desk.kubelet.run(desk.pods()[0])
    desk.kubelet.end(desk.pods()[0], End.ADAPTER)
    desk.settle()
    assert desk.cached().verifying
    kept = desk.cached().spec
    assert kept is not None
    desk.reconcile()
    assert desk.cached().spec is kept
    (verification,) = desk.client.find("jobs")
    desk.client.delete(verification)
    desk.settle()
    assert desk.cached().done
    assert desk.cached().spec is None


def test_nothing_large_is_kept_of_a_job_that_somebodys_finalizer_holds(desk: Desk) -> None:
    desk.client.patch(desk.apply(), {"metadata": {"finalizers": [FINALIZER]}})
    desk.settle()
    desk.client.delete(desk.job())
    desk.settle()
    assert desk.client.find(PYTORCH_PLURAL) == []
    assert (desk.cached().raw, desk.cached().spec) == (None, None)


@pytest.mark.parametrize(
    ("goes", "fails"),
    [
        (("GET", "/finetunejobs/"), ("GET", "/finetunejobs/")),
        (("GET", "/finetunejobs/"), ("POST", "/configmaps")),
        (("POST", "/configmaps"), ("POST", "/configmaps")),
        (("POST", "/pytorchjobs"), ("POST", "/pytorchjobs")),
        (("GET", "/finetunejobs/"), ("PUT", "/status")),
        (("POST", "/pytorchjobs"), ("PUT", "/status")),
        (("PUT", "/status"), ("PUT", "/status")),
    ],
)
@pytest.mark.parametrize("wait", [None, 7.0])
def test_nothing_is_kept_of_a_job_that_goes_while_a_reconcile_of_it_fails(
    desk: Desk, goes: tuple[str, str], fails: tuple[str, str], wait: float | None
) -> None:
    """Its deletion is told after it was read, or before what was read of it a moment earlier arrives."""
    desk.apply()
    desk.wire.refuse = always("POST", "/configmaps", api_error(500, "InternalError", "no answer"))
    desk.reconcile()
    assert desk.reconciler._failures == {KEY: 1}
    desk.cached().raw = None
    asked: list[str] = []

    def refuse(method: str, path: str) -> ApiError | None:
        if method == goes[0] and goes[1] in path:
            desk.reconciler.forget(KEY)
        if method != fails[0] or fails[1] not in path:
            return None
        asked.append(path)
        return api_error(429 if wait else 500, "TooManyRequests" if wait else "InternalError", "no answer", wait)

    desk.wire.refuse = refuse
    with pytest.raises(NotBefore) if wait else nullcontext():
        asyncio.run(desk.reconciler.reconcile(KEY))
    assert asked
    assert (desk.cache.size(), desk.reconciler._failures, desk.reconciler._under_way) == ((0, 0), {}, {})


@pytest.mark.parametrize("asked", [("GET", "/finetunejobs/"), ("PUT", "/status")])
def test_the_next_job_of_a_name_outlives_the_news_that_the_last_one_is_gone(desk: Desk, asked: tuple[str, str]) -> None:
    """A watch told of it before the answer came that there was none."""
    desk.apply(suspend=True)

    def refuse(method: str, path: str) -> ApiError | None:
        if method != asked[0] or asked[1] not in path:
            return None
        desk.client.delete(desk.job())
        desk.reconciler.forget(KEY)
        desk.cache.job_seen(desk.apply())
        desk.wire.refuse = lambda method, path: None
        return api_error(404, "NotFound", "finetunejobs not found")

    for raw in desk.client.find(FINETUNE_PLURAL):
        desk.cache.job_seen(raw)
    desk.cached().raw = None
    desk.wire.refuse = refuse
    assert asyncio.run(desk.reconciler.reconcile(KEY)) is None
    assert desk.cached().uid == desk.job()["metadata"]["uid"]
    desk.settle()
    assert desk.job()["status"]["attempt"] == 1


def test_a_job_of_which_no_event_told_and_that_cannot_be_read_is_tried_less_and_less_often(desk: Desk) -> None:
    desk.wire.refuse = always("GET", "/finetunejobs/", api_error(500, "InternalError", "no answer"))
    waits = [asyncio.run(desk.reconciler.reconcile(KEY)) for _ in range(3)]
    assert waits == [FIRST_BACKOFF_SECONDS * 2**number for number in range(3)]
    desk.wire.refuse = lambda method, path: None
    assert asyncio.run(desk.reconciler.reconcile(KEY)) is None
    assert (desk.cache.size(), desk.reconciler._failures) == ((0, 0), {})


@pytest.mark.parametrize(
    ("refused", "said"),
    [("configmaps", "is asked about ConfigMaps"), ("pytorchjobs", "is asked about PyTorchJobs")],
)
def test_a_webhook_that_is_down_is_told_of_the_object_that_it_is_asked_about(
    desk: Desk, refused: str, said: str
) -> None:
    text = 'failed calling webhook "policy.example.com": connection refused'
    desk.wire.refuse = always("POST", f"/{refused}", api_error(500, "InternalError", text))
    desk.apply()
    desk.reconcile()
    reason, message = desk.reason()
    assert reason == "AdmissionUnavailable"
    assert said in message
    assert "policy.example.com" in message


@pytest.mark.parametrize("path", ["/status", "/configmaps"])
def test_conflicts_in_a_row_wait_longer_and_longer(desk: Desk, path: str) -> None:
    conflict = api_error(409, "Conflict", "the object has been modified")
    desk.wire.refuse = lambda method, asked: conflict if method in ("POST", "PUT") and path in asked else None
    desk.apply(suspend=path == "/status")
    waits = [desk.reconcile() for _ in range(14)]
    expected = [min(BACKOFF_LIMIT_SECONDS, FIRST_CONFLICT_SECONDS * 2**number) for number in range(14)]
    assert waits == expected
    assert desk.counted("conflict") == 14
    desk.wire.refuse = lambda method, asked: None
    desk.settle()
    desk.wire.refuse = always("PUT", "/status", conflict)
    desk.client.patch(desk.job(), {"spec": {"suspend": path != "/status"}})
    assert desk.reconcile() == FIRST_CONFLICT_SECONDS


def test_a_config_map_of_ours_that_cannot_go_is_tried_less_and_less_often(desk: Desk) -> None:
    """It is of another spec, left by an operator that was stopped, and somebody's finalizer holds it."""
    job = desk.apply()
    desk.wire.refuse = always("POST", "/pytorchjobs", api_error(None, "TimeoutError", "no answer"))
    desk.reconcile()
    (left,) = desk.client.find("configmaps")
    desk.client.patch(left, {"metadata": {"finalizers": ["example.com/wait"]}})
    desk.client.patch(job, {"spec": {"model_id": "meta-llama/Meta-Llama-3-70B-Instruct"}})
    desk.wire.refuse = lambda method, path: None
    waits = [desk.reconcile() for _ in range(12)]
    assert waits[:10] == sorted(filter(None, set(waits[:10])))
    desk.client.patch(left, {"metadata": {"finalizers": None}})
    desk.settle()
    assert desk.job()["status"]["attempt"] == 1


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("owner", ["none", "another", "another of that name", "its own"])
def test_an_adapter_is_believed_of_a_pod_of_the_attempts_own_after_its_pytorchjob_has_gone(
    desk: Desk, owner: str, restarted: bool
) -> None:
    """An operator that has not seen that one goes by its name."""
    desk.apply()
    desk.settle()
    (pod,) = desk.pods()
    desk.kubelet.run(pod)
    owners = {
        "none": None,
        "another": [{**pod["metadata"]["ownerReferences"][0], "uid": "another", "name": "another"}],
        "another of that name": [{**pod["metadata"]["ownerReferences"][0], "uid": "another"}],
        "its own": pod["metadata"]["ownerReferences"],
    }[owner]
    desk.kubelet.end(desk.pods()[0], End.ADAPTER)
    desk.client.patch(desk.pods()[0], {"metadata": {"ownerReferences": owners}})
    desk.client.delete(desk.client.find(PYTORCH_PLURAL)[0])
    if restarted:
        desk.cache.forget(KEY)
    desk.reconcile()
    attempt = desk.job()["status"]["attempts"][-1]
    believed = owner == "its own" or (owner == "another of that name" and restarted)
    assert attempt["reason"] == ("Succeeded" if believed else "WorkersDeleted")
    assert ("adapter" in desk.job()["status"]) is believed


def test_a_report_of_before_a_suspension_is_not_shown_after_it(desk: Desk) -> None:
    desk.apply()
    desk.settle()
    desk.kubelet.run(desk.pods()[0])
    desk.settle()
    (child,) = desk.client.find(PYTORCH_PLURAL)
    sender = Sender(
        NAMESPACE,
        NAME,
        desk.job()["metadata"]["uid"],
        1,
        child["metadata"]["uid"],
        desk.pods()[0]["metadata"]["name"],
        pod_created_at=desk.now(),
    )
    desk.inbox.deliver(sender, report("Running", 7, desk.now()))
    desk.settle()
    assert desk.job()["status"]["progress"]["step"] == 7
    assert desk.job()["status"]["phase"] == "Running"
    for suspended in (True, False):
        desk.wait(60)
        desk.client.patch(child, {"spec": {"runPolicy": {"suspend": suspended}}})
        desk.settle()
        desk.confirm()
        desk.settle()
    desk.kubelet.run(desk.pods()[-1])
    desk.settle()
    assert desk.job()["status"]["phase"] == "Preparing"


def test_a_config_map_whose_pytorchjob_somebody_deleted_goes_before_the_next_attempt(desk: Desk) -> None:
    desk.apply(backoffLimit=5)
    for attempt in (1, 2):
        desk.settle()
        desk.wait(600)
        desk.settle()
        assert desk.job()["status"]["attempt"] == attempt
        (child,) = desk.client.find(PYTORCH_PLURAL)
        desk.client.delete(child)
        desk.client.delete(desk.pods()[-1])
    desk.settle()
    desk.wait(600)
    desk.settle()
    assert desk.job()["status"]["attempt"] == 3
    assert [raw["metadata"]["name"][-2:] for raw in desk.client.find("configmaps")] == ["-1", "-3"]


def test_a_job_that_goes_while_it_is_reconciled_is_no_error(desk: Desk) -> None:
    desk.apply()
    gone = api_error(404, "NotFound", "finetunejobs not found")
    desk.wire.refuse = always("PUT", "/status", gone)
    assert desk.reconcile() is None
    assert desk.counted("error") == 0
    assert desk.counted("success") == 1
    assert desk.cache.find(KEY) is None


def test_an_attempt_and_a_verification_avoid_the_node_that_could_not_start_the_last_one(desk: Desk) -> None:
    desk.apply(output={"uri": "s3://models/team", "verify": True})
    desk.settle()
    (pod,) = desk.pods()
    bound = desk.client.patch(pod, {"spec": {"nodeName": "bad-node"}})
    desk.client.set_status(bound, start_error(pod))
    desk.settle()
    desk.wait(600)
    desk.settle()
    assert desk.job()["status"]["attempt"] == 2
    (child,) = desk.client.find(PYTORCH_PLURAL)
    template = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert avoided(template) == ["bad-node"]
    desk.kubelet.run(desk.pods()[-1])
    desk.kubelet.end(desk.pods()[-1], End.ADAPTER)
    desk.settle()
    (verification,) = desk.client.find("jobs")
    assert avoided(verification["spec"]["template"]) == ["bad-node"]


def start_error(pod: Raw) -> Raw:
    """The status of a pod whose container a broken node could not start."""
    ended = {"exitCode": 128, "reason": "StartError", "message": "nvidia-container-cli: initialization error"}
    name = pod["spec"]["containers"][0]["name"]
    return {"phase": "Failed", "containerStatuses": [{"name": name, "state": {"terminated": ended}}]}


def avoided(template: Raw) -> list[str]:
    """Nodes that the pods had better not run on."""
    affinity: dict[str, Any] = template["spec"]["affinity"]["nodeAffinity"]
    (preferred,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = (one for expressions in preferred["preference"].values() for one in expressions)
    assert expression["operator"] == "NotIn"
    return list(expression["values"])
