"""The verification of an adapter: one Job after success, whose end becomes the condition Verified, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_operator.names import KUEUE_QUEUE_LABEL
from tests.cluster.api import Api, Object, has_condition, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import ADAPTER, Scene, manifest, success, verdict
from tests.cluster.steps import Step, apply, crashes, play, run, succeeds
from tests.integrations.kstatus import CURRENT, kstatus

OUTPUT = {"uri": "s3://models/team-a", "verify": True}
SUCCEEDS = [
    Step(apply(output=OUTPUT), "Starting", "Starting"),
    Step(run(), "Preparing", "Preparing"),
    Step(succeeds(), "Succeeded", "Succeeded", says=ADAPTER.uri),
]


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


def jobs(scene: Scene) -> list[Object]:
    """All batch Jobs of the namespace."""
    return scene.api.list("Job")


def test_after_success_a_job_verifies_and_its_word_becomes_the_condition(scene: Scene) -> None:
    play(scene, SUCCEEDS[:2])
    assert scene.condition(scene.status(), "Verified")["status"] is None
    assert jobs(scene) == []
    play(scene, SUCCEEDS[2:])
    status = scene.wait_verified("Unknown", "Verifying", "opens the adapter in a process of its own")
    (job,) = jobs(scene)
    assert job["metadata"]["name"] == scene.verification()
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == (scene.job()["metadata"]["uid"], True)
    # Success is not taken back, and who waits for it alone waits no longer.
    assert (status["phase"], kstatus(scene.job())) == ("Succeeded", CURRENT)
    pod = scene.verifying_pod()
    (container,) = pod["spec"]["containers"]
    assert container["command"][-2:] == ["--adapter", ADAPTER.uri]
    scene.kubelet.run(pod)
    scene.kubelet.succeed(pod, verdict(True))
    status = scene.wait_verified("True", "AsTrained", "Ten of ten")
    assert [item["type"] for item in status["conditions"]] == ["Succeeded", "Verified"]
    assert kstatus(scene.job()) == CURRENT
    scene.wait_events(4)
    assert scene.events() == [
        ("Normal", "AttemptCreated"),
        ("Normal", "Succeeded"),
        ("Normal", "Verifying"),
        ("Normal", "AsTrained"),
    ]
    # Its log can still be read.
    scene.api.wait("Job", scene.verification(), lambda found: has_condition(found, "Complete"))
    assert scene.api.find("Pod", pod["metadata"]["name"])


Happening = Callable[[Scene, Object], object]

ENDS: dict[str, tuple[Happening, str, str, str]] = {
    "not as trained": (
        lambda scene, pod: scene.kubelet.fail(pod, 1, verdict(False, "2 of 10 differ: the BOS is doubled.")),
        "False",
        "NotAsTrained",
        "the BOS is doubled",
    ),
    "could not tell": (
        lambda scene, pod: scene.kubelet.fail(pod, 2, verdict(None, "The Hub did not answer: try again.")),
        "Unknown",
        "VerificationFailed",
        "The Hub did not answer",
    ),
    "out of memory": (
        lambda scene, pod: scene.kubelet.oom_kill(pod),
        "Unknown",
        "VerificationFailed",
        "raise workers.resources.limits.memory",
    ),
    "an image without it": (
        lambda scene, pod: scene.kubelet.fail(pod, 1, "No module named finetune_trainer.verify"),
        "Unknown",
        "VerificationFailed",
        "did not say why: read the last lines of `kubectl logs",
    ),
    "an exit code that does not go with its words": (
        lambda scene, pod: scene.kubelet.fail(pod, 1, verdict(True)),
        "Unknown",
        "VerificationFailed",
        "with exit code 1 and did not say why",
    ),
    "the Job is deleted": (
        lambda scene, _: scene.api.delete("Job", scene.verification(), propagation="Background"),
        "Unknown",
        "VerificationFailed",
        "was deleted by somebody else",
    ),
}


def test_every_end_is_told_and_none_is_followed_by_another_job(
    operator: OperatorProcess, api: Api, kubelet: Kubelet
) -> None:
    scenes = {end: Scene(api, kubelet, f"job-{number}") for number, end in enumerate(ENDS)}
    for scene in scenes.values():
        scene.apply(output=OUTPUT)
    for scene in scenes.values():
        scene.run()
        kubelet.succeed(scene.pod(), success())
    for end, scene in scenes.items():
        pod = scene.verifying_pod()
        scene.wait_verified("Unknown", "Verifying")
        ENDS[end][0](scene, pod)
    for end, scene in scenes.items():
        _, state, reason, says = ENDS[end]
        status = scene.wait_verified(state, reason, says)
        assert (status["phase"], scene.condition(status)["status"]) == ("Succeeded", "True"), end
        events = wait_until(scene.events, lambda events, reason=reason: events[-1][1] == reason)  # type: ignore[misc]
        assert events[-1] == ("Warning", reason)
    # Whoever looks again at one that was deleted leaves it so.
    deleted = scenes["the Job is deleted"]
    deleted.change(backoffLimit=1)
    wait_until(lambda: deleted.status()["observedGeneration"] == 2)
    assert api.find("Job", deleted.verification()) is None
    assert len(jobs(deleted)) == len(ENDS) - 1


def test_what_the_cluster_takes_away_is_tried_again(scene: Scene) -> None:
    play(scene, SUCCEEDS)
    pod = scene.verifying_pod()
    scene.kubelet.run(pod)
    scene.kubelet.evict(pod)
    other = scene.verifying_pod()
    assert other["metadata"]["uid"] != pod["metadata"]["uid"]
    scene.kubelet.succeed(other, verdict(True))
    scene.wait_verified("True", "AsTrained")


def test_what_it_waits_for_is_said(scene: Scene) -> None:
    play(scene, SUCCEEDS)
    pod = scene.verifying_pod()
    scene.kubelet.unschedulable(pod, "0/3 nodes are available: 3 Insufficient gpu.")
    scene.wait_verified("Unknown", "Verifying", "3 Insufficient gpu.")
    scene.kubelet.pull_fails(pod, "trainer:test")
    scene.wait_verified("Unknown", "Verifying", 'Back-off pulling image "trainer:test"')
    scene.kubelet.run(pod)
    scene.wait_verified("Unknown", "Verifying", "opens the adapter")


def test_one_that_does_not_end_is_ended_and_what_it_waited_for_is_told(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator_factory(verification_seconds=3).start()
    scene = Scene(api, kubelet, "guard")
    play(scene, SUCCEEDS)
    pod = scene.verifying_pod()
    scene.kubelet.unschedulable(pod, "0/3 nodes are available: 3 Insufficient gpu.")
    scene.wait_verified("Unknown", "VerificationFailed", "did not end in time")
    assert "3 Insufficient gpu." in scene.condition(scene.status(), "Verified")["message"]
    scene.api.wait_gone("Pod", pod["metadata"]["name"])


def test_it_reads_the_job_of_the_last_attempt(scene: Scene) -> None:
    """Also where that attempt's other worker hung and it had to be released."""
    play(
        scene,
        [
            Step(apply(output=OUTPUT, workers={"nodes": 2, "gpusPerNode": 0}), "Starting", "Starting"),
            Step(run(count=2), "Preparing", "Preparing"),
            Step(crashes(), "Starting", "Starting", says="Attempt 2"),
            Step(run(attempt=2, count=2), "Preparing", "Preparing"),
            Step(succeeds(attempt=2), "Succeeded", "Succeeded"),
        ],
    )
    child = scene.child(2)
    scene.api.wait_gone("PyTorchJob", child)
    pod = scene.verifying_pod()
    mounted = [volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume]
    assert mounted == [child]
    assert scene.api.find("ConfigMap", child)


