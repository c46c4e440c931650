"""The real Kueue as a process beside a test control plane, installed from its own manifests.

Its Deployment, Service and mounted Secret are replaced by the process; it works as administrator. While it is
installed no PyTorchJob or Job of that control plane is created without it, as in a cluster.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.cluster.api import Object
from tests.cluster.certificates import Authority
from tests.cluster.control_plane import HOST, ControlPlane
from tests.integrations.recordings import ROOT
from tests.processes import Server, unused_port
from tests.tools.build import binary, module_folder

NAMESPACE = "kueue-system"
SECRET, SERVICE = "kueue-webhook-server-cert", "kueue-webhook-service"
CONFIGURATION = ROOT / "integrations" / "kueue" / "manager-config.yaml"

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class KueueProcess:
    """One Kueue; `run_kueue` makes one."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self._plane, self._folder = plane, folder
        self._manifests = module_folder("sigs.k8s.io/kueue", "kueue") / "config" / "components"
        # Its rotator leaves certificates alone whose authority has this name.
        self._authority = Authority("kueue-ca")
        self._webhook_port, self._health_port = unused_port(), unused_port()
        self.server = Server(
            "kueue",
            [binary("kueue"), f"--config={self._configuration()}", f"--kubeconfig={plane.admin_kubeconfig}"],
            plane.logs / "kueue.log",
            ready=self._ready,
        )

    def install(self) -> None:
        """Its kinds, its certificates, and its webhooks for them, PyTorchJobs and Jobs; it serves no others."""
        conversions = self._conversions()
        for file in sorted((self._manifests / "crd" / "bases").glob("*.yaml")):
            (kind,) = _documents(file)
            if kind["metadata"]["name"] in conversions:
                conversion = {"clientConfig": self._client("/convert"), "conversionReviewVersions": ["v1"]}
                kind["spec"]["conversion"] = {"strategy": "Webhook", "webhook": conversion}
            self._plane.api.apply(kind)
        self._plane.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        self._write_certificates()
        for configuration in _documents(self._manifests / "webhook" / "manifests.yaml"):
            configuration["metadata"]["name"] = f"kueue-{configuration['metadata']['name']}"
            configuration["webhooks"] = [hook for hook in configuration["webhooks"] if _is_served(hook)]
            for webhook in configuration["webhooks"]:
                webhook["clientConfig"] = self._client(webhook["clientConfig"]["service"]["path"])
            self.apply(configuration)

    def uninstall_webhooks(self) -> None:
        """Nothing is sent to it any more: who comes next has PyTorchJobs and Jobs without Kueue."""
        for kind in ("mutating", "validating"):
            self._plane.kubectl("delete", f"{kind}webhookconfiguration", f"kueue-{kind}-webhook-configuration")

    def apply(self, *documents: Object) -> None:
        """Server-side apply of objects of any kind, by kubectl."""
        text = yaml.safe_dump_all(documents)
        done = self._plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)
        assert done.returncode == 0, done.stderr

    def workload(self, namespace: str, pytorchjob: str) -> Object:
        """What Kueue makes of a PyTorchJob."""
        path = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{namespace}/workloads"
        found: list[Object] = self._plane.api.request("GET", path)["items"]
        (workload,) = (
            item for item in found if pytorchjob in [owner["name"] for owner in item["metadata"]["ownerReferences"]]
        )
        return workload

    def _configuration(self) -> Path:
        """What we publish, with the addresses of this process."""
        settings = {
            "namespace": NAMESPACE,
            "health": {"healthProbeBindAddress": f"{HOST}:{self._health_port}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"host": HOST, "port": self._webhook_port, "certDir": str(self._folder / "certs")},
            "leaderElection": {"leaderElect": False},
            # It would listen on a port of its own.
            "featureGates": {"VisibilityOnDemand": False},
        }
        path = self._folder / "kueue.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(CONFIGURATION.read_text()), **settings}))
        return path

    def _conversions(self) -> set[str]:
        """Names of the kinds whose versions its webhook converts."""
        folder = self._manifests / "crd"
        patches = yaml.safe_load((folder / "kustomization.yaml").read_text())["patches"]
        return {yaml.safe_load((folder / patch["path"]).read_text())["metadata"]["name"] for patch in patches}

    def _write_certificates(self) -> None:
        pair, authority = self._authority.issue(f"{SERVICE}.{NAMESPACE}.svc", HOST), self._authority.pair
        contents = {"ca.crt": authority.certificate, "ca.key": authority.key, "tls.crt": pair.certificate}
        data = {name: _base64(content) for name, content in {**contents, "tls.key": pair.key}.items()}
        metadata = {"name": SECRET, "namespace": NAMESPACE}
        self._plane.api.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})
        pair.write(self._folder / "certs" / "tls.crt", self._folder / "certs" / "tls.key")

    def _client(self, path: str) -> Object:
        url = f"https://{HOST}:{self._webhook_port}{path}"
        return {"url": url, "caBundle": _base64(self._authority.pair.certificate)}

    def _ready(self) -> bool:
        try:
            return httpx.get(f"http://{HOST}:{self._health_port}/readyz", timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False


@contextmanager
def run_kueue(plane: ControlPlane, folder: Path) -> Iterator[KueueProcess]:
    """Install and start Kueue; it is stopped whatever happens, and leaves PyTorchJobs alone.

    Raises:
        StartError: it did not come up; the text holds the end of its log.
    """
    kueue = KueueProcess(plane, folder)
    try:
        kueue.install()
        kueue.server.start()
        yield kueue
    finally:
        kueue.uninstall_webhooks()
        kueue.server.kill()


def _is_served(webhook: Object) -> bool:
    (rule,) = webhook["rules"]
    return bool(rule["apiGroups"] == ["kueue.x-k8s.io"] or rule["resources"] in (["pytorchjobs"], ["jobs"]))


def _documents(path: Path) -> list[Object]:
    return [document for document in yaml.load_all(path.read_text(), _LOADER) if document]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
