"""The images have the versions that the tests ran with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("images/operator/requirements.lock", "images/trainer/requirements.lock", "images/build.lock")
TOOLS = {"uv"}
"""What images are built with and nothing else needs."""


def pins(lock: str) -> dict[tuple[str, str], set[str]]:
    """Name and version of each distribution -> its hashes."""
    text = (ROOT / lock).read_text()
    found = re.findall(r"^([a-z0-9][\w.-]*)==(\S+?)[ ;\\].*?\n((?:    --hash=.*\n)+)", text, re.MULTILINE)
    return {(name, version): set(re.findall(r"sha256:\w+", hashes)) for name, version, hashes in found}


@pytest.mark.parametrize("lock", LOCKS)
def test_an_images_lock_takes_its_versions_from_the_lock_of_the_tests(lock: str) -> None:
    ours, tested = pins(lock), pins("requirements.lock")
    assert ours
    assert {pin: hashes for pin, hashes in ours.items() if pin[0] not in TOOLS and tested.get(pin) != hashes} == {}


@pytest.mark.parametrize(
    ("lock", "wanted", "unwanted"),
    [
        ("images/operator/requirements.lock", {"kopf", "kubernetes", "prometheus-client"}, {"torch", "transformers"}),
        ("images/trainer/requirements.lock", {"torch", "peft", "boto3", "wandb"}, {"kopf", "kubernetes", "pytest"}),
    ],
)
def test_an_image_has_what_its_part_needs_and_not_the_other_ones(
    lock: str, wanted: set[str], unwanted: set[str]
) -> None:
    names = {name for name, _ in pins(lock)}
    assert wanted <= names
    assert not unwanted & names