def test_without_the_wish_there_is_neither_a_condition_nor_a_request(
    operator: OperatorProcess, api: Api, kubelet: Kubelet
) -> None:
    since = operator.control_plane.audit.position()
    scene = Scene(api, kubelet, "guard")
    play(scene, [Step(apply(), "Starting", "Starting"), Step(succeeds(), "Succeeded", "Succeeded")])
    scene.wait_events(2)
    assert scene.condition(scene.status(), "Verified")["status"] is None
    mine = [request for request in operator.requests(since) if request.namespace == api.namespace]
    assert [request for request in mine if request.resource == "jobs"] == []


def test_a_failed_job_is_not_verified(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(output=OUTPUT, backoffLimit=0), "Starting", "Starting"),
            Step(crashes(), "Failed", "RetriesExhausted"),
        ],
    )
    assert scene.condition(scene.status(), "Verified")["status"] is None
    assert jobs(scene) == []


def test_a_job_of_somebody_else_with_its_name_is_left_alone_and_named(scene: Scene) -> None:
    play(scene, SUCCEEDS[:2])
    name = scene.verification()
    foreign = scene.api.create(idle(name))
    play(scene, SUCCEEDS[2:])
    scene.wait_verified("Unknown", "VerificationPending", f"/{name} belongs to somebody else")
    assert scene.api.get("Job", name)["metadata"]["uid"] == foreign["metadata"]["uid"]
    scene.api.delete("Job", name, propagation="Background")
    scene.kubelet.succeed(scene.verifying_pod(), verdict(True))
    scene.wait_verified("True", "AsTrained")


