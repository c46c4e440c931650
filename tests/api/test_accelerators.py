"""worker_resources: the accelerator's name is understood, everything else in it is named as without effect."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.accelerators import accelerator_type
from finetune_api.load import load_manifest
from tests.api.jobs import manifest


@pytest.mark.parametrize(
    ("worker_resources", "name"),
    [
        (None, None),
        ({}, None),
        ({"accelerator_type:A10G": 0.001}, "A10G"),
        ({"anyscale/accelerator_shape:4xA10G": 0.001}, "A10G"),
        ({"anyscale/accelerator_shape:8xA100-80G": 0.001}, "A100-80G"),
        ({"anyscale/accelerator_shape:H100": 1}, "H100"),
        ({"memory": 53687091200, "accelerator_type:L4": 0.01}, "L4"),
        ({"memory": 53687091200}, None),
        ({"accelerator_type": "A10G"}, None),
        ({"accelerator_type:": 0.001}, None),
    ],
)
def test_an_accelerator_is_read_from_its_key(worker_resources: dict[str, Any] | None, name: str | None) -> None:
    assert accelerator_type(worker_resources) == name


def test_an_accelerator_is_accepted_with_a_word_about_where_it_acts() -> None:
    (warning,) = load_manifest(manifest(worker_resources={"accelerator_type:A10G": 0.001})).warnings
    assert warning.path == "spec.worker_resources"
    assert "A10G" in warning.message
    assert "only in a cluster whose operator has a node selector for it" in warning.message
    assert "workers.nodeSelector" in warning.message


@pytest.mark.parametrize("key", ["memory", "CPU", "accelerator_type"])
def test_another_key_is_named_as_without_effect(key: str) -> None:
    (warning,) = load_manifest(manifest(worker_resources={key: 1})).warnings
    assert warning.path == f"spec.worker_resources.{key}"
    assert warning.message.startswith(f"{key} has no effect here: ")


def test_one_accelerator_written_in_both_ways_is_one() -> None:
    both = {"accelerator_type:A10G": 0.001, "anyscale/accelerator_shape:4xA10G": 0.001}
    result = load_manifest(manifest(worker_resources=both))
    assert (result.errors, len(result.warnings)) == ([], 1)


def test_two_accelerators_are_refused_since_no_machine_has_both() -> None:
    both = {"accelerator_type:A10G": 0.001, "accelerator_type:H100": 0.001}
    (problem,) = load_manifest(manifest(worker_resources=both)).errors
    assert problem.path == "spec.worker_resources"
    assert "A10G and H100: keep one of them" in problem.message
