"""The admission policy that docs/platform.md shows forbids what it says, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.api import Api, wait_until
from tests.cluster.control_plane import ROOT, ControlPlane
from tests.cluster.scene import manifest
from tests.cluster.test_spec import kubectl_apply

PAGE = (ROOT / "docs" / "platform.md").read_text()
POLICIES = [text for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S) if "AdmissionPolicy" in text]

FORBIDDEN: dict[str, tuple[dict[str, Any], str]] = {
    "code of the model's": ({"trust_remote_code": True}, "trust_remote_code is not allowed here."),
    "any image": ({"workers": {"image": "elsewhere/trainer"}}, "workers.image must come from registry.example.com."),
}


@pytest.fixture
def policy(control_plane: ControlPlane, api: Api) -> Iterator[None]:
    """The page's policy, in force."""
    (text,) = POLICIES
    done = control_plane.kubectl("apply", "-f", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    spec, sentence = next(iter(FORBIDDEN.values()))
    wait_until(lambda: sentence in kubectl_apply(control_plane, api, manifest("probe", **spec), "--dry-run=server"))
    yield
    control_plane.kubectl("delete", "-f", "-", stdin=text)


@pytest.mark.usefixtures("policy")
def test_the_policy_forbids_what_it_says_and_nothing_else(control_plane: ControlPlane, api: Api) -> None:
    for spec, sentence in FORBIDDEN.values():
        assert sentence in kubectl_apply(control_plane, api, manifest("guard", **spec))
    allowed = manifest("guard", workers={"image": "registry.example.com/finetune-trainer:0.1.0"})
    assert "created" in kubectl_apply(control_plane, api, allowed)
