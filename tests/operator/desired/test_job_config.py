"""The ConfigMap of an attempt, and what later attempts take from the first one's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.job_file import job_yaml
from finetune_api.load import load_job
from finetune_api.spec_size import SPEC_LIMIT_BYTES, SPEC_LIMIT_VALUES
from finetune_api.status import FineTuneJobStatus
from finetune_operator.desired import (
    effective_job,
    immutable_spec,
    job_problems,
    placement,
    same_placement,
    same_training,
)
from finetune_operator.desired.continuation import YAML_LIMIT_BYTES, continued
from finetune_operator.desired.fingerprint import FINGERPRINT_ANNOTATION, fingerprint, is_edited
from tests.api.extremes import nested
from tests.operator.desired.built import SETTINGS, config_map, pytorch, stored
from tests.operator.steps import counted


def test_the_effective_job_reads_back_as_what_is_trained() -> None:
    job = stored(num_devices=4, no_gradient_checkpoint=True)
    made = config_map(job)
    result = load_job(made["data"]["job.yaml"], source="job.yaml")
    assert result.errors == []
    assert result.job == effective_job(job, SETTINGS)
    assert result.job is not None
    assert result.job.spec.output is not None
    assert result.job.spec.workers.image == SETTINGS.trainer_image


def test_filling_in_twice_changes_nothing() -> None:
    once = effective_job(stored(num_devices=16), SETTINGS)
    assert effective_job(once, SETTINGS) == once


def test_what_is_trained_says_nothing_of_how_it_went() -> None:
    job = stored().model_copy(update={"status": FineTuneJobStatus(attempt=1)})
    assert effective_job(job, SETTINGS) == effective_job(stored(), SETTINGS)


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


LONG: dict[str, Any] = {
    "learning_rate": 1e-4,
    "max_grad_norm": 1,
    "task": "instruction_tuning",
    "lora_config": {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": True, "rank_pattern": {"a": 1}},
    "initial_base_model_ckpt_path": {"repo_id": "acme/base"},
    "model_revision": "Über\u2028\x7f",
    "workers": {"nodes": 2, "nodeSelector": {"a": "b"}, "affinity": {"nodeAffinity": {}}},
}
CHANGES: dict[str, dict[str, Any]] = {
    "another number": {"learning_rate": 1e-5},
    "another text": {"task": "causal_lm"},
    "a key more": {"valid_path": "s3://data/valid.jsonl"},
    "another item": {"lora_config": LONG["lora_config"] | {"target_modules": ["q_proj", "k_proj"]}},
    "one item less": {"lora_config": LONG["lora_config"] | {"target_modules": ["q_proj"]}},
    "another truth": {"lora_config": LONG["lora_config"] | {"init_lora_weights": False}},
    "of another type": {"initial_base_model_ckpt_path": "s3://models/a"},
}


def older(text: str) -> str:
    """The same record by another version: other order, spaces, escapes, spelling of numbers, and empty keys."""
    read = json.loads(text)
    backwards = dict(reversed(read.items())) | {"a_key_that_is_empty": None}
    written = json.dumps(backwards, indent=4, ensure_ascii=True)
    return written.replace("0.0001", "1E-4").replace('"max_grad_norm": 1.0', '"max_grad_norm": 1')


def test_the_same_record_in_other_words_is_no_change() -> None:
    job = stored(**LONG)
    texts = immutable_spec(job), placement(job)
    assert older(texts[0]) != texts[0]
    assert "1E-4" in older(texts[0])
    assert same_training(older(texts[0]), job)
    assert same_placement(older(texts[1]), job)


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_another_value_is_a_change_in_whatever_words(change: dict[str, Any]) -> None:
    recorded = immutable_spec(stored(**LONG))
    assert not same_training(recorded, stored(**{**LONG, **change}))
    assert not same_training(older(recorded), stored(**{**LONG, **change}))
    assert same_placement(placement(stored(**LONG)), stored(**{**LONG, **change}))


@pytest.mark.parametrize(("before", "after"), [(True, 1), (1, True), (0, False), ({"a": True}, {"a": 1}), ("1", 1)])
def test_a_number_is_no_truth(before: Any, after: Any) -> None:
    job = stored(logger={"provider": "wandb", "provider_config": {"anonymous": after}})
    recorded = immutable_spec(stored(logger={"provider": "wandb", "provider_config": {"anonymous": before}}))
    assert not same_training(recorded, job)


@pytest.mark.parametrize("record", [None, "", "null", "[]", "7", "nonsense", "{", "[" * 100_000, '{"a":' * 100_000])
def test_what_is_no_record_tells_nothing(record: str | None) -> None:
    assert same_training(record, stored())
    assert same_placement(record, stored())


@pytest.mark.parametrize(
    "inner",
    ["[" * 700 + "]" * 700, f"[{'[],' * 20_000}1]", f"[{'[],' * 300_000}1]", "1" * 9000],
    ids=["deep", "many values", "more values", "long number"],
)
@pytest.mark.parametrize("same", [same_training, same_placement])
def test_a_record_that_is_too_large_to_be_ours_tells_nothing_and_costs_little(
    inner: str, same: Callable[[str, FineTuneJob], bool]
) -> None:
    """As large as a ConfigMap that somebody put in the place of ours."""
    job = stored()
    found, steps = counted(lambda: same(f'{{"a":{inner}}}', job))
    assert found
    assert steps < STEPS


@pytest.mark.parametrize("inner", ["[],", "1,", '"a":{},'])
def test_of_a_record_with_more_values_than_a_spec_none_is_read(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a MiB of empty lists is 50 ms of reading, and another 50 in the record beside it."""
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it is read"))
    ends = "{}" if ":" in inner else "[]"
    record = f"{ends[0]}{(inner * (4 * SPEC_LIMIT_BYTES // len(inner) - 1))[:-1]}{ends[1]}"
    assert same_training(record, stored())
    assert same_placement(record, stored())


