"""A whole Kubernetes of one node: the control plane of the other tests, and what runs real pods.

kubelet, containerd, scheduler, CoreDNS and kube-proxy are the programs that clusters run, built from tests/tools. The
kubelet and the proxy have the rights of a node's and no more. Nothing is pulled from anywhere: images are imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from tests.cluster.api import has_condition
from tests.cluster.control_plane import HOST, ControlPlane
from tests.node import network
from tests.node.containers import PAUSE, Images
from tests.node.network import NODE_ADDRESS
from tests.processes import Server, StartError, unused_port
from tests.tools.build import binary

NODE = "node1"
DNS_PORT = 53
SOCKET = "containerd.sock"
CGROUPS = Path("/sys/fs/cgroup")


class Cluster(ControlPlane):
    """A running cluster; `run_cluster` makes one. It has PyTorchJobs' kind and nothing else that is not Kubernetes'."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.socket = folder / "containerd" / SOCKET
        network.write_network_configuration(folder / "cni")
        self.containerd = self._containerd()
        self.scheduler = self._scheduler()
        self.kubelet = self._kubelet()
        self.dns = self._dns()
        self.proxy = self._proxy()

    @property
    def servers(self) -> tuple[Server, ...]:
        """All parts in the order of their start."""
        control = (self.etcd, self.api_server, self.controller_manager, self.scheduler)
        return (*control, self.containerd, self.dns, self.proxy, self.kubelet)

    def start(self) -> None:
        """Start every part and wait until the node takes pods.

        Raises:
            StartError: a part did not start.
        """
        network.create_bridge()
        for server in (self.etcd, self.api_server, self.containerd):
            server.start()
        for server in self.servers:
            server.start()
        self.api.wait("Node", NODE, lambda node: has_condition(node, "Ready"), 120)

    def stop(self) -> None:
        """Stop every part with all containers; logs stay, everything else goes."""
        self.kubelet.stop()
        _end_containers(self.folder)
        super().stop()
        _remove_traces(self.folder)
        for name in ("containerd", "kubelet"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def load(self, images: Images, names: Iterable[str]) -> None:
        """Import images, as a registry's mirror would give them."""
        for name in names:
            with images.archive(name) as archive:
                self.ctr("images", "import", "--local", archive)

    def ctr(self, *arguments: str | Path) -> str:
        """Output of containerd's own client, in Kubernetes' namespace."""
        return network.run(binary("ctr"), "--address", self.socket, "--namespace", "k8s.io", *arguments)

    def kill(self, namespace: str, pod: str) -> None:
        """End the first process of a pod's container as a fault does: without a word to Kubernetes."""
        (status,) = self.api.get("Pod", pod, namespace)["status"]["containerStatuses"]
        self.ctr("tasks", "kill", "--signal", "SIGKILL", status["containerID"].removeprefix("containerd://"))

    def _users(self) -> dict[str, str]:
        masters = {"coredns": "system:masters", "system:kube-scheduler": "", "system:kube-proxy": ""}
        return {**super()._users(), **masters, f"system:node:{NODE}": "system:nodes"}

    def _addresses(self) -> tuple[str, ...]:
        return (*super()._addresses(), "kubernetes", "kubernetes.default", NODE_ADDRESS, network.FIRST_SERVICE)

    def _place(self) -> list[str]:
        return [
            "--bind-address=0.0.0.0",
            f"--advertise-address={NODE_ADDRESS}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--service-cluster-ip-range={network.SERVICE_NETWORK}",
            # Otherwise `kubectl logs` looks the node's name up in DNS.
            "--kubelet-preferred-address-types=InternalIP",
        ]

    def _controllers(self) -> tuple[str, ...]:
        return ("*",)

    def _config(self, user: str) -> Path:
        return self.write_kubeconfig(user.replace(":", "-"), self._tokens[user])

    def _containerd(self) -> Server:
        state = self.folder / "containerd"
        runtime = {
            # The kernel lets only the mighty lower what others have.
            "restrict_oom_score_adj": True,
            # Where they are taken away with the rest.
            "netns_mounts_under_state_dir": True,
            "cni": {"bin_dirs": [str(network.PLUGINS)], "conf_dir": str(self.folder / "cni")},
            "containerd": {"runtimes": {"runc": {"runtime_type": "io.containerd.runc.v2"}}},
        }
        plugins = {
            "io.containerd.cri.v1.images": {"pinned_images": {"sandbox": PAUSE}},
            "io.containerd.cri.v1.runtime": runtime,
            # Its socket has a fixed place, which another containerd's may be at.
            "io.containerd.nri.v1.nri": {"disable": True},
        }
        settings = {
            "version": 3,
            "root": str(state / "root"),
            "state": str(state / "state"),
            "grpc": {"address": str(self.socket)},
            "ttrpc": {"address": f"{self.socket}.ttrpc"},
            "plugins": plugins,
        }
        file = self.folder / "containerd.toml"
        file.write_text(_toml(settings))
        # Its shim is looked for on PATH.
        path = f"{binary('containerd-shim-runc-v2').parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        command: list[str | Path] = [binary("containerd"), "--config", file]
        log = self.logs / "containerd.log"
        return Server("containerd", command, log, ready=self._containerd_answers, environment={"PATH": path})

    def _containerd_answers(self) -> bool:
        command = [binary("ctr"), "--address", self.socket, "version"]
        return subprocess.run(list(map(str, command)), capture_output=True).returncode == 0

    def _scheduler(self) -> Server:
        port = unused_port()
        config = self._config("system:kube-scheduler")
        flags = [f"--kubeconfig={config}", "--leader-elect=false", f"--bind-address={HOST}", f"--secure-port={port}"]
        return self._server("kube-scheduler", f"https://{HOST}:{port}/healthz", flags)

    def _kubelet(self) -> Server:
        port, health = unused_port(), unused_port()
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            # Nobody else may ask it to run commands in pods.
            "address": NODE_ADDRESS,
            "port": port,
            "healthzPort": health,
            "readOnlyPort": 0,
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            # Who may ask the kubelet for logs and commands is no part of what is tested.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "clusterDNS": [NODE_ADDRESS],
            "clusterDomain": "cluster.local",
            "failSwapOn": False,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            # Images are there to stay: they cannot be pulled again.
            "imageGCHighThresholdPercent": 100,
            "oomScoreAdj": 0,
            "enforceNodeAllocatable": [],
            "syncFrequency": "10s",
            "volumeStatsAggPeriod": "10s",
            "podLogsDir": str(self.logs / "pods"),
        }
        file = self.folder / "kubelet.yaml"
        file.write_text(yaml.safe_dump(settings))
        flags = [
            f"--config={file}",
            f"--kubeconfig={self._config(f'system:node:{NODE}')}",
            f"--root-dir={self.folder / 'kubelet'}",
            f"--cert-dir={self.folder / 'kubelet-pki'}",
            f"--hostname-override={NODE}",
            f"--node-ip={NODE_ADDRESS}",
        ]
        return self._server("kubelet", f"http://{HOST}:{health}/healthz", flags)

    def _dns(self) -> Server:
        health = unused_port()
        file = self.folder / "Corefile"
        file.write_text(
            f".:{DNS_PORT} {{\n"
            f"  bind {NODE_ADDRESS}\n"
            f"  health {HOST}:{health}\n"
            f"  kubernetes cluster.local in-addr.arpa {{\n    kubeconfig {self._config('coredns')}\n  }}\n"
            "  cache 5\n"
            "}\n"
        )
        return self._server("coredns", f"http://{HOST}:{health}/health", ["-conf", file])

    def _proxy(self) -> Server:
        health, metrics = unused_port(), unused_port()
        flags = [
            f"--kubeconfig={self._config('system:kube-proxy')}",
            f"--hostname-override={NODE}",
            "--proxy-mode=iptables",
            f"--cluster-cidr={network.POD_NETWORK}",
            "--conntrack-max-per-core=0",
            f"--healthz-bind-address={HOST}:{health}",
            f"--metrics-bind-address={HOST}:{metrics}",
        ]
        return self._server("kube-proxy", f"http://{HOST}:{health}/livez", flags)


