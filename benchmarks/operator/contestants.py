"""The two operators that are compared, each a process with the rights of a service account of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.api import Object
from tests.cluster.control_plane import OPERATOR_ACCOUNT, OPERATOR_NAMESPACE, ROOT, ControlPlane
from tests.cluster.operator_process import COMMAND, FAST, WATCHED_COMMAND, OperatorProcess

NAIVE_ACCOUNT = "naive"

SETTINGS: Mapping[str, Any] = {**dict.fromkeys(FAST), "default_output_uri": "s3://models/team-a"}
"""Those that the tests make faster have their defaults here."""

_NAIVE_RULES = (
    # kopf keeps its state in annotations; it looks for new kinds and namespaces by default.
    {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["get", "list", "watch", "patch"]},
    {"apiGroups": ["kubeflow.org"], "resources": ["pytorchjobs"], "verbs": ["create"]},
    {
        "apiGroups": ["apiextensions.k8s.io"],
        "resources": ["customresourcedefinitions"],
        "verbs": ["list", "watch"],
    },
    {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["list", "watch"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
)


@dataclass(frozen=True)
class Contestant:
    """One way to write the operator."""

    name: str
    account: str
    command: Sequence[str]
    writes_status: bool


OURS = Contestant("ours", OPERATOR_ACCOUNT, COMMAND, writes_status=True)
WATCHED = Contestant("ours", OPERATOR_ACCOUNT, WATCHED_COMMAND, writes_status=True)
"""Ours, with a watchdog on its event loop that costs a little time itself."""
NAIVE = Contestant("naive", NAIVE_ACCOUNT, (sys.executable, "-m", "benchmarks.operator.naive"), writes_status=False)


@contextmanager
def running(
    plane: ControlPlane, contestant: Contestant, folder: Path, *, wait: bool = True
) -> Iterator[OperatorProcess]:
    """The contestant, ready (or, unless `wait`, just started); it is stopped in any case."""
    process = OperatorProcess(plane, folder, SETTINGS, account=contestant.account, command=contestant.command)
    # It runs in the folder of its log, where Python would not find the modules of the clone.
    process.server.environment = {**process.server.environment, "PYTHONPATH": str(ROOT)}
    try:
        process.server.launch()
        if wait:
            process.server.wait_ready()
        yield process
    finally:
        process.stop()


def install_naive_account(plane: ControlPlane) -> None:
    """Give the naive operator its rights; ours are installed with the control plane."""
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": NAIVE_ACCOUNT}}
    documents: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": NAIVE_ACCOUNT, "namespace": OPERATOR_NAMESPACE},
        },
        {**role, "kind": "ClusterRole", "rules": list(_NAIVE_RULES)},
        {
            **role,
            "kind": "ClusterRoleBinding",
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NAIVE_ACCOUNT},
            "subjects": [{"kind": "ServiceAccount", "name": NAIVE_ACCOUNT, "namespace": OPERATOR_NAMESPACE}],
        },
    ]
    plane.apply(documents)
