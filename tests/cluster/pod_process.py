"""Runs the container of a pod as a process of this machine: what the operator put into the pod is what it gets.

A pod's variables, files, token and certificate come from the API server as a kubelet would take them. Paths of the
container become folders of the test, and the name of worker 0, which only a cluster's DNS knows, becomes loopback.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.api import Api, ApiError, Object
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet

LABEL_FIELD = re.compile(r"metadata\.labels\['(.+)'\]")
END_SECONDS = 240


class PodProcess:
    """The trainer of one pod."""

    def __init__(
        self, plane: ControlPlane, api: Api, kubelet: Kubelet, pod: Object, folder: Path, **environ: str
    ) -> None:
        """Start it.

        Args:
            plane: issues the pod's token.
            api: the API server, in the pod's namespace.
            kubelet: writes the pod's status.
            pod: the pod.
            folder: takes the container's files.
            environ: variables that only a cluster could resolve.
        """
        self._plane, self._api, self._kubelet, self.pod = plane, api, kubelet, pod
        self._folder = folder
        folder.mkdir(parents=True)
        (self._container,) = pod["spec"]["containers"]
        self._mounts = self._mount()
        self._message = folder / "termination-log"
        self.log = folder / "log"
        command = [self._local(part) for part in self._container["command"]]
        assert command[0] == "python"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command[1:]],
                env={"PATH": os.environ["PATH"], **self._environment(), "OMP_NUM_THREADS": "1", **environ},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        kubelet.run(pod)

    def end(self) -> int:
        """Wait for the end and tell the API server as a kubelet does; the exit code."""
        code = self.process.wait(END_SECONDS)
        code = code if code >= 0 else 128 - code
        message = self._message.read_text() if self._message.exists() else ""
        if code == 0:
            self._kubelet.succeed(self.pod, message)
        else:
            self._kubelet.fail(self.pod, code, message)
        return code

    def stop(self) -> int:
        """SIGTERM, as when the pod is deleted, and its end."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        """Make sure that it is gone."""
        self.process.kill()
        self.process.wait()

    def _mount(self) -> Mapping[str, Path]:
        """Path in the container -> folder of the test with what is mounted there."""
        volumes = {volume["name"]: volume for volume in self._pod_volumes()}
        found = {}
        for mount in self._container["volumeMounts"]:
            folder = self._folder / mount["name"]
            folder.mkdir(exist_ok=True)
            self._fill(folder, volumes[mount["name"]])
            found[mount["mountPath"]] = folder
        return found

    def _pod_volumes(self) -> list[Object]:
        volumes: list[Object] = self.pod["spec"]["volumes"]
        return volumes

    def _fill(self, folder: Path, volume: Object) -> None:
        for source in volume.get("projected", {}).get("sources", [volume]):
            if "configMap" in source:
                reference = source["configMap"]
                data = self._api.get("ConfigMap", reference["name"])["data"]
                for item in reference["items"]:
                    (folder / item["path"]).write_text(data[item["key"]])
            elif "serviceAccountToken" in source:
                wanted = source["serviceAccountToken"]
                account = self.pod["spec"]["serviceAccountName"]
                namespace = self.pod["metadata"]["namespace"]
                token = self._plane.token(namespace, account, audiences=(wanted["audience"],), pod=self.pod)
                (folder / wanted["path"]).write_text(token)

    def _environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for variable in self._container["env"]:
            value = variable.get("value", "") if "valueFrom" not in variable else self._resolve(variable["valueFrom"])
            if value is not None:
                found[variable["name"]] = self._local(value)
        return found

    def _resolve(self, source: Mapping[str, Any]) -> str | None:
        if "fieldRef" in source:
            match = LABEL_FIELD.fullmatch(source["fieldRef"]["fieldPath"])
            assert match is not None, source
            return str(self.pod["metadata"]["labels"][match[1]])
        reference = source["secretKeyRef"]
        try:
            return base64.b64decode(self._api.get("Secret", reference["name"])["data"][reference["key"]]).decode()
        except (ApiError, KeyError):
            assert reference.get("optional"), reference
            return None

    def _local(self, text: str) -> str:
        """A path of the container as one of this machine."""
        if text == self._container["terminationMessagePath"]:
            return str(self._folder / "termination-log")
        for path in sorted(self._mounts, key=len, reverse=True):
            if text == path or text.startswith(f"{path}/"):
                return str(self._mounts[path]) + text[len(path) :]
        return text