def test_an_empty_record_is_one() -> None:
    assert not same_training("{}", stored())
    assert same_placement("{}", stored())
    assert not same_placement("{}", stored(workers={"nodes": 2}))


def test_kueues_labels_are_no_part_of_where_a_job_is_placed() -> None:
    """A PyTorchJob keeps the queue of its creation, whatever label the job gets later."""
    queued = stored(labels={"kueue.x-k8s.io/queue-name": "a", "kueue.x-k8s.io/priority-class": "high"})
    assert same_placement(placement(queued), stored())
    assert placement(queued) == placement(stored())


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


def test_a_record_in_yaml_by_an_earlier_version_is_read() -> None:
    first = config_map(stored())
    newer = SETTINGS.model_copy(update={"default_output_uri": "s3://elsewhere/x"})
    yaml = {"data": {"job.yaml": job_yaml(effective_job(stored(), SETTINGS))}}
    assert not yaml["data"]["job.yaml"].startswith("{")
    for config in (first, yaml):
        made = effective_job(continued(stored(), config), newer)
        assert made.spec.output is not None
        assert made.spec.output.uri == SETTINGS.default_output_uri


@pytest.mark.parametrize(
    ("yaml", "length", "read"),
    [(True, YAML_LIMIT_BYTES, True), (True, YAML_LIMIT_BYTES + 1, False), (False, YAML_LIMIT_BYTES + 1, True)],
)
def test_a_long_record_is_read_in_json_alone(yaml: bool, length: int, read: bool) -> None:
    """In YAML it takes seconds, and somebody may have put it in the place of the first one's."""
    first = stored(learning_rate=0.5)
    text = job_yaml(first) if yaml else config_map(first)["data"]["job.yaml"]
    job = continued(stored(), {"data": {"job.yaml": text.ljust(length, "\n")}})
    assert job.spec.learning_rate == (0.5 if read else stored().spec.learning_rate)


def test_a_record_of_keys_alone_is_read() -> None:
    text = json.dumps(json.loads(config_map(stored(learning_rate=0.5))["data"]["job.yaml"])["spec"])
    assert continued(stored(), {"data": {"job.yaml": text}}).spec.learning_rate == 0.5


