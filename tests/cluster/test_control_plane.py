"""The control plane that other tests stand on is a real one, and the helpers play the kubelet as one behaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.api import Api, ApiError, Object, has_condition, wait_until
from tests.cluster.control_plane import OPERATOR_ACCOUNT, OPERATOR_NAMESPACE, OPERATOR_USER, ROOT, ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.s3_server import S3Server

AUDIENCE = "somebody-else"


def pod(name: str = "pod") -> Object:
    """A pod that a restricted namespace admits."""
    container = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "pytorch", "image": "trainer:test", "securityContext": container}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def pytorchjob(replicas: int = 2) -> Object:
    """A PyTorchJob without a master."""
    worker = {"replicas": replicas, "restartPolicy": "Never", "template": {"spec": pod()["spec"]}}
    spec = {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": {"Worker": worker}}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "job"}, "spec": spec}


def config_map(name: str, owner: Object | None = None) -> Object:
    """A ConfigMap, owned by another object or by nobody."""
    metadata: Object = {"name": name}
    if owner:
        reference = {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        metadata["ownerReferences"] = [{"apiVersion": owner["apiVersion"], "kind": owner["kind"], **reference}]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def test_client_and_server_are_the_pinned_version(control_plane: ControlPlane) -> None:
    answer = json.loads(control_plane.kubectl("version", "--output=json").stdout)
    assert answer["clientVersion"]["gitVersion"] == answer["serverVersion"]["gitVersion"]
    assert answer["serverVersion"]["gitVersion"].startswith("v1.")


def test_jobs_are_known_by_kubectl(control_plane: ControlPlane) -> None:
    assert control_plane.kubectl("get", "finetunejobs,pytorchjobs", "-A").returncode == 0


def test_a_service_account_has_its_rights_and_no_others(
    control_plane: ControlPlane, shared_operator: OperatorProcess
) -> None:
    shared_operator.stop()  # it has the same account
    kubeconfig = control_plane.kubeconfig(OPERATOR_NAMESPACE, OPERATOR_ACCOUNT)
    since = control_plane.audit.position()
    assert control_plane.kubectl("get", "finetunejobs", "-A", kubeconfig=kubeconfig).returncode == 0
    refused = control_plane.kubectl("get", "secrets", "-A", kubeconfig=kubeconfig)
    assert "Forbidden" in refused.stderr
    requests = [r for r in control_plane.audit.requests(OPERATOR_USER, since) if r.resource]
    assert [(r.verb, r.resource, r.code, r.forbidden) for r in requests] == [
        ("list", "finetunejobs", 200, False),
        ("list", "secrets", 403, True),
    ]
    assert not any(request.writes for request in requests)


def test_a_token_is_good_for_its_audience_and_as_long_as_its_pod(control_plane: ControlPlane, api: Api) -> None:
    bound = api.create(pod())

    def review(token: str, audience: str) -> Object:
        spec = {"token": token, "audiences": [audience]}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        status: Object = api.create(body)["status"]
        return status

    # The server remembers for ten seconds that a token was good: the second is shown to it only afterwards.
    token, second = (
        control_plane.token(api.namespace or "", "default", audiences=(AUDIENCE,), pod=bound) for _ in range(2)
    )
    accepted = review(token, AUDIENCE)
    assert accepted["authenticated"]
    assert accepted["user"]["extra"]["authentication.kubernetes.io/pod-uid"] == [bound["metadata"]["uid"]]
    assert not review(token, "finetune-operator").get("authenticated")
    api.delete("Pod", "pod")
    api.wait_gone("Pod", "pod")
    assert not review(second, AUDIENCE).get("authenticated")


def test_a_pytorchjob_succeeds_when_all_its_workers_have(api: Api, kubelet: Kubelet) -> None:
    api.create(pytorchjob(replicas=2))
    workers = kubelet.pods("job", 2)
    assert [worker["metadata"]["name"] for worker in workers] == ["job-worker-0", "job-worker-1"]
    assert [service["spec"]["clusterIP"] for service in api.list("Service")] == ["None", "None"]
    for worker in workers:
        kubelet.run(worker)
    api.wait("PyTorchJob", "job", lambda job: has_condition(job, "Running"))
    ended = kubelet.succeed(workers[1], message="done")
    assert ended["status"]["containerStatuses"][0]["state"]["terminated"]["message"] == "done"
    job = api.wait("PyTorchJob", "job", lambda job: job["status"]["replicaStatuses"]["Worker"].get("succeeded") == 1)
    assert not has_condition(job, "Succeeded")
    kubelet.succeed(workers[0])
    api.wait("PyTorchJob", "job", lambda job: has_condition(job, "Succeeded"))


def test_a_pytorchjob_fails_with_a_worker(api: Api, kubelet: Kubelet) -> None:
    api.create(pytorchjob(replicas=1))
    (worker,) = kubelet.pods("job", 1)
    kubelet.unschedulable(worker, "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")
    kubelet.scheduled(worker)
    kubelet.pull_fails(worker, "trainer:test")
    kubelet.config_error(worker, 'secret "token" not found')
    kubelet.run(worker)
    kubelet.oom_kill(worker)
    api.wait("PyTorchJob", "job", lambda job: has_condition(job, "Failed"))


def test_the_training_operator_refuses_an_invalid_job(api: Api) -> None:
    job = pytorchjob()
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"] = "trainer"
    with pytest.raises(ApiError, match=r"validator\.pytorchjob.*pytorch") as refused:
        api.create(job)
    assert 400 <= refused.value.code < 500


def test_nothing_is_accepted_while_the_training_operator_is_down(control_plane: ControlPlane, api: Api) -> None:
    with control_plane.training_operator.stopped():
        with pytest.raises(ApiError, match="failed calling webhook") as refused:
            api.create(pytorchjob())
        assert refused.value.code == 500
    api.create(pytorchjob())


def test_everything_is_still_there_after_the_api_server_was_away(control_plane: ControlPlane, api: Api) -> None:
    api.create(config_map("kept"))
    control_plane.api_server.restart()
    assert api.get("ConfigMap", "kept")


def test_a_deleted_pod_stays_on_its_node_until_the_kubelet_confirms(api: Api, kubelet: Kubelet) -> None:
    api.create(pod())
    kubelet.run("pod")
    with kubelet.holding_deletions():
        api.delete("Pod", "pod")
        assert "deletionTimestamp" in api.get("Pod", "pod")["metadata"]
        kubelet.terminate("pod")
        assert api.find("Pod", "pod") is None
        api.create(pod())
        kubelet.run("pod")
        api.delete("Pod", "pod")
    api.wait_gone("Pod", "pod")


def test_an_evicted_and_a_preempted_pod_say_so(api: Api, kubelet: Kubelet) -> None:
    api.create(pod())
    evicted = kubelet.evict("pod")
    assert (evicted["status"]["phase"], evicted["status"]["reason"]) == ("Failed", "Evicted")
    assert has_condition(evicted, "DisruptionTarget")
    api.create(pod("preempted"))
    kubelet.run("preempted")
    kubelet.preempt("preempted")
    api.wait_gone("Pod", "preempted")


def test_what_belongs_to_a_deleted_object_is_collected(api: Api) -> None:
    owner = api.create(config_map("owner"))
    job = api.create(pytorchjob(replicas=1))
    api.create(config_map("owned", owner))
    api.create(config_map("owned-by-job", job))
    api.delete("ConfigMap", "owner")
    api.delete("PyTorchJob", "job")
    for name in ("owned", "owned-by-job"):
        api.wait_gone("ConfigMap", name)
    wait_until(lambda: api.list("Pod"), lambda pods: not pods)


def test_a_namespace_ends_with_everything_in_it(api: Api, kubelet: Kubelet, namespace: str) -> None:
    api.create(pytorchjob())
    for worker in kubelet.pods("job", 2):
        kubelet.run(worker)
    api.delete("PyTorchJob", "job")
    api.delete("Namespace", namespace)
    api.wait_gone("Namespace", namespace)


def test_a_failed_wait_shows_what_was_seen_last(api: Api) -> None:
    api.create(config_map("seen"))
    with pytest.raises(AssertionError, match=r"(?s)Not so within.*name: seen"):
        api.wait("ConfigMap", "seen", lambda found: "data" in found, timeout_seconds=0.1)


def test_pods_read_what_the_object_store_holds(s3_server: S3Server) -> None:
    bucket, client = s3_server.new_bucket(), s3_server.client()
    client.put_object(Bucket=bucket, Key="rows.jsonl", Body=b"{}\n")
    assert client.get_object(Bucket=bucket, Key="rows.jsonl")["Body"].read() == b"{}\n"


def test_a_killed_test_run_leaves_no_process_behind(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from tests.processes import Server
server = Server("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"], Path({str(tmp_path / "log")!r}),
    ready=lambda: True)
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    sleeper = int(run.stdout.readline())
    os.kill(sleeper, 0)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    deadline = time.monotonic() + 10
    while _exists(sleeper):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _exists(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
