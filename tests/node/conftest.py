"""Fixtures of the tests on a real node: one cluster for the session with everything installed, a namespace per test."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from examples.safety.base_model import cache_dir
from tests.cluster.api import Api
from tests.cluster.store import store_secret, tiny_bucket, tiny_spec
from tests.node.cluster import Cluster, run_cluster
from tests.node.containers import Images
from tests.node.debian import ensure_programs
from tests.node.installed import install_operator, install_training_operator, namespace_manifest
from tests.node.network import NODE_ADDRESS
from tests.node.scene import NodeScene
from tests.s3_server import S3Server, run_s3_server

MEMORY = {"requests": {"memory": "512Mi"}, "limits": {"memory": "2Gi"}}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Builds both images, and has them."""
    ensure_programs()
    found = Images(tmp_path_factory.mktemp("images") / "build.log")
    found.build_all()
    return found


@pytest.fixture(scope="session")
def cluster(images: Images) -> Iterator[Cluster]:
    """A real cluster with the training operator and our chart."""
    # Beside the layers: images are large, and a folder for temporary files may lie in memory.
    with run_cluster(cache_dir() / "node") as running:
        running.load(images, images.names)
        install_training_operator(running)
        install_operator(running)
        yield running


@pytest.fixture(scope="session")
def store(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server that pods reach."""
    with run_s3_server(tmp_path_factory.mktemp("s3"), NODE_ADDRESS) as server:
        yield server


@pytest.fixture(scope="session")
def bucket(store: S3Server) -> str:
    """A bucket with a tiny model and its data."""
    return tiny_bucket(store, train_rows=64)


@pytest.fixture
def namespace(cluster: Cluster, store: S3Server) -> Iterator[str]:
    """A namespace under the restricted Pod Security Standard, with the store's Secret."""
    name = f"team-{secrets.token_hex(3)}"
    cluster.api.create(namespace_manifest(name))
    cluster.api.wait("ServiceAccount", "default", lambda found: True, namespace=name)
    cluster.api.create(store_secret(store), name)
    yield name
    cluster.api.delete("Namespace", name)
    # The next test has the machine to itself.
    cluster.api.wait_gone("Namespace", name, 120)


@pytest.fixture
def api(cluster: Cluster, namespace: str) -> Api:
    """The API server as an administrator sees it, in the test's namespace."""
    return cluster.api.in_namespace(namespace)


@pytest.fixture
def scene(cluster: Cluster, namespace: str) -> Callable[[str], NodeScene]:
    """Makes a job's scene from its name."""
    return lambda name: NodeScene(cluster, namespace, name)


@pytest.fixture
def spec(bucket: str) -> Callable[..., dict[str, Any]]:
    """What to train on the tiny model; keywords are keys of the spec."""

    def make(**more: Any) -> dict[str, Any]:
        workers = {"nodes": 2, "gpusPerNode": 0, "resources": MEMORY}
        return tiny_spec(bucket, **{"workers": workers, **more})

    return make
