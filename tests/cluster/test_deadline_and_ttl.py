"""activeDeadlineSeconds ends a job that hangs, whatever happens to the operator; ttlSecondsAfterFinished removes it."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from tests.cluster.api import Api, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import ADAPTER, Scene
from tests.cluster.steps import (
    Step,
    apply,
    both,
    cast,
    change,
    crashes,
    play,
    play_all,
    queue_admits,
    queue_holds,
    resume,
    run,
    says_user_error,
    succeeds,
    suspend,
)


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


EXCEEDED = "DeadlineExceeded"
OVER = "The job was active for more than activeDeadlineSeconds: 2"
SCENARIOS = {
    "a job that hangs": [
        Step(both(apply(activeDeadlineSeconds=2), run()), "Failed", "DeadlineExceeded", says=OVER, attempts=[EXCEEDED]),
    ],
    "a job whose pods never start": [
        Step(apply(activeDeadlineSeconds=2), "Failed", "DeadlineExceeded", says=OVER, attempts=[EXCEEDED]),
    ],
    "a deadline that is set while the job runs": [
        Step(apply(), "Starting", "Starting"),
        Step(run(), "Preparing", "Preparing"),
        Step(change(activeDeadlineSeconds=1), "Failed", "DeadlineExceeded", attempts=[EXCEEDED]),
    ],
    "a deadline that is taken back": [
        Step(apply(activeDeadlineSeconds=600), "Starting", "Starting"),
        Step(change(activeDeadlineSeconds=None), "Starting", "Starting"),
        Step(succeeds(), "Succeeded", "Succeeded"),
    ],
}


def test_a_deadline_ends_a_job(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    stories = cast(api, kubelet, SCENARIOS)
    play_all(stories)
    for scene, steps in stories.values():
        if steps[-1].phase == "Failed":
            api.wait_gone("Pod", scene.pod())


def test_a_deadline_counts_over_all_attempts(scene: Scene) -> None:
    status = play(
        scene,
        [
            Step(apply(), "Starting", "Starting"),
            # Nobody can be active for two seconds without two seconds passing.
            Step(both(run(), lambda _: time.sleep(2.5)), "Preparing", "Preparing"),
            Step(crashes(), "Starting", "Starting", says="Attempt 2"),
        ],
    )
    before = status["activeSeconds"]
    assert before >= 2
    exceeded = Step(change(activeDeadlineSeconds=before), "Failed", EXCEEDED, attempts=["TrainerCrashed", EXCEEDED])
    status = play(scene, [exceeded])
    assert status["activeSeconds"] >= before
    assert status["failures"] == 1


def test_time_in_which_the_job_was_suspended_does_not_count(scene: Scene) -> None:
    status = play(
        scene,
        [
            Step(apply(activeDeadlineSeconds=3, suspend=True), "Suspended", "Suspended"),
            # Longer than the deadline: what is to be shown is that nothing happens meanwhile.
            Step(lambda _: time.sleep(3.5), "Suspended", "Suspended"),
            Step(resume, "Failed", EXCEEDED, attempts=[EXCEEDED]),
        ],
    )
    (attempt,) = status["attempts"]
    began, ended = (datetime.fromisoformat(attempt[key]) for key in ("startTime", "completionTime"))
    assert (ended - began).total_seconds() >= 2
    assert status["startTime"] == attempt["startTime"]


def test_time_in_which_a_queue_held_the_job_does_not_count(scene: Scene) -> None:
    status = play(scene, [Step(apply(), "Starting", "Starting"), Step(queue_holds(), "Queued", "WaitingForQuota")])
    limit = status["activeSeconds"] + 3
    status = play(
        scene,
        [
            Step(both(change(activeDeadlineSeconds=limit), lambda _: time.sleep(3.5)), "Queued", "WaitingForQuota"),
            Step(queue_admits(), "Failed", EXCEEDED, attempts=[EXCEEDED]),
        ],
    )
    assert status["activeSeconds"] >= limit


def test_a_deadline_survives_the_operator(operator_factory: OperatorFactory, api: Api, kubelet: Kubelet) -> None:
    operator = operator_factory()
    operator.start()
    scene, late = Scene(api, kubelet, "guard"), Scene(api, kubelet, "late")
    for each in (scene, late):
        play(each, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    since = scene.status()["activeSince"]
    so_far = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()
    play(scene, [Step(change(activeDeadlineSeconds=round(so_far) + 4), "Preparing", "Preparing")])
    operator.kill()
    # The other deadline is over when the new operator sees it for the first time.
    late.change(activeDeadlineSeconds=1)
    operator.start()
    # It began to count when the attempt began, not when the new operator saw it.
    assert scene.status().get("activeSince", since) == since
    for each in (scene, late):
        each.wait_reason(EXCEEDED)


def test_ttl_removes_the_job_and_what_belongs_to_it(scene: Scene) -> None:
    play(scene, [Step(apply(ttlSecondsAfterFinished=1), "Starting", "Starting")])
    child = scene.child()
    succeeds()(scene)
    scene.api.wait_gone("FineTuneJob", scene.name)
    scene.api.wait_gone("ConfigMap", child)
    scene.api.wait_gone("PyTorchJob", child)
    wait_until(lambda: scene.api.list("Pod"), lambda pods: not pods)


def test_ttl_removes_a_failed_job_at_once_when_it_is_zero(scene: Scene) -> None:
    play(scene, [Step(apply(ttlSecondsAfterFinished=0), "Starting", "Starting")])
    says_user_error()(scene)
    scene.api.wait_gone("FineTuneJob", scene.name)


def test_ttl_may_be_given_when_the_job_has_ended(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(ttlSecondsAfterFinished=6000), "Starting", "Starting"),
            Step(succeeds(), "Succeeded", "Succeeded", says=ADAPTER.uri),
            Step(change(ttlSecondsAfterFinished=None), "Succeeded", "Succeeded"),
        ],
    )
    scene.change(ttlSecondsAfterFinished=1)
    scene.api.wait_gone("FineTuneJob", scene.name)


def test_ttl_comes_although_the_operator_was_away(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator = operator_factory()
    operator.start()
    scene = Scene(api, kubelet, "guard")
    play(scene, [Step(apply(), "Starting", "Starting"), Step(succeeds(), "Succeeded", "Succeeded")])
    operator.kill()
    scene.change(ttlSecondsAfterFinished=1)
    operator.start()
    api.wait_gone("FineTuneJob", scene.name)


def test_a_job_that_has_not_ended_has_no_ttl(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(ttlSecondsAfterFinished=0), "Starting", "Starting"),
            Step(suspend, "Suspended", "Suspended", says="holds no machines"),
        ],
    )