LARGEST: dict[str, dict[str, Any]] = {
    "texts": {"deepspeed": {f"{number}": "\x7f\u202e" * 2000 for number in range(16)}},
    "escapes": {"deepspeed": {f"{number}": "\x00" * 2000 for number in range(10)}},
    "lists": {"deepspeed": {f"{number}": [[[]] * 48] for number in range(99)}},
    "maps": {"deepspeed": {f"{number}": {f"{inner}": {} for inner in range(98)} for number in range(98)}},
    "workers": {"workers": {"env": [{"name": f"V{number}", "value": "v" * 960} for number in range(128)]}},
}


@pytest.mark.parametrize("spec", LARGEST.values(), ids=list(LARGEST))
def test_a_config_map_holds_every_job_that_is_accepted(spec: dict[str, Any]) -> None:
    job = stored(**spec)
    assert job_problems(job, SETTINGS) == []
    data = config_map(job)["data"]
    # The server's bound is on keys and values together.
    assert sum(len(key) + len(text.encode()) for key, text in data.items()) < 1024 * 1024
    assert effective_job(job, SETTINGS) == load_job(data["job.yaml"], source="job.yaml").job


def test_the_largest_of_all_is_not_far_from_what_is_tried_here() -> None:
    """What a ConfigMap takes: a line for each value with its indentation, and every text once in each of two keys."""
    indented = SPEC_LIMIT_VALUES * (1 + 2 * 12) + SPEC_LIMIT_BYTES
    assert indented + SPEC_LIMIT_BYTES + 64 * 1024 < 1024 * 1024


STEPS = 40_000
"""Calls that reading an object may take, however large it is."""


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
        ("1" * 32, "1" * 32 + "000m"),
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


HOSTILE: dict[str, dict[str, Any]] = {
    "empty maps": {"envFrom": [{} for _ in range(350_000)]},
    "empty lists": {"ports": [[] for _ in range(350_000)]},
    "letters": {"args": ["a"] * 300_000},
    "entries": {"resources": {"limits": {f"{number:x}": "1" for number in range(100_000)}}},
    "keys": {f"{number:x}": 1 for number in range(100_000)},
    "long text": {"args": ["x" * 1_400_000]},
    "long amount": {"resources": {"limits": {"memory": "1" * 1_000_001}}},
    "long fraction": {"resources": {"limits": {"memory": "0." + "1" * 1_000_001 + "Ei"}}},
    "long negative": {"resources": {"limits": {"memory": "-" + "9" * 1_400_000 + "n"}}},
    "deep lists": {"args": nested(700)},
    "deep maps": {"resources": {"limits": nested(700, "{}")}},
}
"""What whoever may edit a PyTorchJob can write into a container, up to the API server's 1.4 MB."""


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("place", ["container", "pod"])
def test_an_edit_is_noticed_however_large_it_is_and_costs_little(edit: dict[str, Any], place: str) -> None:
    job = recorded()
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (pod["containers"][0] if place == "container" else pod).update(edit)
    found, steps = counted(lambda: is_edited(job))
    assert found
    assert steps < STEPS


def test_what_kueue_changes_is_no_edit_however_much_it_is() -> None:
    job = recorded()
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod |= {"tolerations": [{} for _ in range(300_000)], "affinity": nested(700)}
    found, steps = counted(lambda: is_edited(job))
    assert not found
    assert steps < STEPS


@pytest.mark.parametrize("spec", LARGEST.values(), ids=list(LARGEST))
def test_the_largest_that_is_made_of_a_job_is_no_edit(spec: dict[str, Any]) -> None:
    assert not is_edited(recorded(**spec))


def test_a_fingerprint_of_another_release_tells_nothing() -> None:
    job = recorded()
    job["metadata"]["annotations"] = {FINGERPRINT_ANNOTATION: "2b60d4f2db688609"}
    assert not is_edited(job)


@pytest.mark.parametrize("raw", [{}, {"metadata": None}, {"spec": None}, {"spec": {"pytorchReplicaSpecs": []}}])
def test_anything_may_stand_in_an_edited_object(raw: dict[str, Any]) -> None:
    assert is_edited({"metadata": {"annotations": {FINGERPRINT_ANNOTATION: "x"}}, **raw}) in (True, False)
    assert fingerprint(raw) == "2-44136fa355b3678a"
