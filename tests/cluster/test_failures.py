"""How a job fails: every reason that a trainer can give, and what is told of pods that could not say anything.

What another attempt may mend is tried again; what only the author can mend ends the job, with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune_api.outcome import EXIT_CODES, Reason, is_retryable
from tests.cluster.api import Api
from tests.cluster.conftest import OperatorFactory
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, failure
from tests.cluster.steps import (
    Happening,
    Step,
    apply,
    both,
    evicted,
    exits,
    out_of_memory,
    over_its_limit,
    play,
    play_all,
    pod_deleted,
    preempted,
    run,
    says,
    succeeds,
)

SENTENCE = "This is wrong: do that."
WORLDS = {reason for reason in Reason if is_retryable(EXIT_CODES[reason])}


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


def test_what_the_author_has_to_mend_ends_the_job_with_the_trainers_own_words(
    operator: OperatorProcess, api: Api, kubelet: Kubelet
) -> None:
    def story(reason: Reason) -> tuple[Scene, list[Step]]:
        fails = says(reason, SENTENCE, code=EXIT_CODES[reason])
        steps = [
            Step(apply(), "Starting", "Starting"),
            Step(fails, "Failed", reason, says=SENTENCE, attempts=[reason]),
        ]
        return Scene(api, kubelet, reason.lower()), steps

    reasons = [reason for reason in Reason if reason not in WORLDS]
    for name, status in play_all({reason: story(reason) for reason in reasons}).items():
        reason, scene = Reason(name), Scene(api, kubelet, name.lower())
        assert status["attempts"][0]["exitCode"] == EXIT_CODES[reason]
        assert scene.condition(status, "Stalled")["reason"] == reason
        assert scene.wait_events(2)[-1] == ("Warning", reason)


def test_what_another_attempt_may_mend_is_tried_again(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    def story(reason: Reason) -> tuple[Scene, list[Step]]:
        fails = says(reason, SENTENCE, code=EXIT_CODES[reason])
        steps = [
            Step(apply(), "Starting", "Starting"),
            Step(fails, "Starting", "Starting", says="Attempt 2", attempts=[reason]),
        ]
        return Scene(api, kubelet, reason.lower()), steps

    for status in play_all({reason: story(reason) for reason in WORLDS - {Reason.TERMINATED}}).values():
        (attempt,) = status["attempts"]
        assert (attempt["message"], attempt["counted"], status["failures"]) == (SENTENCE, True, 1)


def test_a_trainer_that_was_told_to_stop_has_not_failed(scene: Scene) -> None:
    status = play(
        scene,
        [
            Step(apply(backoffLimit=0), "Starting", "Starting"),
            Step(says(Reason.TERMINATED, code=143), "Starting", "Starting", says="Attempt 2", attempts=["Disrupted"]),
        ],
    )
    assert "failures" not in status


def start_error(scene: Scene) -> None:
    """The container's command cannot be run, as runc says it."""
    text = 'exec: "python": executable file not found in $PATH'
    exits(128, text, reason="StartError")(scene)


def driver_error(scene: Scene) -> None:
    """The runtime's hook for GPUs fails on one node."""
    text = "error running prestart hook #0: nvidia-container-cli: initialization error: nvml error: driver not loaded"
    exits(128, text, reason="StartError")(scene)


def admission_error(scene: Scene) -> None:
    """A node refuses a pod that was assigned to it, as one does whose GPU driver is not up yet."""
    pod = scene.kubelet.scheduled(scene.pod())
    status = {
        "phase": "Failed",
        "reason": "UnexpectedAdmissionError",
        "message": "Pod was rejected: Allocate failed due to no healthy devices present",
        "containerStatuses": None,
    }
    scene.api.patch_status("Pod", pod["metadata"]["name"], status)


LONG = "x" * 4000
PODS: dict[str, tuple[Happening, str, str, bool | None]] = {
    # What happens, the reason of the attempt, a part of its message, and whether it counts (None: the job has failed).
    "out of main memory": (out_of_memory(), "OutOfMemory", "raise workers.resources.limits.memory", None),
    "out of main memory although it spoke": (
        exits(137, failure(Reason.INTERNAL_ERROR), reason="OOMKilled"),
        "OutOfMemory",
        "more main memory than its limit",
        None,
    ),
    "evicted": (evicted(), "Disrupted", "low on resource", False),
    "evicted for more than it may write": (over_its_limit(), "DiskFull", "raise workers.cache.sizeLimit", None),
    "a node without its GPU driver": (driver_error, "TrainerNotStarted", "nvml error: driver not loaded", True),
    # A pod that is gone before anybody looks tells nothing more than that.
    "preempted": (preempted(), "Disrupted", "does not count as a failure", False),
    "its pod deleted by hand": (pod_deleted(), "Disrupted", "does not count as a failure", False),
    "refused by its node": (admission_error, "Disrupted", "no healthy devices", False),
    "an exit code of its own without words": (exits(1), "TrainerCrashed", "exit code 1 and did not say why", None),
    "an exit code that is no trainer's": (exits(77), "TrainerCrashed", "exit code 77", None),
    "killed by a signal": (exits(139), "TrainerCrashed", "exit code 139 and could not say why", True),
    "the words of another program": (exits(2, "usage: python [option]"), "TrainerCrashed", "exit code 2", None),
    "half a sentence": (exits(11, '{"succeeded": fal'), "TrainerCrashed", "exit code 11", None),
    "a reason that nobody knows": (
        exits(250, '{"succeeded": false, "reason": "Tired"}'),
        "TrainerCrashed",
        "250",
        True,
    ),
    "a command that does not exist": (start_error, "TrainerNotStarted", "executable file not found", None),
    "an end without a result": (succeeds(""), "ResultMissing", "left no result", True),
    "the end of another program": (succeeds("training done"), "ResultMissing", "left no result", True),
    "success without an adapter": (succeeds('{"succeeded": true}'), "ResultMissing", "left no result", True),
    "a very long sentence": (exits(11, failure(Reason.DATA_INVALID, LONG)), "DataInvalid", LONG[:500], None),
}


