"""The ConfigMap of an attempt, and what later attempts take from the first one's."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.load import load_job
from finetune_operator.desired import effective_job, immutable_spec, placement
from finetune_operator.desired.continuation import continued
from finetune_operator.desired.fingerprint import FINGERPRINT_ANNOTATION, fingerprint, is_edited
from tests.operator.desired.built import SETTINGS, config_map, pytorch, stored


def test_the_effective_job_reads_back_as_what_is_trained() -> None:
    job = stored(num_devices=4, no_gradient_checkpoint=True)
    made = config_map(job)
    result = load_job(made["data"]["job.yaml"], source="job.yaml")
    assert result.errors == []
    assert result.job == effective_job(job, SETTINGS)
    assert result.job is not None
    assert result.job.spec.output is not None
    assert result.job.spec.workers.image == SETTINGS.trainer_image
    assert made["immutable"] is True


def test_filling_in_twice_changes_nothing() -> None:
    once = effective_job(stored(num_devices=16), SETTINGS)
    assert effective_job(once, SETTINGS) == once


@pytest.mark.parametrize(
    ("change", "other_training", "other_place"),
    [
        ({}, False, False),
        ({"learning_rate": 1e-5}, True, False),
        ({"initial_base_model_ckpt_path": {"repo_id": "acme/other"}}, True, False),
        ({"output": {"uri": "s3://models/other"}}, True, False),
        ({"workers": {"image": "trainer:2"}}, False, True),
        ({"secrets": {"huggingFace": {"name": "hf"}}}, False, True),
        ({"suspend": True, "backoffLimit": 7, "activeDeadlineSeconds": 60}, False, False),
    ],
)
def test_changes_are_told_by_what_they_concern(change: dict[str, Any], other_training: bool, other_place: bool) -> None:
    assert (immutable_spec(stored()) != immutable_spec(stored(**change))) is other_training
    assert (placement(stored()) != placement(stored(**change))) is other_place


def test_new_defaults_of_the_operator_are_no_change_of_the_jobs() -> None:
    newer = SETTINGS.model_copy(update={"trainer_image": "trainer:next", "default_output_uri": "s3://elsewhere/x"})
    for key in ("spec.json", "placement.json"):
        assert config_map(stored())["data"][key] == config_map(stored(), newer)["data"][key]


def test_a_later_attempt_trains_what_the_first_one_did_where_the_spec_says_now() -> None:
    first = config_map(stored())
    newer = SETTINGS.model_copy(update={"default_output_uri": "s3://elsewhere/x"})
    job = continued(stored(workers={"image": "trainer:2"}, backoffLimit=9), first)
    made = load_job(config_map(job, newer, attempt=2)["data"]["job.yaml"], source="job.yaml").job
    assert made is not None
    assert made.spec.output is not None
    assert made.spec.output.uri == SETTINGS.default_output_uri
    assert made.spec.workers.image == "trainer:2"
    assert made.spec.backoff_limit == 9


@pytest.mark.parametrize("config", [None, {}, {"data": None}, {"data": {"job.yaml": "nonsense: ["}}, {"data": []}])
def test_without_the_first_ones_config_map_the_spec_is_all_there_is(config: Any) -> None:
    assert continued(stored(), config) == stored()


def recorded(**spec: Any) -> dict[str, Any]:
    """A PyTorchJob as it is created."""
    made = pytorch(stored(**spec))
    made["metadata"]["annotations"] = {FINGERPRINT_ANNOTATION: fingerprint(made)}
    return made


def test_an_edit_by_hand_is_noticed() -> None:
    made = recorded()
    assert not is_edited(made)
    worker = made["spec"]["pytorchReplicaSpecs"]["Worker"]
    worker["template"]["spec"]["containers"][0]["image"] = "other"
    assert is_edited(made)


def test_what_kueue_changes_is_no_edit() -> None:
    made = recorded()
    made["spec"]["runPolicy"]["suspend"] = True
    template = made["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    template["spec"] |= {"nodeSelector": {"flavor": "spot"}, "tolerations": [{"key": "spot"}]}
    template["metadata"]["labels"]["kueue"] = "x"
    assert not is_edited(made)


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        (4, "4"),
        ("0.5", "500m"),
        ("1500m", "1.5"),
        ("1024Mi", "1Gi"),
        ("12E", "12000P"),
    ],
)
def test_another_way_to_write_a_quantity_is_no_edit(made: Any, kept: str) -> None:
    """As Kueue's webhook does, and whoever else decodes and encodes the object in Go."""
    job = recorded(workers={"resources": {"requests": {"cpu": made}, "limits": {"memory": made}}})
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    container["resources"]["requests"]["cpu"] = container["resources"]["limits"]["memory"] = kept
    assert not is_edited(job)
    container["resources"]["limits"]["memory"] = "7"
    assert is_edited(job)


def test_what_go_leaves_out_is_no_edit() -> None:
    job = recorded(workers={"env": [{"name": "EMPTY", "value": ""}]})
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    (variable,) = (variable for variable in container["env"] if variable["name"] == "EMPTY")
    del variable["value"]
    assert not is_edited(job)
    container["env"].remove(variable)
    assert is_edited(job)


def test_a_fingerprint_of_another_release_tells_nothing() -> None:
    job = recorded()
    job["metadata"]["annotations"] = {FINGERPRINT_ANNOTATION: "2b60d4f2db688609"}
    assert not is_edited(job)


@pytest.mark.parametrize("raw", [{}, {"metadata": None}, {"spec": None}, {"spec": {"pytorchReplicaSpecs": []}}])
def test_anything_may_stand_in_an_edited_object(raw: dict[str, Any]) -> None:
    assert is_edited({"metadata": {"annotations": {FINGERPRINT_ANNOTATION: "x"}}, **raw}) in (True, False)
