"""The recorded statuses are what the operator writes today.

After a change that is meant: `FINETUNE_RECORD=1 .venv/bin/python -m pytest tests/integrations/test_recordings.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune_api.outcome import Reason
from finetune_operator.names import CA_CONFIG_MAP, CA_KEY, KUEUE_QUEUE_LABEL, MANAGER
from finetune_trainer.train.progress import Endpoint
from finetune_trainer.train.progress_status import Phase, Progress, trainer_status
from tests.cluster.api import Api, Object, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, failure, manifest
from tests.cluster.steps import (
    Happening,
    Step,
    apply,
    change,
    checkpoint,
    play,
    play_all,
    queue_holds,
    run,
    says,
    says_user_error,
    succeeds,
    suspend,
)
from tests.integrations.recordings import store, stored, timeless

RECORD = "FINETUNE_RECORD"
LONG_SECONDS = 3600


class Recorder:
    """Plays the states and looks at each job when it is there."""

    def __init__(self, plane: ControlPlane, operator: OperatorProcess, api: Api, kubelet: Kubelet, folder: Path):
        self._plane, self._operator, self._api, self._kubelet = plane, operator, api, kubelet
        self._folder = folder

    def reports(self, phase: Phase, percent: int) -> Happening:
        """The trainer reports how far it is."""

        def happen(scene: Scene) -> None:
            (pod,) = scene.pods()
            token, authority = self._folder / "token", self._folder / CA_KEY
            token.write_text(self._plane.token(scene.api.namespace or "", "default", audiences=(MANAGER,), pod=pod))
            authority.write_text(scene.api.get("ConfigMap", CA_CONFIG_MAP)["data"][CA_KEY])
            progress = Progress(phase=phase, percent=percent, step=10 * percent, total_steps=1000, loss=1.25)
            endpoint = Endpoint(self._operator.progress_url, token, authority)
            endpoint.post(trainer_status(progress, datetime.now(UTC)))

        return happen

    def stops_with_a_checkpoint(self, scene: Scene) -> None:
        """Its author suspends it, and before the pod goes its trainer says where it was."""
        (pod,) = scene.pods()
        with scene.kubelet.holding_deletions():
            suspend(scene)
            scene.api.wait("Pod", pod["metadata"]["name"], lambda found: "deletionTimestamp" in found["metadata"])
            scene.kubelet.fail(pod, 143, failure(Reason.TERMINATED, checkpoint=checkpoint(70)))
            scene.api.wait("FineTuneJob", scene.name, lambda job: job["status"].get("checkpoint"))

    def stories(self) -> dict[str, Sequence[Step]]:
        """How to come to each state that can be waited for."""
        applied = Step(apply(), "Starting", "Starting")
        begun = [applied, Step(run(), "Preparing", "Preparing")]
        running = [*begun, Step(self.reports(Phase.RUNNING, 40), "Running", "Running")]
        no_room = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
        return {
            "pending": [
                applied,
                Step(lambda s: s.kubelet.unschedulable(s.pods()[0], no_room), "Pending", "Unschedulable"),
            ],
            "invalid": [Step(apply(train_path="/data/train.jsonl"), "Pending", "InvalidSpec", stalled=True)],
            "queued": [Step(queued, "Starting", "Starting"), Step(queue_holds(), "Queued", "WaitingForQuota")],
            "starting": [applied],
            "preparing": begun,
            "running": running,
            "publishing": [*running, Step(self.reports(Phase.PUBLISHING, 99), "Publishing", "Publishing")],
            "suspended": [
                *running,
                Step(self.stops_with_a_checkpoint, "Suspended", "Suspended", says="holds no machines"),
            ],
            "retrying": [
                *running,
                Step(
                    says(Reason.HUB_UNAVAILABLE, "The Hub did not answer: try later.", code=201),
                    "Retrying",
                    "HubUnavailable",
                    attempts=["HubUnavailable"],
                ),
            ],
            "succeeded": [*running, Step(succeeds(), "Succeeded", "Succeeded")],
            "failed": [*begun, Step(says_user_error(), "Failed", "DataInvalid")],
        }

    def record(self) -> dict[str, Object]:
        """All of them, by name."""
        new = Scene(self._api, self._kubelet, "new")
        new.apply()
        recordings = {"new": new.job()}
        self._operator.start()
        stories = {name: (Scene(self._api, self._kubelet, name), steps) for name, steps in self.stories().items()}
        play_all(stories)
        for name, (scene, steps) in stories.items():
            # Waited for once more: after a failure status tells for a moment that the pods are on their way out.
            recordings[name] = wait_until(scene.job, _is_at(steps[-1]))
        running, _ = stories["running"]
        with self._kubelet.holding_deletions():
            play(running, [Step(suspend, "Suspended", "Suspended", says="on its way out")])
            recordings["suspending"] = running.job()
        self._operator.stop()
        preparing, _ = stories["preparing"]
        change(backoffLimit=5)(preparing)
        recordings["edited"] = preparing.job()
        return {name: timeless(job) for name, job in recordings.items()}


def _is_at(step: Step) -> Callable[[Object], bool]:
    return lambda job: step.holds(job["status"])


def queued(scene: Scene) -> None:
    """The job is applied with the label of a queue."""
    body = manifest(scene.name)
    body["metadata"]["labels"] = {KUEUE_QUEUE_LABEL: "fine-tuning"}
    scene.api.create(body)


@pytest.fixture
def recorded(
    control_plane: ControlPlane, operator_factory: OperatorFactory, api: Api, kubelet: Kubelet, tmp_path: Path
) -> dict[str, Object]:
    """What the operator writes today."""
    operator = operator_factory(retry_base_seconds=LONG_SECONDS, retry_limit_seconds=LONG_SECONDS)
    return Recorder(control_plane, operator, api, kubelet, tmp_path).record()


def test_the_recordings_are_what_the_operator_writes(recorded: dict[str, Object]) -> None:
    if os.environ.get(RECORD):
        store(recorded)
    kept = stored()
    assert recorded.keys() == kept.keys()
    for name, job in recorded.items():
        assert job == kept[name], f"{name}: see the first lines of this file."