def test_what_became_of_a_pod_is_told(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    def story(number: int, name: str) -> tuple[Scene, list[Step]]:
        happens, reason, _, counted = PODS[name]
        after = ("Failed", reason) if counted is None else ("Starting", "Starting")
        steps = [
            Step(apply(), "Starting", "Starting"),
            Step(run(), "Preparing", "Preparing"),
            Step(happens, *after, attempts=[reason]),
        ]
        return Scene(api, kubelet, f"job-{number}"), steps

    for name, status in play_all({name: story(number, name) for number, name in enumerate(PODS)}).items():
        _, _, message, counted = PODS[name]
        (attempt,) = status["attempts"]
        assert message in attempt["message"], name
        assert attempt["counted"] == (counted is not False), name
        assert status.get("failures", 0) == (counted is not False), name


TWO = {"nodes": 2, "gpusPerNode": 0, "resources": {"limits": {"memory": "1Gi"}}}
PEER = says(Reason.PEER_FAILED, "Another worker ended.", code=203, collateral=True)
GROUPS: dict[str, tuple[Callable[[Scene], object], str, str]] = {
    # What happens to two workers at once, and the reason and a part of the message that come of it.
    "the author's error beside its echo": (
        both(PEER, says(Reason.DATA_INVALID, SENTENCE, code=11, worker=1)),
        "DataInvalid",
        SENTENCE,
    ),
    "out of memory beside its echo": (both(PEER, out_of_memory(worker=1)), "OutOfMemory", "Worker 1 used more"),
    "an eviction beside its echo": (both(PEER, evicted(worker=1)), "Disrupted", "Worker 1 was taken away"),
    "a signal beside its echo": (
        both(PEER, exits(139, worker=1)),
        "TrainerCrashed",
        "Worker 1 ended with exit code 139",
    ),
    "the world's error beside a silent end": (
        both(exits(1), says(Reason.STORAGE_UNAVAILABLE, SENTENCE, code=202, worker=1)),
        "StorageUnavailable",
        SENTENCE,
    ),
    "an unforeseen error beside an eviction": (
        both(says(Reason.INTERNAL_ERROR, "NCCL: connection closed.", code=204), evicted(worker=1)),
        "Disrupted",
        "Worker 1 was taken away",
    ),
    "a result beside a failure": (both(exits(139, worker=1), succeeds()), "Succeeded", "s3://models"),
}


def test_of_several_workers_the_cause_is_told_and_not_its_echo(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    # Nobody is judged before all workers have ended, however slow this machine is.
    operator_factory(group_end_seconds=600).start()
    scenes = {name: Scene(api, kubelet, f"job-{number}") for number, name in enumerate(GROUPS)}
    for scene in scenes.values():
        scene.apply(workers=TWO)
    for name, scene in scenes.items():
        scene.pods(count=2)
        GROUPS[name][0](scene)
    for name, scene in scenes.items():
        _, reason, message = GROUPS[name]
        (attempt,) = scene.wait_attempts(reason)["attempts"]
        assert message in attempt["message"], name


def test_a_worker_that_does_not_end_after_the_others_is_not_waited_for(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(workers=TWO), "Starting", "Starting"),
            Step(run(count=2), "Preparing", "Preparing"),
            Step(says(Reason.DATA_INVALID, SENTENCE, code=11, worker=1), "Failed", "DataInvalid", says=SENTENCE),
        ],
    )
    scene.api.wait_gone("Pod", scene.pod(worker=0))


def test_a_container_beside_the_trainer_keeps_no_machine_when_the_job_has_ended(scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    pod = scene.api.get("Pod", scene.pod())
    state = {"terminated": {"exitCode": 11, "message": failure(Reason.DATA_INVALID, SENTENCE)}}
    (container,) = pod["status"]["containerStatuses"]
    # As with an injected proxy: its container goes on, and so does the pod.
    statuses = [{**container, "state": state}, {**container, "name": "proxy"}]
    play(
        scene,
        [
            Step(
                lambda scene: scene.api.patch_status("Pod", scene.pod(), {"containerStatuses": statuses}),
                "Failed",
                "DataInvalid",
                says=SENTENCE,
            )
        ],
    )
    scene.api.wait_gone("Pod", scene.pod())
