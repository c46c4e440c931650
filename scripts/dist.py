"""Renders dist/ from the Helm chart: what `kubectl apply -f` and kustomize install, for whoever does not use Helm.

The chart's comments stay, since these files are read before they are applied; what only means something to Helm goes.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.tools.build import binary

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "finetune-operator"
DIST = ROOT / "dist"
KUBERNETES = "1.36.0"
"""Version that is rendered for; the output does not depend on it."""

NAMESPACE = "finetune-system"
JOBS_NAMESPACE = "finetune-jobs"

FILES: Mapping[str, tuple[str, Sequence[str]]] = {
    "install.yaml": ("The operator for the FineTuneJobs of all namespaces.", ()),
    "install-one-namespace.yaml": (
        f"The operator for the FineTuneJobs of one namespace, {JOBS_NAMESPACE}. The Helm chart does it for others.",
        ("--set", f"watchNamespaces={{{JOBS_NAMESPACE}}}"),
    ),
}
"""File -> what it says at its top, and the chart's values."""

_NEVER_PRUNED = {
    "argocd.argoproj.io/sync-options": "Prune=false,Delete=false",
    "kustomize.toolkit.fluxcd.io/prune": "disabled",
}
"""Of the custom resource definition and of a namespace for jobs: FineTuneJobs would go with them."""

_FOR_HELM = re.compile(r"^(# Source: .*|\s+helm\.sh/chart: .*|\s+app\.kubernetes\.io/managed-by: Helm)\n", re.MULTILINE)

_NAMESPACE = """---
apiVersion: v1
kind: Namespace
metadata:
  name: {name}
{rest}"""
_OPERATORS_LABELS = """  labels:
    app.kubernetes.io/name: finetune-operator
    pod-security.kubernetes.io/enforce: restricted
"""
_KEPT = "  annotations:\n" + "".join(f"    {key}: {value}\n" for key, value in _NEVER_PRUNED.items())


def render(file: str) -> str:
    """Content of a file of dist/.

    Raises:
        CalledProcessError: the chart cannot be rendered.
    """
    about, values = FILES[file]
    crds = json.dumps({"keep": False, "annotations": _NEVER_PRUNED})
    options = ["--namespace", NAMESPACE, "--kube-version", KUBERNETES, "--set-json", f"crds={crds}", *values]
    command: list[str | Path] = [binary("helm"), "template", "finetune-operator", CHART, *options]
    rendered = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    head = f"# {about}\n# Rendered from helm/finetune-operator by `make dist`.\n"
    namespaces = _NAMESPACE.format(name=NAMESPACE, rest=_OPERATORS_LABELS)
    if values:
        namespaces += _NAMESPACE.format(name=JOBS_NAMESPACE, rest=_KEPT)
    return head + namespaces + _FOR_HELM.sub("", rendered)


def main() -> None:
    """Write every file."""
    for file in FILES:
        (DIST / file).write_text(render(file))


if __name__ == "__main__":
    main()
