"""The chart as helm renders it, and the tables of values that it is checked with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.tools.build import binary

Object = dict[str, Any]
Values = Mapping[str, Any]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "finetune-operator"
RELEASE = "finetune-operator"
NAMESPACE = "finetune-system"
TEAMS = ("team-a", "team-b")
KUBERNETES = "1.36.0"
"""What helm is told that it renders for: one built from source says v1.20."""

FOREIGN_KINDS = ("PodMonitor", "PrometheusRule", "ServiceMonitor")
"""Kinds of the Prometheus operator, which no API server here knows."""

TABLE: Mapping[str, Values] = {
    "defaults": {},
    "some namespaces": {"watchNamespaces": [*TEAMS]},
    "everything": {
        "imagePullSecrets": [{"name": "pull"}],
        "crds": {"annotations": {"example.com/owner": "platform"}},
        "serviceAccount": {"name": "tuner", "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/tuner"}},
        "image": {"registry": "registry.example.com", "digest": f"sha256:{'0' * 64}", "pullPolicy": "Always"},
        "podDisruptionBudget": {"enabled": True},
        "priorityClassName": "system-cluster-critical",
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "control-plane", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "podAnnotations": {"example.com/note": "x"},
        "podLabels": {"example.com/team": "platform"},
        "extraEnv": [{"name": "PYTHONASYNCIODEBUG", "value": "1"}],
        "commonLabels": {"example.com/part-of": "ml"},
        "service": {"annotations": {"example.com/note": "x"}},
        "trainer": {
            "defaultOutputUri": "s3://models/all",
            "objectStoreSecret": "store",
            "huggingFaceSecret": "hub",
            "defaultResources": {"requests": {"cpu": 4, "memory": "64Gi"}, "limits": {"memory": "64Gi"}},
            "acceleratorNodeSelectors": {"A10G": {"nvidia.com/gpu.product": "NVIDIA-A10G"}},
            "queueName": "tuning",
            "cacheClaim": "models",
            "sharedMemorySize": "8Gi",
            "scratchSize": "100Gi",
        },
        "networkPolicy": {
            "operator": {
                "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
                "apiServerCidrs": ["10.0.0.1/32"],
            },
            "trainer": {
                "enabled": True,
                "namespaces": [*TEAMS],
                "extraEgress": [{"to": [{"namespaceSelector": {}}], "ports": [{"port": 9000}]}],
            },
        },
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True, "annotations": {"grafana_folder": "ml"}},
        },
    },
    "nothing that can be left out": {
        "crds": {"install": False},
        "rbac": {"create": False, "aggregateClusterRoles": False},
        "serviceAccount": {"create": False, "name": "somebody"},
        "progress": {"enabled": False},
        "networkPolicy": {"operator": {"enabled": False}},
        "resources": {},
    },
    "trainers fenced in": {"watchNamespaces": [*TEAMS], "networkPolicy": {"trainer": {"enabled": True}}},
    "only other trainers to reach": {
        "networkPolicy": {"trainer": {"enabled": True, "namespaces": ["team-a"], "egressCidrs": []}},
        "progress": {"enabled": False},
    },
    "air-gapped": {"global": {"imageRegistry": "mirror.example.com:5000/ml"}, "image": {"registry": "docker.io"}},
    "OpenShift": {"trainer": {"podUserId": None}},
    "other names": {"nameOverride": "tuner", "fullnameOverride": "ml-tuner"},
    "paused, and replaced without a pause": {"replicas": 0, "strategy": {"type": "RollingUpdate"}},
}


def helm(*arguments: str | Path, values: Values | None = None, home: Path | None = None) -> str:
    """What helm printed.

    Raises:
        AssertionError: it failed; the text holds what it said.
    """
    done = try_helm(*arguments, values=values, home=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def try_helm(
    *arguments: str | Path, values: Values | None = None, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the real helm with values on top of the chart's. Its exit code is for the caller to judge."""
    given = ["--values", "-"] if values is not None else []
    return subprocess.run(
        [binary("helm"), *arguments, *given],
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        env={"HOME": str(home or "/nonexistent"), "PATH": "/usr/bin:/bin"},
    )


def render(values: Values | None = None, *, release: str = RELEASE, chart: Path = CHART) -> list[Object]:
    """The objects that a release has."""
    options = ["--namespace", NAMESPACE, "--kube-version", KUBERNETES]
    return [
        found for found in yaml.safe_load_all(helm("template", release, chart, *options, values=values or {})) if found
    ]


def only(objects: Iterable[Object], kind: str, name: str | None = None) -> Object:
    """The one object of a kind, and of a name when one is given.

    Raises:
        ValueError: there is none, or more.
    """
    (found,) = (each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"]))
    return found


def pod_of(objects: Iterable[Object]) -> Object:
    """Template of the operator's pod."""
    template: Object = only(objects, "Deployment")["spec"]["template"]
    return template


def environment(objects: Iterable[Object], namespace: str = NAMESPACE) -> dict[str, str]:
    """The operator's variables as a kubelet fills them in."""
    (container,) = pod_of(objects)["spec"]["containers"]
    found: dict[str, str] = {}
    for variable in container["env"]:
        value = variable.get("value")
        if value is None:
            assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
            value = namespace
        for name, known in found.items():
            value = value.replace(f"$({name})", known)
        found[variable["name"]] = value
    return found


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a selector by labels alone selects who has these."""
    assert selector.keys() == {"matchLabels"}
    return bool(selector["matchLabels"].items() <= labels.items())
