"""What a platform team installs into a cluster: Kubeflow's training operator, and ours by its Helm chart."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.control_plane import OPERATOR_NAMESPACE, ROOT, TRAINING_MODULE, TRAINING_NAMESPACE, TRAINING_SERVICE
from tests.node.cluster import Cluster
from tests.node.containers import TRAINING_OPERATOR
from tests.tools.build import binary, module_folder

CHART = ROOT / "helm" / "finetune-operator"
RELEASE = "finetune-operator"
READY_SECONDS = 120
VALUES: Mapping[str, Any] = {
    "image": {"registry": "localhost"},
    "trainer": {"image": {"registry": "localhost"}},
    # So that no test waits for minutes.
    "settings": {"retryBaseSeconds": 1, "retryLimitSeconds": 5, "statusIntervalSeconds": 1, "groupEndSeconds": 20},
}


def install_training_operator(cluster: Cluster) -> None:
    """Its published manifests, with the image that this machine has."""
    folder = module_folder(TRAINING_MODULE) / "manifests"
    documents = yaml.safe_load_all(cluster.kubectl("kustomize", folder / "overlays" / "standalone").stdout)
    found = [document for document in documents if document["kind"] != "CustomResourceDefinition"]
    (deployment,) = (document for document in found if document["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container |= {"image": TRAINING_OPERATOR, "args": ["--enable-scheme=pytorchjob"]}
    cluster.install_pytorchjobs()
    applied = cluster.kubectl("apply", "--server-side", "--filename", "-", stdin=yaml.safe_dump_all(found))
    assert applied.returncode == 0, applied.stderr
    wait_available(cluster, TRAINING_NAMESPACE, TRAINING_SERVICE)


def install_operator(cluster: Cluster, values: Mapping[str, Any] = VALUES) -> None:
    """`helm install` into a namespace that enforces the restricted Pod Security Standard."""
    cluster.api.apply(namespace_manifest(OPERATOR_NAMESPACE))
    helm(cluster, "install", RELEASE, CHART, "--wait", f"--timeout={READY_SECONDS}s", values=values)


def helm(cluster: Cluster, *arguments: str | Path, values: Mapping[str, Any] | None = None) -> str:
    """Output of the real helm, as administrator, in the operator's namespace."""
    command = [binary("helm"), "--kubeconfig", cluster.admin_kubeconfig, "--namespace", OPERATOR_NAMESPACE, *arguments]
    if values is not None:
        command += ["--values", "-"]
    home = {"HOME": str(cluster.folder / "home"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        list(map(str, command)), input=json.dumps(values or {}), env=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_available(cluster: Cluster, namespace: str, deployment: str) -> None:
    """Return once all pods of a Deployment are ready."""
    options = ["--namespace", namespace, "--for=condition=Available", f"--timeout={READY_SECONDS}s"]
    done = cluster.kubectl("wait", f"deployment/{deployment}", *options)
    assert done.returncode == 0, cluster.kubectl("describe", "pods", "--namespace", namespace).stdout


def namespace_manifest(name: str) -> dict[str, Any]:
    """A namespace under the restricted Pod Security Standard."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
