"""A real API server accepts what the chart renders, and admits its pod under the restricted Pod Security Standard."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.charts import FOREIGN_KINDS, NAMESPACE, TABLE, Object, pod_of, render
from tests.chart.schemas import LOCATION
from tests.cluster.api import ApiError
from tests.cluster.control_plane import ControlPlane
from tests.tools.build import binary


def kubeconform(objects: list[Object], schemas: Path) -> subprocess.CompletedProcess[str]:
    """Check objects against schemas. A kind without a schema is an error, but for those of the Prometheus operator."""
    command: list[str | Path] = [binary("kubeconform"), "-strict", "-summary", "-skip", ",".join(FOREIGN_KINDS)]
    return subprocess.run(
        [*command, "-schema-location", f"{schemas}/{LOCATION}", "-"],
        input=yaml.safe_dump_all(objects),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", TABLE)
def test_every_object_conforms_to_the_api_servers_schemas(name: str, schemas: Path) -> None:
    objects = render(TABLE[name])
    done = kubeconform(objects, schemas)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = len([found for found in objects if found["kind"] in FOREIGN_KINDS])
    assert f"Valid: {len(objects) - skipped}, Invalid: 0, Errors: 0, Skipped: {skipped}" in done.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spec": {"replicas": "one"}}, "/spec/replicas"),
        ({"spec": {"replica": 1}}, "additional properties 'replica' not allowed"),
        ({"kind": "Deploymint"}, "could not find schema for Deploymint"),
    ],
)
def test_those_schemas_refuse_what_is_wrong(change: Any, said: str, schemas: Path) -> None:
    (deployment,) = (found for found in render() if found["kind"] == "Deployment")
    done = kubeconform([{**deployment, **change}], schemas)
    assert done.returncode == 1
    assert said in done.stdout


@pytest.mark.parametrize("name", TABLE)
def test_the_api_server_would_take_every_object(name: str, bare_plane: ControlPlane) -> None:
    objects = [found for found in render(TABLE[name]) if found["kind"] not in FOREIGN_KINDS]
    options = ["--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict"]
    done = bare_plane.kubectl("apply", *options, "--filename=-", stdin=yaml.safe_dump_all(objects))
    assert done.returncode == 0, done.stderr
    # It warns of pods that the restricted standard would keep out, and of kinds on their way out.
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == len(objects)


@pytest.mark.parametrize("name", TABLE)
def test_the_operators_pod_is_admitted_under_the_restricted_standard(name: str, bare_plane: ControlPlane) -> None:
    created = dry_run_pod(bare_plane, pod_of(render(TABLE[name])))
    assert created["metadata"]["namespace"] == NAMESPACE


def test_a_pod_with_fewer_restrictions_is_not_admitted(bare_plane: ControlPlane) -> None:
    with pytest.raises(ApiError, match='violates PodSecurity "restricted'):
        dry_run_pod(bare_plane, pod_of(render({"securityContext": {"allowPrivilegeEscalation": True}})))


def dry_run_pod(plane: ControlPlane, template: Object) -> Object:
    """The pod that a Deployment would make of its template."""
    # There is nobody of the name that the release would create.
    spec = {**template["spec"], "serviceAccountName": "default"}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "operator"}, "spec": spec}
    return plane.api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", params={"dryRun": "All"}, json=body)
