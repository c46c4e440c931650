"""Pods have no more rights than stated: tried from inside of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_operator.desired.volumes import PROGRESS_FOLDER
from finetune_operator.names import MANAGER
from tests.cluster.control_plane import OPERATOR_NAMESPACE
from tests.node.cluster import Cluster
from tests.node.installed import namespace_manifest
from tests.node.scene import NodeScene

ENDPOINT = f"https://finetune-operator.{OPERATOR_NAMESPACE}.svc:8443"
ASK = """
import json, ssl, sys, urllib.error, urllib.request
url, token, ca, body = json.loads(sys.argv[1])
context = ssl.create_default_context(cafile=ca) if ca else ssl._create_unverified_context()
token = open(token).read() if token.startswith("/") else token
headers = {"Authorization": "Bearer " + token} if token else {}
request = urllib.request.Request(url, headers=headers, data=body.encode() if body else None)
try:
    print(urllib.request.urlopen(request, context=context, timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
"""Asks for a URL with what is in a token's file, or with a token, and prints the status."""


@pytest.fixture
def running(scene: Callable[[str], NodeScene], spec: Callable[..., dict[str, Any]]) -> Iterator[NodeScene]:
    """A job that trains for as long as the test takes."""
    job = scene("long")
    job.apply(**spec(workers={"nodes": 1, "gpusPerNode": 0}, num_epochs=5000))
    job.wait_step(1)
    yield job
    job.kubectl("delete", "finetunejob", "long")


def double_of(pod: dict[str, Any]) -> dict[str, Any]:
    """A pod of the same name and labels that somebody makes in a namespace of their own.

    With the same owners, too, it would be deleted before it could speak: they are in another namespace.
    """
    metadata = {key: pod["metadata"][key] for key in ("name", "labels")}
    (container,) = pod["spec"]["containers"]
    sleeper = {key: container[key] for key in ("name", "image", "securityContext")} | {"command": ["sleep", "600"]}
    spec = {"containers": [sleeper], "securityContext": pod["spec"]["securityContext"], "restartPolicy": "Never"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def python_in_pod(job: NodeScene, code: str, *arguments: str) -> str:
    """What a Python program prints in the job's pod."""
    return job.kubectl("exec", job.pod(), "--", "python", "-c", code, *arguments).strip()


def ask(job: NodeScene, url: str, *, token: str = "", ca: str = "", body: str = "") -> int:
    """HTTP status that the job's pod gets."""
    return int(python_in_pod(job, ASK, json.dumps([url, token, ca, body])))


def test_a_trainer_can_tell_its_progress_and_nothing_else(cluster: Cluster, running: NodeScene) -> None:
    token, ca = f"{PROGRESS_FOLDER}/token", f"{PROGRESS_FOLDER}/ca.crt"
    api = "https://kubernetes.default.svc"
    secrets = f"{api}/api/v1/namespaces/{running.namespace}/secrets"
    assert python_in_pod(running, "import os; print(os.environ['KUBEFLOW_TRAINER_SERVER_URL'])") == ENDPOINT
    # Its token is for the operator's endpoint alone.
    assert ask(running, secrets, token=token) == 401
    assert ask(running, secrets) == 403
    assert ask(running, ENDPOINT, ca=ca, body="{}") == 401
    mounted = python_in_pod(running, "import os; print(os.path.exists('/var/run/secrets/kubernetes.io'))")
    assert mounted == "False"


def test_another_namespaces_token_is_refused_by_the_progress_endpoint(cluster: Cluster, running: NodeScene) -> None:
    """A tenant who can make tokens of its own accounts cannot speak for another one's job."""
    other = f"{running.namespace}-other"
    cluster.api.create(namespace_manifest(other))
    try:
        cluster.api.wait("ServiceAccount", "default", lambda found: True, namespace=other)
        pod = cluster.api.create(double_of(cluster.api.get("Pod", running.pod(), running.namespace)), other)
        token = cluster.token(other, "default", audiences=(MANAGER,), pod=pod, expiration_seconds=600)
        assert ask(running, ENDPOINT, token=token, ca=f"{PROGRESS_FOLDER}/ca.crt", body="{}") == 503
    finally:
        cluster.api.delete("Namespace", other)


def test_nothing_is_written_outside_of_volumes_and_nobody_is_root(cluster: Cluster, running: NodeScene) -> None:
    code = """
import os
for folder in ("/", "/opt/finetune", "/opt/project", "/etc", "/var/tmp"):
    try:
        open(os.path.join(folder, "probe"), "w")
        print("writable", folder)
    except OSError as error:
        pass
found = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(os.getuid(), *(found[key].strip() for key in ("CapBnd", "NoNewPrivs", "Seccomp")))
"""
    assert python_in_pod(running, code) == "1000 0000000000000000 1 2"
    (pod,) = cluster.api.list("Pod", OPERATOR_NAMESPACE)
    operator = ["--namespace", OPERATOR_NAMESPACE, "exec", pod["metadata"]["name"], "--", "python", "-c", code]
    assert cluster.kubectl(*operator).stdout.strip() == "65532 0000000000000000 1 2"
