"""A release of the chart in a control plane, as helm installs, upgrades and removes it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.settings import PREFIX
from tests.chart.charts import CHART, NAMESPACE, RELEASE, TEAMS, Object, Values, environment, helm
from tests.cluster.api import wait_until
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator_process import OperatorProcess

CRD = "finetunejobs.finetune.dev"
GARBAGE_SECONDS = 90
"""The garbage collector looks for new kinds twice a minute."""

QUICK: Values = {
    "settings": {"resyncSeconds": 5, "statusIntervalSeconds": 0.5, "retryBaseSeconds": 0.2, "groupEndSeconds": 2},
    "trainer": {"defaultOutputUri": "s3://models"},
}
"""Values with which no test waits for what would take minutes in a cluster."""

_NOT_OURS = ("events", "leases", "endpoints", "endpointslices", "controllerrevisions", "componentstatuses")
"""Kinds that come and go by themselves, or are not stored."""


class Release:
    """A release in the operator's usual namespace; by default the one that the published names are of."""

    def __init__(self, plane: ControlPlane, folder: Path, *, name: str = RELEASE) -> None:
        self.plane = plane
        self.folder = folder
        self.operators: list[OperatorProcess] = []
        """Those that `operator` has made."""
        self._name = name

    def install(self, values: Values = QUICK, *options: str) -> str:
        """`helm install`; returns its notes."""
        return self._helm("install", self._name, CHART, *options, values=values)

    def upgrade(self, chart: Path, values: Values = QUICK) -> None:
        """`helm upgrade` to another chart."""
        self._helm("upgrade", self._name, chart, values=values)

    def uninstall(self) -> str:
        """`helm uninstall`; returns what it says."""
        return self._helm("uninstall", self._name)

    def objects(self) -> list[Object]:
        """What the release consists of, as helm has stored it."""
        return [found for found in yaml.safe_load_all(self._helm("get", "manifest", self._name)) if found]

    def operator(self) -> OperatorProcess:
        """An operator with the variables and the rights that the release gives it, running."""
        variables = {name: value for name, value in environment(self.objects()).items() if name.startswith(PREFIX)}
        settings = {name.removeprefix(PREFIX).lower(): value for name, value in variables.items()}
        # FAST is for operators without a chart.
        unset = dict.fromkeys(("default_output_uri", "trainer_image", "resync_seconds"))
        folder = self.folder / f"operator-{len(self.operators)}"
        process = OperatorProcess(self.plane, folder, {**unset, **settings})
        self.operators.append(process)
        process.start()
        return process

    def labelled(self) -> set[str]:
        """Kind, namespace and name of what has the release's labels, in any namespace."""
        return self._list(f"--selector=app.kubernetes.io/instance={self._name}")

    def everything(self) -> set[str]:
        """Kind, namespace and name of all that the API server holds."""
        return self._list()

    def _list(self, *options: str) -> set[str]:
        def look() -> subprocess.CompletedProcess[str]:
            kinds = self.plane.kubectl("api-resources", "--verbs=list", "--output=name").stdout.split()
            wanted = [kind for kind in kinds if kind.partition(".")[0] not in _NOT_OURS]
            return self.plane.kubectl("get", ",".join(wanted), "--all-namespaces", "--output=json", *options)

        # A kind that is being removed may be gone when its objects are asked for.
        done = wait_until(look, lambda done: done.returncode == 0)
        return {_identity(found) for found in json.loads(done.stdout)["items"]}

    def clear(self) -> None:
        """Stop the operators and remove what is left."""
        for process in self.operators:
            process.stop()
        self._helm("uninstall", self._name, "--ignore-not-found")
        api = self.plane.api
        api.delete("CustomResourceDefinition", CRD)
        api.wait_gone("CustomResourceDefinition", CRD)
        for team in TEAMS:
            for job in api.list("PyTorchJob", team):
                api.delete("PyTorchJob", job["metadata"]["name"], team)
            for labelled in api.list("ConfigMap", team, labels="app.kubernetes.io/managed-by=finetune-operator"):
                api.delete("ConfigMap", labelled["metadata"]["name"], team)
            wait_until(lambda team=team: api.list("Pod", team), lambda pods: not pods, GARBAGE_SECONDS)  # type: ignore[misc]
        self.plane.install_finetunejobs()

    def _helm(self, command: str, *arguments: str | Path, values: Values | None = None) -> str:
        options: list[str | Path] = ["--kubeconfig", self.plane.admin_kubeconfig, "--namespace", NAMESPACE]
        return helm(command, *arguments, *options, values=values, home=self.folder)


def next_version(folder: Path, version: str) -> Path:
    """The chart of a later version, whose custom resource definition has one key more."""
    chart = folder / f"chart-{version}"
    shutil.copytree(CHART, chart)
    metadata = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump({**metadata, "version": version, "appVersion": version}))
    file = chart / "files" / "finetunejobs.yaml"
    definition = yaml.safe_load(file.read_text())
    spec_of(definition)["newKey"] = {"type": "string", "description": "newKey came with the new version."}
    file.write_text(yaml.safe_dump(definition))
    return chart


def spec_of(definition: Object) -> dict[str, Any]:
    """The keys below `spec` that a custom resource definition has."""
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    keys: dict[str, Any] = schema["properties"]["spec"]["properties"]
    return keys


def _identity(found: Object) -> str:
    metadata = found["metadata"]
    return f"{found['kind']} {metadata.get('namespace', '')}/{metadata['name']}"