def idle(name: str) -> Object:
    """A Job that makes no pods."""
    container = {"name": "idle", "image": "idle"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    spec = {"suspend": True, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def test_a_forged_pod_has_no_say(scene: Scene) -> None:
    play(scene, SUCCEEDS)
    pod = scene.verifying_pod()
    labels = pod["metadata"]["labels"]
    spec: dict[str, Any] = {key: pod["spec"][key] for key in ("containers", "securityContext", "volumes")}
    scene.api.create(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "forged", "labels": labels}, "spec": spec}
    )
    scene.kubelet.succeed("forged", verdict(True))
    scene.kubelet.fail(pod, 1, verdict(False, "It differs."))
    scene.wait_verified("False", "NotAsTrained", "It differs.")


def test_a_quota_holds_it_up_and_no_longer(scene: Scene) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
    scene.api.create({**quota, "spec": {"hard": {"count/jobs.batch": "0"}}})
    scene.api.wait("ResourceQuota", "none", lambda found: found.get("status", {}).get("hard"))
    play(scene, SUCCEEDS)
    scene.wait_verified("Unknown", "VerificationPending", "exceeded quota: none")
    scene.api.delete("ResourceQuota", "none")
    scene.kubelet.succeed(scene.verifying_pod(), verdict(True))
    scene.wait_verified("True", "AsTrained")


def test_a_queue_may_hold_it(scene: Scene) -> None:
    """As Kueue does with a Job that carries its label."""
    body = manifest(scene.name, output=OUTPUT)
    body["metadata"]["labels"] = {KUEUE_QUEUE_LABEL: "fine-tuning"}
    scene.api.create(body)
    play(scene, [Step(succeeds(), "Succeeded", "Succeeded")])
    first = scene.verifying_pod()
    job = scene.api.get("Job", scene.verification())
    assert job["metadata"]["labels"][KUEUE_QUEUE_LABEL] == "fine-tuning"
    scene.api.patch("Job", scene.verification(), {"spec": {"suspend": True}})
    scene.wait_verified("Unknown", "Verifying", "waits in the queue fine-tuning until Kueue admits it")
    scene.api.patch("Job", scene.verification(), {"spec": {"suspend": False}})
    second = wait_until(scene.verifying_pod, lambda pod: pod["metadata"]["uid"] != first["metadata"]["uid"])
    scene.kubelet.succeed(second, verdict(True))
    scene.wait_verified("True", "AsTrained")


def test_the_job_is_not_deleted_before_there_is_a_verdict(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(output=OUTPUT, ttlSecondsAfterFinished=0), "Starting", "Starting"),
            Step(succeeds(), "Succeeded", "Succeeded"),
        ],
    )
    name, pod = scene.verification(), scene.verifying_pod()
    scene.wait_verified("Unknown", "Verifying")
    scene.kubelet.succeed(pod, verdict(True))
    scene.api.wait_gone("FineTuneJob", scene.name)
    scene.api.wait_gone("Job", name)
    scene.api.wait_gone("Pod", pod["metadata"]["name"])


def test_it_goes_on_whoever_looks_after_it(
    operator_factory: OperatorFactory, control_plane: ControlPlane, api: Api, kubelet: Kubelet
) -> None:
    """An operator that was away finds what became of it; at rest nothing is written."""
    operator = operator_factory()
    operator.start()
    scene = Scene(api, kubelet, "guard")
    play(scene, SUCCEEDS)
    pod = scene.verifying_pod()
    scene.wait_verified("Unknown", "Verifying")
    scene.wait_events(3)  # they are told after status is written, so one that is killed in between tells nothing
    operator.kill()
    scene.kubelet.succeed(pod, verdict(True))
    operator.start()
    scene.wait_verified("True", "AsTrained")
    scene.wait_events(4)
    since = control_plane.audit.position()
    operator.restart()
    wait_until(lambda: [r for r in operator.requests(since) if (r.verb, r.resource) == ("list", "pytorchjobs")])
    assert [request for request in operator.writes(since) if request.resource != "tokenreviews"] == []
    assert [request for request in operator.requests(since) if request.resource == "jobs"] == []