@contextmanager
def run_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in `folder`, which is emptied first; it is stopped whatever happens, its logs stay.

    Raises:
        StartError: it did not come up; the text holds the end of a log and its place. Or the machine is a node already,
            or has our networks in use.
    """
    clear_the_way(folder)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def clear_the_way(folder: Path) -> None:
    """Take away what a run left that was killed, and empty its folder.

    Raises:
        StartError: the machine is a node already, or uses our networks. Nothing was touched.
    """
    if network.has_bridge():
        _end_containers(folder)
        _remove_traces(folder)
    elif any(process.info["name"] == "kubelet" for process in psutil.process_iter(["name"])):
        raise StartError("A kubelet runs here, so this machine is a node already: run this on one that is not.")
    elif taken := network.routes_to_ours():
        raise StartError(f"This machine has routes to {', '.join(taken)}, which pods and services would need here.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _end_containers(folder: Path) -> None:
    """End what containerd leaves running when it ends, as it is meant to: containers, and a shim above each pod's."""
    found = psutil.process_iter(["cmdline"])
    shims = [process for process in found if str(folder / "containerd" / SOCKET) in (process.info["cmdline"] or [])]
    for process in [child for shim in shims for child in _children(shim)] + shims:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _remove_traces(folder: Path) -> None:
    """Mounts, rules, the bridge, control groups, and the kubelet's links to logs."""
    network.unmount_below(folder)
    network.remove_rules()
    network.remove_bridge()
    for group in (*CGROUPS.glob("kubepods"), *CGROUPS.glob("*/kubepods")):
        for path in sorted((found for found in group.rglob("*") if found.is_dir()), reverse=True):
            with suppress(OSError):
                path.rmdir()
        with suppress(OSError):
            group.rmdir()
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and str(folder) in str(link.readlink()):
            link.unlink()


def _toml(settings: dict[str, Any], path: tuple[str, ...] = ()) -> str:
    """Nested tables as TOML; values are what JSON writes the same way."""
    lines = [f"[{'.'.join(json.dumps(part) for part in path)}]"] if path else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    tables = [_toml(value, (*path, key)) for key, value in settings.items() if isinstance(value, dict)]
    return "\n".join([*lines, *tables]) + "\n"
