"""Who may report progress, decided by a real API server over real tokens that are bound to real pods."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx

from finetune_api.outcome import Reason
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.progress_status import Phase, Progress
from tests.cluster.api import Api
from tests.cluster.kubelet import Kubelet
from tests.cluster.reporter import Reporter, dressed_up_as
from tests.cluster.scene import Scene, failure


def test_the_trainer_of_the_first_worker_moves_the_progress_in_status(
    reporter: Reporter, api: Api, kubelet: Kubelet
) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply(workers={"nodes": 2, "gpusPerNode": 0})
    first, _ = scene.run(count=2)

    trainer = ProgressReporter(reporter.endpoint(reporter.token(first)), interval_seconds=0)
    trainer.start()
    trainer.update(Progress(phase=Phase.RUNNING, percent=25, step=2, total_steps=8, loss=1.25))
    job = api.wait("FineTuneJob", "guard", lambda job: job["status"].get("progress", {}).get("percent") == 25)
    trainer.close()

    progress = job["status"]["progress"]
    assert (progress["step"], progress["totalSteps"], progress["loss"]) == (2, 8, 1.25)
    assert "etaSeconds" not in progress
    assert job["status"]["phase"] == "Running"


def with_claims(token: str, **changed: Any) -> str:
    """The token as somebody rewrites it who has no key to sign it with."""
    head, payload, signature = token.split(".")
    claims = {**json.loads(base64.urlsafe_b64decode(payload + "==")), **changed}
    return f"{head}.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.{signature}"


def test_tokens_that_are_wrong_foreign_or_missing_change_nothing_and_most_cost_the_api_server_nothing(
    reporter: Reporter, api: Api, kubelet: Kubelet
) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply(workers={"nodes": 2, "gpusPerNode": 0})
    first, second = scene.run(count=2)
    impostor = api.create(dressed_up_as(first, "impostor"))
    deleted = api.create(dressed_up_as(first, "deleted"))
    token_of_deleted = reporter.token(deleted)
    api.delete("Pod", "deleted", grace_seconds=0)
    api.wait_gone("Pod", "deleted")
    good = reporter.token(first)

    tokens = {
        "garbage": ("garbage", 401),
        "for the API server": (reporter.token(first, "https://kubernetes.default.svc"), 401),
        "for the API server, rewritten": (
            with_claims(reporter.token(first, "https://kubernetes.default.svc"), aud=["finetune-operator"]),
            401,
        ),
        "expired": (with_claims(good, exp=1_700_000_000), 401),
        "of no pod": (reporter.token(None), 403),
        "tampered": (f"{good[:-8]}AAAAAAAA", 401),
        "of another namespace, rewritten": (
            with_claims(good, sub="system:serviceaccount:kube-system:default"),
            401,
        ),
        "of the second worker": (reporter.token(second), 503),
        "of a pod with a worker's labels": (reporter.token(impostor), 503),
        "of a deleted pod": (token_of_deleted, 503),
    }
    answers, reviews = {}, {}
    for number, (name, (token, _)) in enumerate(tokens.items()):
        since = reporter.control_plane.audit.position()
        answers[name] = reporter.post(token, number)
        reviews[name] = reporter.reviews(since)
    assert answers == {name: status for name, (_, status) in tokens.items()}
    reviewed = {name for name, count in reviews.items() if count}
    assert reviewed == {
        "for the API server, rewritten",
        "tampered",
    }
    without = httpx.post(reporter.operator.progress_url, verify=reporter.trust(), json={}, trust_env=False)
    assert without.status_code == 401
    assert "progress" not in scene.status()

    assert reporter.post(good, 50) == 200
    job = api.wait("FineTuneJob", "guard", lambda job: "progress" in job["status"])
    assert job["status"]["progress"]["percent"] == 50
    assert good not in reporter.operator.log()


def test_a_job_reports_for_itself_and_no_token_of_it_moves_another(
    reporter: Reporter, api: Api, kubelet: Kubelet
) -> None:
    guard, other = Scene(api, kubelet, "guard"), Scene(api, kubelet, "other")
    for scene in (guard, other):
        scene.apply()
    (_,), (pod,) = guard.run(), other.run()
    assert reporter.post(reporter.token(pod), 60) == 200
    api.wait("FineTuneJob", "other", lambda job: job["status"].get("progress", {}).get("percent") == 60)
    assert "progress" not in guard.status()


def test_a_pod_of_another_namespace_with_all_labels_of_a_worker_moves_nothing(
    reporter: Reporter, api: Api, kubelet: Kubelet
) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply()
    (pod,) = scene.run()
    elsewhere = f"{api.namespace}-elsewhere"
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": elsewhere}})
    try:
        api.wait("ServiceAccount", "default", lambda found: True, namespace=elsewhere)
        twin = api.create(dressed_up_as(pod, pod["metadata"]["name"]), namespace=elsewhere)
        assert reporter.post(reporter.token(twin), 77) in (403, 503)
        assert "progress" not in scene.status()
    finally:
        api.delete("Namespace", elsewhere)


def test_a_pod_of_an_earlier_attempt_reports_no_more(reporter: Reporter, api: Api, kubelet: Kubelet) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply()
    (pod,) = scene.run()
    earlier = reporter.token(pod)
    assert reporter.post(earlier, 40) == 200
    kubelet.fail(pod, 204, failure(Reason.INTERNAL_ERROR))
    (pod,) = scene.run(attempt=2)

    # The operator may still remember whose the token is, though the API server knows no such pod any more.
    assert reporter.post(earlier, 45) in (401, 403)
    assert "percent" not in scene.status().get("progress", {})
    assert reporter.post(reporter.token(pod), 5) == 200
    job = api.wait("FineTuneJob", "guard", lambda job: "percent" in job["status"].get("progress", {}))
    assert job["status"]["progress"]["percent"] == 5


def test_a_token_that_is_sent_again_after_the_job_has_ended_changes_nothing(
    reporter: Reporter, api: Api, kubelet: Kubelet
) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply()
    (pod,) = scene.run()
    token = reporter.token(pod)
    assert reporter.post(token, 40) == 200
    kubelet.fail(pod, 11, failure(Reason.DATA_INVALID))
    before = scene.wait_phase("Failed")
    assert reporter.post(token, 99) in (401, 403, 503)
    assert scene.status().get("progress") == before.get("progress")
