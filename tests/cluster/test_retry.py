"""Another attempt is made when it may help, as often as the author allows, and never beside the old one's pods."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, Object
from tests.cluster.conftest import OperatorFactory
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import FAST, OperatorProcess
from tests.cluster.scene import ADAPTER, Scene, failure
from tests.cluster.steps import (
    Step,
    apply,
    cast,
    change,
    checkpoint,
    crashes,
    ended,
    evicted,
    exits,
    nothing,
    out_of_memory,
    play,
    play_all,
    pod_deleted,
    run,
    says,
    succeeds,
)


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


CRASH, DISRUPTION = "TrainerCrashed", "Disrupted"
SCENARIOS = {
    "a second attempt succeeds where the first failed": [
        Step(apply(), "Starting", "Starting", says="Attempt 1"),
        Step(run(), "Preparing", "Preparing"),
        Step(crashes(), "Starting", "Starting", says="Attempt 2", attempts=[CRASH]),
        Step(run(2), "Preparing", "Preparing", says="Attempt 2"),
        Step(succeeds(attempt=2), "Succeeded", "Succeeded", says=ADAPTER.uri, attempts=[CRASH, "Succeeded"]),
    ],
    "after as many failures as the author allows, and one more, it is over": [
        Step(apply(backoffLimit=1), "Starting", "Starting"),
        Step(crashes(), "Starting", "Starting", says="Attempt 2", attempts=[CRASH]),
        Step(
            crashes(2),
            "Failed",
            "RetriesExhausted",
            says="2 attempts have failed and backoffLimit: 1 allows no more; the last one: TrainerCrashed: Worker 0 ",
            attempts=[CRASH, CRASH],
        ),
    ],
    "no retry at all": [
        Step(apply(backoffLimit=0), "Starting", "Starting"),
        Step(crashes(), "Failed", "RetriesExhausted", says="The attempt has failed and backoffLimit: 0"),
    ],
    "what the author has to mend is not tried again": [
        Step(apply(backoffLimit=5), "Starting", "Starting"),
        Step(says(Reason.DATA_INVALID, code=11), "Failed", "DataInvalid", attempts=["DataInvalid"]),
    ],
    "main memory that was too small once is too small again": [
        Step(apply(backoffLimit=5), "Starting", "Starting"),
        Step(out_of_memory(), "Failed", "OutOfMemory", attempts=["OutOfMemory"]),
    ],
    "disruptions are not the job's fault": [
        Step(apply(backoffLimit=0), "Starting", "Starting"),
        Step(evicted(), "Starting", "Starting", says="Attempt 2", attempts=[DISRUPTION]),
        Step(run(2), "Preparing", "Preparing"),
        Step(pod_deleted(attempt=2), "Starting", "Starting", says="Attempt 3", attempts=[DISRUPTION] * 2),
        Step(
            says(Reason.TERMINATED, code=143, attempt=3),
            "Starting",
            "Starting",
            says="Attempt 4",
            attempts=[DISRUPTION] * 3,
        ),
        Step(succeeds(attempt=4), "Succeeded", "Succeeded"),
    ],
    "a disruption does not forgive the failures before": [
        Step(apply(backoffLimit=1), "Starting", "Starting"),
        Step(crashes(), "Starting", "Starting", says="Attempt 2"),
        Step(evicted(attempt=2), "Starting", "Starting", says="Attempt 3"),
        Step(crashes(3), "Failed", "RetriesExhausted", attempts=[CRASH, DISRUPTION, CRASH]),
    ],
    "a limit that is raised while the job runs holds": [
        Step(apply(backoffLimit=0), "Starting", "Starting"),
        Step(change(backoffLimit=1), "Starting", "Starting"),
        Step(crashes(), "Starting", "Starting", says="Attempt 2", attempts=[CRASH]),
    ],
}


def test_attempts_follow_one_another(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    for name, status in play_all(cast(api, kubelet, SCENARIOS)).items():
        counted = [reason for reason in ended(status) if reason not in (DISRUPTION, "Succeeded")]
        assert status.get("failures", 0) == len(counted), name


def test_a_new_attempt_has_a_pytorchjob_of_its_own_and_the_first_ones_config_map_stays(scene: Scene) -> None:
    play(scene, SCENARIOS["a second attempt succeeds where the first failed"][:4])
    first, second = scene.child(1), scene.child(2)
    assert [job["metadata"]["name"] for job in scene.pytorch_jobs()] == [second]
    assert scene.effective(1) == scene.effective(2)
    assert [event for event in scene.events() if event[1] == "AttemptCreated"] == [("Normal", "AttemptCreated")] * 2
    play(scene, [Step(crashes(2), "Starting", "Starting", says="Attempt 3")])
    # What is trained can still be read; the other attempts' copies are gone.
    assert scene.api.find("ConfigMap", first)
    assert scene.api.find("ConfigMap", second) is None


def test_a_new_attempt_goes_on_from_the_newest_checkpoint_in_status(scene: Scene) -> None:
    def dies_at(step: int, attempt: int) -> Step:
        words = failure(Reason.STORAGE_UNAVAILABLE, checkpoint=checkpoint(step))
        return Step(exits(202, words, attempt=attempt), "Starting", "Starting", says=f"Attempt {attempt + 1}")

    status = play(scene, [Step(apply(), "Starting", "Starting"), dies_at(40, 1)])
    assert status["checkpoint"] == {"uri": checkpoint(40).uri, "step": 40}
    # One that came less far does not take the address of a newer one away.
    for attempt, said, kept in ((2, 20, 40), (3, 60, 60)):
        assert play(scene, [dies_at(said, attempt)])["checkpoint"]["step"] == kept


def test_no_attempt_begins_before_the_old_ones_pods_are_gone(scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    old = scene.pod()
    with scene.kubelet.holding_deletions():
        status = play(
            scene,
            [Step(pod_deleted(), "Retrying", "PodsStillEnding", says=f"on its way out: {old}", attempts=[DISRUPTION])],
        )
        assert "its pod was deleted" in status["attempts"][0]["message"]
        # Its PyTorchJob is deleted and its pod is held: whoever made a second attempt now would share the machines.
        scene.api.wait_gone("PyTorchJob", scene.child())
        for limit in (4, 5):
            # The operator looks again, and after the wait between attempts is over.
            generation = scene.change(backoffLimit=limit)["metadata"]["generation"]
            scene.api.wait("FineTuneJob", scene.name, lambda job: job["status"]["observedGeneration"] == generation)  # noqa: B023
            play(scene, [Step(nothing, "Retrying", "PodsStillEnding", attempts=[DISRUPTION])])
        assert scene.pytorch_jobs() == []
        words = failure(Reason.TERMINATED, checkpoint=checkpoint(30))
        scene.kubelet.fail(old, 143, words)
        scene.api.wait("FineTuneJob", scene.name, lambda job: job["status"].get("checkpoint", {}).get("step") == 30)
        scene.kubelet.terminate(old)
    play(scene, [Step(run(2), "Preparing", "Preparing", says="Attempt 2")])


def seconds(text: str) -> float:
    """A time of a status, in seconds."""
    return datetime.fromisoformat(text).timestamp()


def test_the_waits_between_attempts_double(operator_factory: OperatorFactory, api: Api, kubelet: Kubelet) -> None:
    operator_factory(retry_base_seconds=1, retry_limit_seconds=3).start()
    scene = Scene(api, kubelet, "guard")
    status: Object = play(
        scene,
        [
            Step(apply(), "Starting", "Starting"),
            Step(crashes(1), "Starting", "Starting", says="Attempt 2"),
            Step(crashes(2), "Starting", "Starting", says="Attempt 3"),
            Step(crashes(3), "Starting", "Starting", says="Attempt 4"),
            Step(succeeds(attempt=4), "Succeeded", "Succeeded"),
        ],
    )
    waits = [
        seconds(after["startTime"]) - seconds(before["completionTime"])
        for before, after in pairwise(status["attempts"])
    ]
    # Times are whole seconds. A wait may be longer on a slow machine, never shorter than asked for.
    assert all(wait >= wanted - 1 for wait, wanted in zip(waits, (1, 2, 3), strict=True)), waits


def test_a_limit_that_is_lowered_while_the_job_waits_ends_it(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator_factory(retry_base_seconds=600, retry_limit_seconds=600).start()
    play(
        Scene(api, kubelet, "guard"),
        [
            Step(apply(), "Starting", "Starting"),
            Step(crashes(), "Retrying", CRASH, says="at the earliest"),
            Step(change(backoffLimit=0), "Failed", "RetriesExhausted", says="the last one: TrainerCrashed"),
        ],
    )


def test_retries_need_no_operator_that_remembers(operator_factory: OperatorFactory, api: Api, kubelet: Kubelet) -> None:
    operator = operator_factory(retry_base_seconds=FAST["retry_base_seconds"])
    operator.start()
    scene = Scene(api, kubelet, "guard")
    play(
        scene,
        [Step(apply(backoffLimit=1), "Starting", "Starting"), Step(crashes(), "Starting", "Starting", "Attempt 2")],
    )
    operator.kill()
    crashes(2)(scene)
    operator.start()
    scene.wait_reason("RetriesExhausted")
