"""The images as they were built: what they run as, what is in them, how large they are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.node.containers import OPERATOR, TRAINER, Images
from tests.tools.build import binary

OURS = (OPERATOR, TRAINER)


def configuration(images: Images, name: str) -> dict[str, Any]:
    """What a container of the image is started with."""
    found: dict[str, Any] = json.loads(images.buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
    return found


@pytest.mark.parametrize(("name", "user", "module"), [(OPERATOR, 65532, "operator"), (TRAINER, 1000, "trainer")])
def test_an_image_says_what_it_is_and_runs_a_program_as_nobody(
    images: Images, name: str, user: int, module: str
) -> None:
    found = configuration(images, name)
    assert found["User"] == f"{user}:{user}"
    assert found["Entrypoint"] == ["python", "-m", f"finetune_{module}"]
    assert "Cmd" not in found
    labels = {key.removeprefix("org.opencontainers.image."): text for key, text in found["Labels"].items()}
    assert labels["title"] == f"finetune-{module}"
    assert labels["version"] == "0.1.0"
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", labels["revision"])
    assert {"description", "licenses"} <= set(labels)


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        (OPERATOR, ["opt/project/finetune_operator"], ["usr/bin/gcc"]),
        (TRAINER, ["opt/project/finetune_trainer", "usr/bin/gcc"], []),
    ],
)
def test_an_image_has_what_its_program_needs(images: Images, name: str, present: list[str], absent: list[str]) -> None:
    with images.mounted(name) as folder:
        assert [path for path in present if not (folder / path).exists()] == []
        assert [path for path in absent if (folder / path).exists()] == []
        torch = list((folder / "opt" / "finetune" / "lib").glob("python3*/site-packages/torch"))
    assert bool(torch) == (name == TRAINER)


@pytest.mark.parametrize("name", OURS)
def test_a_bill_of_materials_names_debian_and_python_packages(images: Images, name: str, tmp_path: Path) -> None:
    target = tmp_path / "sbom.cdx.json"
    with images.mounted(name) as folder:
        command = [binary("syft"), "scan", f"dir:{folder}", "--quiet", "--output", f"cyclonedx-json={target}"]
        environment = {"HOME": str(tmp_path), "SYFT_CHECK_FOR_APP_UPDATE": "false", "PATH": "/usr/bin:/bin"}
        subprocess.run(list(map(str, command)), check=True, env=environment)
    bill = json.loads(target.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    found = {component.get("purl", "").partition("@")[0] for component in bill["components"]}
    wanted = {"pkg:deb/debian/python3", "pkg:pypi/pydantic", "pkg:pypi/finetune-operator"}
    assert wanted | ({"pkg:pypi/torch", "pkg:deb/debian/gcc"} if name == TRAINER else set()) <= found


def test_sizes_are_told(images: Images, capsys: pytest.CaptureFixture[str]) -> None:
    """Largest first: what a node has to pull, unpacked."""
    listed = json.loads(images.buildah("images", "--json", "--filter", "reference=localhost/finetune-*"))
    with capsys.disabled():
        for image in listed:
            print(f"\n{image['names'][0]}: {image['size']}", end="")
    assert {OPERATOR, TRAINER} <= {name for image in listed for name in image["names"]}
