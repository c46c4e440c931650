"""Jobs in the queues of a real Kueue: one waits for the other, a more important one comes first, and nothing is lost.

The queues are those that we publish as an example, and so is Kueue's configuration. Pods are played, but for the job
that really trains, writes a checkpoint when it is preempted, and goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from finetune_operator.names import KUEUE_PRIORITY_LABEL, KUEUE_QUEUE_LABEL
from tests.cluster.api import Api, Object, has_condition, wait_until
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, manifest, verdict
from tests.cluster.steps import Happening, Step, nothing, play, run, succeeds
from tests.cluster.store import tiny_spec
from tests.cluster.test_real_trainer import Start, bucket, start
from tests.integrations.kueue_process import KueueProcess, run_kueue
from tests.integrations.recordings import ROOT

__all__ = ["bucket", "start"]

EXAMPLES = ROOT / "integrations" / "kueue"
QUEUE = "fine-tuning"
WHOLE_QUOTA = {"gpusPerNode": 8, "resources": {"requests": {"cpu": "32", "memory": "256Gi"}}}
WITHOUT_GPUS = {"gpusPerNode": 0, "resources": {"requests": {"cpu": "64"}}}


@pytest.fixture(scope="module")
def kueue(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KueueProcess]:
    """A running Kueue."""
    with run_kueue(control_plane, tmp_path_factory.mktemp("kueue")) as process:
        yield process


@dataclass(frozen=True)
class Queue:
    """The example's queue, in the test's namespace and with a quota of its own."""

    kueue: KueueProcess
    api: Api
    kubelet: Kubelet

    def scene(self, name: str) -> Scene:
        """A job that is not applied yet."""
        return Scene(self.api, self.kubelet, name)

    def workload(self, scene: Scene) -> Object:
        """What Kueue makes of a job."""
        return self.kueue.workload(self.api.namespace or "", scene.child())

    def set_stop_policy(self, policy: str) -> None:
        """Hold keeps what waits from being admitted, None lets it go."""
        path = f"/apis/kueue.x-k8s.io/v1beta2/clusterqueues/{self.api.namespace}"
        headers = {"Content-Type": "application/merge-patch+json"}
        self.api.request("PATCH", path, json={"spec": {"stopPolicy": policy}}, headers=headers)


@pytest.fixture
def queue(kueue: KueueProcess, operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Queue:
    """An empty queue, and an operator that runs."""
    namespace = api.namespace or ""
    documents = list(yaml.safe_load_all((EXAMPLES / "queues.yaml").read_text()))
    for document in documents:
        if document["kind"] == "ClusterQueue":
            document["metadata"]["name"] = namespace
        if document["kind"] == "LocalQueue":
            document["metadata"]["namespace"] = document["spec"]["clusterQueue"] = namespace
    kueue.apply(*documents)
    return Queue(kueue, api, kubelet)


def applied(priority: str | None = None, **keys: Any) -> Happening:
    """The job is applied with the label of the queue, and asks for all that there is."""

    def happen(scene: Scene) -> None:
        body = manifest(scene.name, **{"workers": WHOLE_QUOTA, **keys})
        body["metadata"]["labels"] = {
            KUEUE_QUEUE_LABEL: QUEUE,
            **({KUEUE_PRIORITY_LABEL: priority} if priority else {}),
        }
        scene.api.create(body)

    return happen


STARTS = Step(nothing, "Starting", "Starting")
WAITS = f"waits in the queue {QUEUE} until Kueue admits it"
STOPPED = f"was stopped by its queue {QUEUE}"


def test_the_example_job_is_admitted_to_the_example_queue(queue: Queue) -> None:
    body = yaml.safe_load((EXAMPLES / "job.yaml").read_text())
    scene = queue.scene(body["metadata"]["name"])
    queue.api.create(body)
    play(scene, [STARTS, Step(run(), "Preparing", "Preparing")])
    assert has_condition(queue.workload(scene), "Admitted")
    # Kueue's own changes are no foreign edit.
    assert "edited" not in scene.condition(scene.status())["message"]


def test_jobs_take_turns_and_an_urgent_one_comes_first(queue: Queue) -> None:
    first, second, urgent = (queue.scene(name) for name in ("first", "second", "urgent"))
    play(first, [Step(applied(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    play(second, [Step(applied(backoffLimit=0), "Queued", "WaitingForQuota", says=WAITS)])
    assert not has_condition(queue.workload(second), "QuotaReserved")
    assert second.api.find("Pod", second.pod()) is None

    play(first, [Step(succeeds(), "Succeeded", "Succeeded")])
    play(second, [STARTS, Step(run(), "Preparing", "Preparing")])
    before = second.api.get("Pod", second.pod())

    play(urgent, [Step(applied("urgent"), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    play(second, [Step(nothing, "Queued", "WaitingForQuota", says=STOPPED, attempts=[])])
    assert has_condition(queue.workload(second), "Preempted")
    assert second.api.find("Pod", second.pod()) is None

    play(urgent, [Step(succeeds(), "Succeeded", "Succeeded")])
    play(second, [STARTS, Step(run(), "Preparing", "Preparing", says="Attempt 1")])
    after = second.api.get("Pod", second.pod())
    # The same attempt with the same job, on a new pod.
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert _job_file(after) == _job_file(before)
    status = play(second, [Step(succeeds(), "Succeeded", "Succeeded", attempts=["Succeeded"])])
    assert status.get("failures") is None
    waits = [event for event in second.events() if event[1] == "WaitingForQuota"]
    assert waits == [("Normal", "WaitingForQuota")] * 2


def test_admission_while_the_old_pods_still_write_their_checkpoint_is_nobodys_failure(queue: Queue) -> None:
    patient, urgent = queue.scene("patient"), queue.scene("urgent")
    play(patient, [Step(applied(backoffLimit=0), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    old = patient.api.get("Pod", patient.pod())
    with queue.kubelet.holding_deletions():
        play(urgent, [Step(applied("urgent"), "Starting", "Starting")])
        play(patient, [Step(nothing, "Queued", "WaitingForQuota", says=STOPPED)])
        queue.api.delete("FineTuneJob", urgent.name)
        wait_until(lambda: queue.workload(patient), lambda workload: has_condition(workload, "Admitted"))
        assert queue.api.get("Pod", patient.pod())["metadata"]["uid"] == old["metadata"]["uid"]
        queue.kubelet.terminate(old)
    selector = f"finetune.dev/job-name={patient.name}"
    new = wait_until(
        lambda: [pod for pod in queue.api.list("Pod", labels=selector) if "deletionTimestamp" not in pod["metadata"]],
        lambda pods: [pod["metadata"]["uid"] != old["metadata"]["uid"] for pod in pods] == [True],
    )
    queue.kubelet.run(new[0])
    status = patient.wait_phase("Preparing")
    assert status.get("failures") is None
    assert all(not attempt["counted"] for attempt in status.get("attempts", []))


def test_a_verification_queues_like_any_job_and_success_stays(queue: Queue) -> None:
    scene = queue.scene("guard")
    output = {"uri": "s3://models/team-a", "verify": True}
    play(scene, [Step(applied(output=output), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    queue.set_stop_policy("Hold")
    play(scene, [Step(succeeds(), "Succeeded", "Succeeded")])
    status = scene.wait_verified("Unknown", "Verifying", WAITS)
    assert status["phase"] == "Succeeded"
    queue.set_stop_policy("None")
    queue.kubelet.succeed(scene.verifying_pod(), verdict(True))
    scene.wait_verified("True", "AsTrained")


def test_a_preempted_training_goes_on_from_the_checkpoint_it_wrote(queue: Queue, start: Start, bucket: str) -> None:
    """A real trainer gets the signal, saves, and says where; once admitted again, it begins there."""
    patient, urgent = queue.scene("patient"), queue.scene("urgent")
    long = tiny_spec(bucket, num_epochs=150, checkpoint_and_evaluation_frequency={"strategy": "steps", "value": 20})
    applied(**{**long, "workers": WITHOUT_GPUS, "backoffLimit": 0})(patient)
    (pod,) = patient.pods()
    process = start(pod)
    wait_until(patient.status, lambda status: (status.get("progress") or {}).get("step", 0) >= 3, 120)

    with queue.kubelet.holding_deletions():
        applied("urgent", workers=WITHOUT_GPUS)(urgent)
        queue.api.wait("Pod", pod["metadata"]["name"], lambda found: "deletionTimestamp" in found["metadata"])
        assert process.stop() == 143, process.log.read_text()
        step = wait_until(lambda: patient.status().get("checkpoint", {}).get("step"))
        queue.kubelet.terminate(pod)
    told = play(patient, [Step(nothing, "Queued", "WaitingForQuota", says=STOPPED, attempts=[])])["progress"]["step"]
    assert step >= told >= 3
    play(urgent, [Step(run(), "Preparing", "Preparing"), Step(succeeds(), "Succeeded", "Succeeded")])

    (pod,) = patient.pods()
    process = start(pod)
    again = wait_until(lambda: patient.status()["progress"].get("step", told), lambda step: step != told, 120)
    assert again >= step
    assert process.end() == 0, process.log.read_text()
    status = play(patient, [Step(nothing, "Succeeded", "Succeeded", attempts=["Succeeded"])])
    assert status.get("failures") is None


def _job_file(pod: Object) -> list[str]:
    """Names of the ConfigMaps that a pod reads."""
    return [volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume]
