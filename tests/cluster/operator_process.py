"""The operator as users run it: a process with environment variables and the rights of its service account alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import watched_operator
from tests.cluster.audit import Request
from tests.cluster.control_plane import HOST, OPERATOR_ACCOUNT, OPERATOR_NAMESPACE, ControlPlane
from tests.cluster.watched_operator import FILE_ENV, Blocked, read_blocked
from tests.processes import Server, unused_port

PREFIX = "FINETUNE_OPERATOR_"
COMMAND = (sys.executable, "-m", "finetune_operator")
WATCHED_COMMAND = (sys.executable, "-P", watched_operator.__file__)
"""The same, and what keeps its event loop for too long is told by `blocked`."""

FAST: Mapping[str, Any] = {
    "resync_seconds": 5,
    "status_interval_seconds": 0.5,
    "retry_base_seconds": 0.2,
    "retry_limit_seconds": 2,
    "group_end_seconds": 2,
    "pods_expected_seconds": 5,
    "default_output_uri": "s3://models/team-a",
    "trainer_image": "trainer:test",
}
"""Settings with which no test waits for what would take minutes in a cluster."""


class OperatorProcess:
    """One operator. It can be stopped, killed and started again, with the same ports and log."""

    def __init__(
        self,
        control_plane: ControlPlane,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        *,
        account: str = OPERATOR_ACCOUNT,
        command: Sequence[str] = COMMAND,
        server: str | None = None,
    ) -> None:
        """An operator that is not started yet.

        Args:
            control_plane: where it works.
            folder: takes its log.
            settings: those of OperatorSettings by their names, on top of FAST; None takes one of FAST away.
            account: service account in the operator's namespace whose rights it has.
            command: what is run.
            server: URL of what stands between it and the API server, if anything does.
        """
        self.control_plane = control_plane
        self.health_port, self.metrics_port, self.progress_port = unused_port(), unused_port(), unused_port()
        ours = {
            "namespace": OPERATOR_NAMESPACE,
            "health_port": self.health_port,
            "metrics_port": self.metrics_port,
            "progress_port": self.progress_port,
            "progress_host": HOST,
            "progress_url": f"https://localhost:{self.progress_port}",
        }
        self.settings = {**FAST, **ours, **(settings or {})}
        self.user = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{account}"
        kubeconfig = control_plane.kubeconfig(OPERATOR_NAMESPACE, account, server=server)
        self.blocked_file = folder / "blocked.jsonl"
        self._audit_start = control_plane.audit.position()
        self.server = Server(
            "finetune-operator",
            command,
            folder / "operator.log",
            ready=self._ready,
            environment={**self._environment(), "KUBECONFIG": str(kubeconfig), FILE_ENV: str(self.blocked_file)},
            without=PREFIX,
        )

    @property
    def health_url(self) -> str:
        """Of the health endpoint, without a path."""
        return f"http://{HOST}:{self.health_port}"

    @property
    def metrics_url(self) -> str:
        """Of the metrics."""
        return f"http://{HOST}:{self.metrics_port}/metrics"

    @property
    def progress_url(self) -> str:
        """Of the progress endpoint, without a path."""
        return str(self.settings["progress_url"])

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self.server.running

    def start(self) -> None:
        """Start it and wait until it says that it is ready.

        Raises:
            StartError: it ended, or took too long; the text holds the end of its log.
        """
        self.server.start()

    def stop(self) -> int | None:
        """SIGTERM; returns the exit code."""
        return self.server.stop()

    def kill(self) -> None:
        """SIGKILL, as when the node dies."""
        self.server.kill()

    def restart(self) -> None:
        """Stop and start."""
        self.server.restart()

    def log(self, since: int = 0) -> str:
        """What it has written behind a position that `server.log_size` gave."""
        return self.server.log_tail(lines=100_000, since=since)

    def metrics(self) -> str:
        """Its metrics, in Prometheus' text format."""
        return httpx.get(self.metrics_url, trust_env=False).raise_for_status().text

    def requests(self, since: int | None = None) -> list[Request]:
        """What it has asked of the API server behind a position that `audit.position` gave, else from the start."""
        return self.control_plane.audit.requests(self.user, self._audit_start if since is None else since)

    def writes(self, since: int | None = None) -> list[Request]:
        """Those of them that ask for a change."""
        return [request for request in self.requests(since) if request.writes]

    def forbidden(self, since: int | None = None) -> list[str]:
        """Requests that it had no permission for, one line each: there must be none."""
        requests = self.requests(since)
        return sorted({f"{r.verb} {r.resource} {r.namespace}/{r.name}" for r in requests if r.forbidden})

    def blocked_size(self) -> int:
        """Where what `blocked` tells from now on will begin (bytes)."""
        return self.blocked_file.stat().st_size if self.blocked_file.exists() else 0

    def blocked(self, since: int = 0) -> list[Blocked]:
        """What has kept its event loop for too long behind a position that `blocked_size` gave, if it is watched."""
        return read_blocked(self.blocked_file, since)

    def _environment(self) -> dict[str, str]:
        given = {name: value for name, value in self.settings.items() if value is not None}
        return {f"{PREFIX}{name.upper()}": _text(value) for name, value in given.items()}

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.health_url}/readyz", timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(value)
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)
