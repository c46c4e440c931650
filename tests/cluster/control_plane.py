"""A real Kubernetes control plane and the real Kubeflow training operator, as processes on loopback.

What an API server accepts, what garbage collection removes and what becomes of a PyTorchJob is decided by the programs
that users run. There is no kubelet and no scheduler: `kubelet.py` plays them. Every part can be stopped and started.
"""

from __future__ import annotations

import base64
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.cluster.api import Api, Object, has_condition, wait_until
from tests.cluster.audit import AuditLog
from tests.cluster.certificates import Authority, KeyPair, new_key_pem
from tests.processes import Server, StartError, unused_port
from tests.tools.build import CONTROL_PLANE, binaries, binary, module_folder

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
ATTEMPTS = 3
"""Another process may take a port between its choice and the server's start."""
TOKEN_SECONDS = 24 * 3600

OPERATOR_NAMESPACE = "finetune-system"
OPERATOR_ACCOUNT = "finetune-operator"
OPERATOR_USER = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{OPERATOR_ACCOUNT}"
FINETUNE_CRD = ROOT / "crds" / "finetunejobs.yaml"
OPERATOR_INSTALLATION = ROOT / "dist" / "install.yaml"
PLAYED = ("CustomResourceDefinition", "Deployment", "NetworkPolicy")
"""Kinds in it that are here already, or are nothing without a node."""

TRAINING_MODULE = "github.com/kubeflow/training-operator"
TRAINING_NAMESPACE = "kubeflow"
TRAINING_SERVICE = "training-operator"
TRAINING_SECRET = "training-operator-webhook-cert"
PYTORCHJOB_CRD = "manifests/base/crds/kubeflow.org_pytorchjobs.yaml"

