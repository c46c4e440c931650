"""A FineTuneJob on a real node: what the tests do to it and look at, in words of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from finetune_operator.names import child_name, pod_name
from tests.cluster.api import Object, condition_of, wait_until
from tests.cluster.scene import manifest
from tests.node.cluster import Cluster

TRAIN_SECONDS = 300
"""An attempt of two pods on two cores: both import PyTorch, which takes most of it."""
FINISHED = ("Succeeded", "Failed")


@dataclass(frozen=True)
class NodeScene:
    """One job in its namespace."""

    cluster: Cluster
    namespace: str
    name: str

    def apply(self, **spec: Any) -> None:
        """`kubectl apply`, as users do."""
        document = yaml.safe_dump(manifest(self.name, **spec))
        self.kubectl("apply", "--filename", "-", stdin=document)

    def change(self, **spec: Any) -> None:
        """Change keys of its spec."""
        self.cluster.api.patch("FineTuneJob", self.name, {"spec": spec}, self.namespace)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Output of kubectl in the job's namespace."""
        done = self.cluster.kubectl("--namespace", self.namespace, *arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self) -> Object:
        """The job as it is."""
        return self.cluster.api.get("FineTuneJob", self.name, self.namespace)

    def status(self) -> Object:
        """Its status."""
        found: Object = self.job().get("status") or {}
        return found

    def step(self) -> int:
        """How far it is."""
        return int((self.status().get("progress") or {}).get("step") or 0)

    def wait_step(self, step: int) -> None:
        """Return once it has trained that far.

        Raises:
            AssertionError: it ended before, or took too long.
        """
        seen = wait_until(
            self.status,
            lambda status: status.get("phase") in FINISHED or (status.get("progress") or {}).get("step", 0) >= step,
            TRAIN_SECONDS,
        )
        assert seen["phase"] not in FINISHED, self.story()

    def wait_phase(self, *phases: str, seconds: float = TRAIN_SECONDS) -> Object:
        """Its status once it is in one of `phases`.

        Raises:
            AssertionError: it ended otherwise, or took too long; the text says what its pods said.
        """
        seen = wait_until(self.status, lambda status: status.get("phase") in (*phases, *FINISHED), seconds)
        assert seen["phase"] in phases, self.story()
        return seen

    def wait_reason(self, reason: str, seconds: float = TRAIN_SECONDS) -> str:
        """The message of the Succeeded condition once it has that reason."""
        condition = wait_until(
            lambda: condition_of(self.job(), "Succeeded") or {},
            lambda found: found.get("reason") == reason,
            seconds,
        )
        return str(condition["message"])

    def pod(self, attempt: int = 1, worker: int = 0) -> str:
        """Name of one worker's pod."""
        return pod_name(child_name(self.name, self.job()["metadata"]["uid"], attempt), worker)

    def pods(self) -> list[Object]:
        """All pods of its namespace that belong to it."""
        return self.cluster.api.list("Pod", self.namespace, labels=f"finetune.dev/job-name={self.name}")

    def story(self) -> str:
        """What a person would look at after a failure."""
        described = self.kubectl("describe", "finetunejob", self.name)
        logs = [
            self.cluster.kubectl("--namespace", self.namespace, "logs", pod["metadata"]["name"], "--tail=40").stdout
            for pod in self.pods()
        ]
        return "\n".join([described, *logs])
