"""Examples are what a real API server stores, and their PyTorchJobs what the training operator's webhook takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import finetune
from tests.cluster.api import Api
from tests.cluster.control_plane import ControlPlane
from tests.examples.jobs import EXAMPLES, IN_A_CLUSTER, JOBS, ExampleJob


def dry_run(control_plane: ControlPlane, api: Api, text: str) -> str:
    """What the API server says to `text`, which it checks as ever and does not store."""
    namespace = str(api.namespace)
    done = control_plane.kubectl("apply", "--dry-run=server", "-n", namespace, "-f", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_api_server_accepts_it(control_plane: ControlPlane, api: Api, job: ExampleJob) -> None:
    assert "created (server dry run)" in dry_run(control_plane, api, job.text)


@pytest.mark.parametrize("job", IN_A_CLUSTER, ids=lambda job: job.name)
def test_the_training_operator_accepts_its_pytorchjob(
    control_plane: ControlPlane, api: Api, job: ExampleJob, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(job.text)
    rendered = finetune("render", str(file), "-n", str(api.namespace), "-o", "json")
    said = dry_run(control_plane, api, rendered.stdout)
    assert said.count("created (server dry run)") == 2


@pytest.mark.parametrize("name", ["claims.yaml", "first-job-claim.yaml"])
def test_the_api_server_accepts_the_claims(control_plane: ControlPlane, api: Api, name: str) -> None:
    assert "persistentvolumeclaim/" in dry_run(control_plane, api, (EXAMPLES / name).read_text())