CONTROLLERS = (
    "clusterrole-aggregation-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "persistentvolumeclaim-protection-controller",
    # A Job's pod that no node ever took is kept by its finalizer, and its namespace with it, until this one ends it.
    "pod-garbage-collector-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
)
"""What objects in tests depend on. Those that look after nodes would take the pods off a node without a kubelet."""


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ControlPlane:
    """A running control plane; `run_control_plane` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Everything it writes; logs are in `logs`."""
        self.logs = folder / "logs"
        self.audit = AuditLog(self.logs / "audit.jsonl", OPERATOR_NAMESPACE)
        """Requests of service accounts of the operator's namespace."""
        ports = {name: unused_port() for name in ("etcd", "api", "manager", "webhook", "health")}
        self.url = f"https://{HOST}:{ports['api']}"
        self.ca_file = folder / "pki" / "ca.crt"
        self._webhook_url = f"https://{HOST}:{ports['webhook']}"
        self._authority = Authority("training-operator-ca")
        self._write_secrets()
        self.admin_kubeconfig = self.write_kubeconfig("admin", self._tokens["admin"])
        self.api = Api.connect(self.url, self._tokens["admin"], self.ca_file)
        """As an administrator."""
        self.etcd = self._etcd(ports["etcd"])
        self.api_server = self._api_server(ports["api"], ports["etcd"])
        self.controller_manager = self._controller_manager(ports["manager"])
        self.training_operator = self._training_operator(ports["webhook"], ports["health"])

    @property
    def servers(self) -> tuple[Server, ...]:
        """All parts in the order of their start."""
        return self.etcd, self.api_server, self.controller_manager, self.training_operator

    def start(self) -> None:
        """Start every part, with both kinds of jobs and the operator's permissions installed.

        Raises:
            StartError: a part did not start.
        """
        self.etcd.start()
        self.api_server.start()
        # Before the controllers: the garbage collector looks for new kinds only twice a minute.
        self.apply_file(FINETUNE_CRD)
        self.install_pytorchjobs()
        self._wait_established(FINETUNE_CRD)
        self.controller_manager.launch()
        self._install_training_operator()
        self.training_operator.launch()
        self.apply(operator_rights())
        self.controller_manager.wait_ready()
        self.training_operator.wait_ready()

    def stop(self) -> None:
        """Stop every part; logs stay, the data goes."""
        for server in reversed(self.servers):
            server.kill()
        self.api.http.close()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def install_finetunejobs(self) -> None:
        """Our own kind, established."""
        self.apply_file(FINETUNE_CRD)
        self._wait_established(FINETUNE_CRD)

    def install_pytorchjobs(self) -> None:
        """The kind PyTorchJob, established."""
        path = module_folder(TRAINING_MODULE) / PYTORCHJOB_CRD
        self.apply_file(path)
        self._wait_established(path)

    def apply_file(self, path: Path) -> None:
        """Server-side apply of every document of a YAML file."""
        self.apply(_documents(path))

    def apply(self, documents: Iterable[Object]) -> None:
        """Server-side apply of objects that name their namespaces."""
        for document in documents:
            self.api.apply(document)

    def kubectl(
        self, *arguments: str | Path, stdin: str | None = None, kubeconfig: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The real kubectl, as administrator unless told otherwise. Its exit code is for the caller to judge."""
        return subprocess.run(
            [binary("kubectl"), "--kubeconfig", kubeconfig or self.admin_kubeconfig, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            # kubectl keeps what it has learned about a server, by the server's address.
            env={"HOME": str(self.folder / "home"), "PATH": "/usr/bin:/bin"},
        )

    def token(
        self,
        namespace: str,
        account: str,
        *,
        audiences: tuple[str, ...] = (),
        pod: Object | None = None,
        expiration_seconds: int = TOKEN_SECONDS,
    ) -> str:
        """A token of a service account, bound to a pod when one is given, as a kubelet asks for it."""
        spec: Object = {"audiences": list(audiences), "expirationSeconds": expiration_seconds}
        if pod:
            reference = {"name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", **reference}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str(self.api.request("POST", path, json=body)["status"]["token"])

    def kubeconfig(self, namespace: str, account: str, *, server: str | None = None) -> Path:
        """A kubeconfig file of a service account, for this API server or for what stands before it."""
        name = f"{namespace}-{account}" if server is None else f"{namespace}-{account}-{server.rpartition(':')[2]}"
        return self.write_kubeconfig(name, self.token(namespace, account), server=server)

    def write_kubeconfig(self, name: str, token: str, *, server: str | None = None) -> Path:
        """A kubeconfig file of whoever has the token."""
        path = self.folder / "kubeconfigs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        cluster = {
            "server": server or self.url,
            "certificate-authority-data": _base64(self._authority.pair.certificate),
        }
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": name, "context": {"cluster": "test", "user": name}}],
            "current-context": name,
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def issue_certificate(self, *hosts: str) -> KeyPair:
        """A server certificate that every kubeconfig file of this control plane trusts."""
        return self._authority.issue(*hosts)

    def _write_secrets(self) -> None:
        self._authority.pair.write(self.ca_file, self.folder / "pki" / "ca.key")
        serving = self._authority.issue(*self._addresses())
        serving.write(self.folder / "pki" / "api.crt", self.folder / "pki" / "api.key")
        (self.folder / "pki" / "accounts.key").write_bytes(new_key_pem())
        users = self._users()
        self._tokens = {name: secrets.token_hex(20) for name in users}
        lines = [f'{self._tokens[name]},{name},{name},"{group}"\n' for name, group in users.items()]
        (self.folder / "pki" / "tokens.csv").write_text("".join(lines))

    def _users(self) -> dict[str, str]:
        """Who has a token of its own, and in which group that is."""
        return {"admin": "system:masters", "controller-manager": "system:masters"}

    def _addresses(self) -> tuple[str, ...]:
        """By which the API server is called."""
        return HOST, "localhost", "kubernetes.default.svc"

    def _place(self) -> list[str]:
        """Flags of the API server: who finds it. Nobody but clients with a kubeconfig has to."""
        return [
            f"--bind-address={HOST}",
            f"--advertise-address={HOST}",
            "--endpoint-reconciler-type=none",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/16",
        ]

    def _controllers(self) -> tuple[str, ...]:
        return CONTROLLERS

    def _server(self, name: str, health: str, command: Iterable[str | Path], **environment: str) -> Server:
        log = self.logs / f"{name}.log"
        return Server(name, [binary(name), *command], log, ready=lambda: self._healthy(health), environment=environment)

    def _healthy(self, url: str) -> bool:
        try:
            # etcd and the training operator speak plain HTTP; the controller manager's certificate is its own.
            return httpx.get(url, verify=False, timeout=5, trust_env=False).is_success  # noqa: S501
        except httpx.TransportError:
            return False

    def _etcd(self, port: int) -> Server:
        url = f"http://{HOST}:{port}"
        command = [
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls=http://{HOST}:0",
            "--log-level=warn",
            "--unsafe-no-fsync",
        ]
        return self._server("etcd", f"{url}/health", command)

    def _api_server(self, port: int, etcd_port: int) -> Server:
        pki = self.folder / "pki"
        command = [
            f"--etcd-servers=http://{HOST}:{etcd_port}",
            *self._place(),
            f"--secure-port={port}",
            f"--tls-cert-file={pki / 'api.crt'}",
            f"--tls-private-key-file={pki / 'api.key'}",
            f"--token-auth-file={pki / 'tokens.csv'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki / 'accounts.key'}",
            f"--service-account-signing-key-file={pki / 'accounts.key'}",
            "--profiling=false",
            *self.audit.server_flags(self.folder / "audit-policy.yaml"),
        ]
        server = self._server("kube-apiserver", f"{self.url}/readyz", command)
        # Asked to end, it waits for its watchers, who do not go.
        server.patience_seconds = 0.5
        return server

    def _controller_manager(self, port: int) -> Server:
        kubeconfig = self.write_kubeconfig("controller-manager", self._tokens["controller-manager"])
        command = [
            f"--kubeconfig={kubeconfig}",
            f"--bind-address={HOST}",
            f"--secure-port={port}",
            f"--controllers={','.join(self._controllers())}",
            "--leader-elect=false",
            f"--root-ca-file={self.ca_file}",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            "--profiling=false",
        ]
        return self._server("kube-controller-manager", f"https://{HOST}:{port}/healthz", command)

    def _training_operator(self, webhook_port: int, health_port: int) -> Server:
        health = f"{HOST}:{health_port}"
        command = [
            f"--kubeconfig={self.folder / 'kubeconfigs' / f'{TRAINING_NAMESPACE}-{TRAINING_SERVICE}.yaml'}",
            "--enable-scheme=pytorchjob",
            f"--webhook-server-port={webhook_port}",
            "--metrics-bind-address=0",
            f"--health-probe-bind-address={health}",
            "--controller-threads=8",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            "--zap-log-level=info",
        ]
        temporary = self.folder / "training-operator"
        return self._server("training-operator.v1", f"http://{health}/readyz", command, TMPDIR=str(temporary))

    def _install_training_operator(self) -> None:
        """What its manifests install, with its Deployment, Service and mounted Secret replaced by this process."""
        manifests = module_folder(TRAINING_MODULE) / "manifests" / "base"
        self.apply([_named("v1", "Namespace", TRAINING_NAMESPACE)])
        pair = self._authority.issue(f"{TRAINING_SERVICE}.{TRAINING_NAMESPACE}.svc", HOST)
        authority = self._authority.pair
        contents = {"ca.crt": authority.certificate, "ca.key": authority.key, "tls.crt": pair.certificate}
        data = {name: _base64(content) for name, content in {**contents, "tls.key": pair.key}.items()}
        # Its rotator finds certificates that satisfy it and leaves them.
        self.apply([{**_named("v1", "Secret", TRAINING_SECRET, TRAINING_NAMESPACE), "data": data}])
        mounted = self.folder / "training-operator" / "k8s-webhook-server" / "serving-certs"
        pair.write(mounted / "tls.crt", mounted / "tls.key")
        # It serves what is below TMPDIR but waits for a file at this fixed place, without reading it.
        awaited = Path("/tmp/k8s-webhook-server/serving-certs/tls.crt")  # noqa: S108
        awaited.parent.mkdir(parents=True, exist_ok=True)
        awaited.touch()
        for file in sorted((manifests / "rbac").glob("*.yaml")):
            self.apply(_in_namespace(document, TRAINING_NAMESPACE) for document in _documents(file))
        self.kubeconfig(TRAINING_NAMESPACE, TRAINING_SERVICE)
        self.apply([self._webhooks(manifests / "webhook" / "manifests.yaml")])

    def _webhooks(self, file: Path) -> Object:
        (configuration,) = _documents(file)
        configuration["metadata"]["name"] = "validator.training-operator.kubeflow.org"
        for webhook in configuration["webhooks"]:
            webhook["clientConfig"] = {
                "url": self._webhook_url + webhook["clientConfig"]["service"]["path"],
                "caBundle": _base64(self._authority.pair.certificate),
            }
        return configuration

    def _wait_established(self, path: Path) -> None:
        name = _documents(path)[0]["metadata"]["name"]
        found = self.api.wait("CustomResourceDefinition", name, lambda found: has_condition(found, "Established"))
        version = found["spec"]["versions"][0]["name"]
        # Established comes a moment before the server answers for the new kind.
        url = f"/apis/{found['spec']['group']}/{version}/{found['spec']['names']['plural']}"
        wait_until(lambda: self.api.http.get(url).is_success)


@contextmanager
def run_control_plane(folder: Path) -> Iterator[ControlPlane]:
    """Start a control plane below `folder`; it is stopped whatever happens, its logs stay.

    Raises:
        StartError: it did not come up; the text holds the end of a log and its place.
    """
    binaries(CONTROL_PLANE)
    for attempt in range(ATTEMPTS):
        attempt_folder = folder / f"control-plane-{attempt}"
        attempt_folder.mkdir(parents=True)
        plane = ControlPlane(attempt_folder)
        try:
            try:
                plane.start()
            except StartError:
                if attempt + 1 == ATTEMPTS:
                    raise
                continue
            yield plane
            return
        finally:
            plane.stop()


def operator_rights(path: Path = OPERATOR_INSTALLATION) -> list[Object]:
    """What a published installation gives the operator: permissions, service account, Secret and Service."""
    return [document for document in _documents(path) if document["kind"] not in PLAYED]


def _documents(path: Path) -> list[Object]:
    """Documents of a YAML file. The kind PyTorchJob takes a parser in Python a second."""
    return [document for document in yaml.load_all(path.read_text(), _LOADER) if document]


def _named(api_version: str, kind: str, name: str, namespace: str | None = None) -> Object:
    metadata = {"name": name} if namespace is None else {"name": name, "namespace": namespace}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def _in_namespace(document: Object, namespace: str) -> Object:
    """As kustomize's `namespace` does it for these manifests."""
    metadata: Mapping[str, Any] = document["metadata"]
    if not document["kind"].startswith("Cluster"):
        document = {**document, "metadata": {**metadata, "namespace": namespace}}
    if "subjects" in document:
        document["subjects"] = [{**subject, "namespace": namespace} for subject in document["subjects"]]
    return document


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
