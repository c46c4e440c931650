"""dist/ is what the chart renders, `kubectl` installs it, and a kustomization may move it to another namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import dist
from tests.chart.charts import NAMESPACE, environment, only
from tests.cluster.control_plane import ControlPlane


def documents(file: str) -> list[dict[str, object]]:
    return list(yaml.safe_load_all((dist.DIST / file).read_text()))


@pytest.mark.parametrize("file", dist.FILES)
def test_it_is_up_to_date(file: str) -> None:
    assert (dist.DIST / file).read_text() == dist.render(file), "run `make dist`"


@pytest.mark.parametrize("file", dist.FILES)
def test_nothing_in_it_is_for_helm_alone(file: str) -> None:
    lines = (dist.DIST / file).read_text().splitlines()
    assert [line for line in lines if "helm" in line.lower() and not line.startswith("#")] == []


@pytest.mark.parametrize("file", dist.FILES)
def test_the_api_server_would_take_it_with_the_namespaces_that_it_brings(file: str, bare_plane: ControlPlane) -> None:
    brought = [found["metadata"]["name"] for found in documents(file) if found["kind"] == "Namespace"]  # type: ignore[index]
    new = [name for name in brought if bare_plane.api.find("Namespace", name) is None]
    for name in new:  # A dry run makes none.
        bare_plane.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    for options in (["--server-side", "--force-conflicts", "--validate=strict"], []):
        done = bare_plane.kubectl("apply", "--dry-run=server", *options, "--filename", dist.DIST / file)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == len(documents(file))
    for name in new:
        bare_plane.api.delete("Namespace", name)


@pytest.mark.parametrize("file", dist.FILES)
def test_gitops_never_prunes_what_jobs_would_go_with(file: str) -> None:
    never = {
        "argocd.argoproj.io/sync-options": "Prune=false,Delete=false",
        "kustomize.toolkit.fluxcd.io/prune": "disabled",
    }
    kept: dict[tuple[object, str], object] = {}
    for found in documents(file):
        metadata: Any = found["metadata"]
        if "annotations" in metadata:
            kept[found["kind"], metadata["name"]] = metadata["annotations"]
    wanted = [("CustomResourceDefinition", "finetunejobs.finetune.dev")]
    if file == "install-one-namespace.yaml":
        wanted.append(("Namespace", dist.JOBS_NAMESPACE))
    assert kept == dict.fromkeys(wanted, never)


@pytest.mark.parametrize("file", dist.FILES)
def test_without_helm_the_documented_commands_leave_nothing_but_jobs(file: str) -> None:
    page = (dist.ROOT / "docs" / "platform.md").read_text()
    assert f"kubectl delete namespace {NAMESPACE}\n" in page
    by_label = {
        (kind, label)
        for kinds, label in re.findall(r"kubectl delete (\S*role\S+)(?: -A)? -l (\S+)", page)
        for kind in kinds.split(",")
    }
    left = []
    for found in documents(file):
        metadata: Any = found["metadata"]
        labels = {f"{key}={value}" for key, value in metadata.get("labels", {}).items()}
        gone = NAMESPACE in (metadata.get("namespace"), metadata["name"])
        if not gone and not any((str(found["kind"]).lower(), label) in by_label for label in labels):
            left.append(metadata["name"])
    brought = [dist.JOBS_NAMESPACE] if file == "install-one-namespace.yaml" else []
    assert left == [*brought, "finetunejobs.finetune.dev"]


def test_the_documented_overlay_says_where_both_images_are(bare_plane: ControlPlane, tmp_path: Path) -> None:
    page = (dist.ROOT / "docs" / "platform.md").read_text()
    (text,) = (block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "kind: Kustomization" in block)
    (tmp_path / "dist").symlink_to(dist.DIST)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    changes = yaml.safe_load(text)
    changes["resources"] = ["../dist"]
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(changes))
    done = bare_plane.kubectl("kustomize", overlay)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    (deployment,) = (found for found in built if found["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example.com/team/finetune-operator:0.1.0"
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["FINETUNE_OPERATOR_TRAINER_IMAGE"] == "registry.example.com/team/finetune-trainer:0.1.0"
    assert len(variables) > 5


def test_a_kustomization_may_change_the_namespace(bare_plane: ControlPlane, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(dist.DIST)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    changes = {
        "namespace": "tuning",
        "resources": ["../base"],
        "images": [{"name": "finetune-operator", "newName": "mirror.example.com/finetune-operator"}],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(changes))
    done = bare_plane.kubectl("kustomize", overlay)
    assert done.returncode == 0, done.stderr
    assert NAMESPACE not in done.stdout
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(documents("install.yaml"))
    variables = environment(built, namespace="tuning")
    assert variables["FINETUNE_OPERATOR_PROGRESS_URL"] == "https://finetune-operator.tuning.svc:8443"
    (container,) = only(built, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "mirror.example.com/finetune-operator:0.1.0"
