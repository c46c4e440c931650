"""Fixtures of the tests of the chart on a real control plane, where nothing of ours is installed but the kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chart.charts import NAMESPACE, TEAMS
from tests.chart.release import Release
from tests.chart.schemas import write_schemas
from tests.cluster.control_plane import ControlPlane, operator_rights, run_control_plane
from tests.cluster.kubelet import Kubelet, Reaper

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


@pytest.fixture(scope="session")
def bare_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with the training operator and the namespaces of the tables, without our operator's objects."""
    with run_control_plane(tmp_path_factory.mktemp("chart")) as plane:
        for found in operator_rights():
            if found["kind"] != "Namespace":
                plane.api.delete(found["kind"], found["metadata"]["name"], found["metadata"].get("namespace"))
        for name in (NAMESPACE, *TEAMS):
            metadata = {"name": name, "labels": RESTRICTED}
            plane.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
            plane.api.wait("ServiceAccount", "default", bool, namespace=name)
        yield plane


@pytest.fixture(scope="session")
def schemas(bare_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the JSON schemas of every kind that the API server has, for kubeconform."""
    folder = tmp_path_factory.mktemp("schemas")
    write_schemas(bare_plane.api, folder)
    return folder


@pytest.fixture(scope="session")
def chart_reaper(bare_plane: ControlPlane) -> Iterator[Reaper]:
    """The node that pods are bound to, and the confirmation of their deletion."""
    reaper = Reaper(bare_plane.api)
    reaper.start()
    yield reaper
    reaper.stop()


@pytest.fixture
def kubelet(bare_plane: ControlPlane, chart_reaper: Reaper) -> Kubelet:
    """What happens to the pods of the first team."""
    return Kubelet(bare_plane.api.in_namespace(TEAMS[0]), chart_reaper)


@pytest.fixture
def release(bare_plane: ControlPlane, tmp_path: Path) -> Iterator[Release]:
    """A release that is not installed yet, and is gone afterwards with everything that it leaves."""
    release = Release(bare_plane, tmp_path)
    yield release
    release.clear()
