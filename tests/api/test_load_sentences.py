"""What is wrong with a spec is said at its place, in a sentence that says what to write instead."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.load import LoadResult, load_job, load_manifest
from tests.api.jobs import LLAMA, manifest, spec

CASES: list[tuple[dict[str, Any], str, str]] = [
    # Unknown keys
    ({"num_epoch": 3}, "num_epoch", "num_epoch is not a known key: did you mean num_epochs?"),
    ({"lora_config": {"rr": 1}}, "lora_config.rr", "rr is not a known key; the nearest known one is r."),
    ({"workers": {"gpus_per_node": 1}}, "workers.gpus_per_node", "did you mean gpusPerNode?"),
    ({"backoff_limit": 1}, "backoff_limit", "did you mean backoffLimit?"),
    ({"system": "{instruction}"}, "system", "it belongs under generation_config.prompt_format; check the indentation"),
    ({"gpusPerNode": 2}, "gpusPerNode", "it belongs under workers"),
    ({"lora_config": {"velora_config": {}}}, "lora_config.velora_config", "VeLoRA is not supported"),
    ({"workers": {"env": [{"name": "A", "val": "b"}]}}, "workers.env[0].val", "did you mean value?"),
    # Types
    ({"learning_rate": "1e-4"}, "learning_rate", 'must be a number: remove the quotes around "1e-4".'),
    ({"num_epochs": "3"}, "num_epochs", 'must be a whole number: remove the quotes around "3".'),
    ({"num_epochs": "three"}, "num_epochs", "must be a whole number, not text."),
    ({"num_epochs": 1.5}, "num_epochs", "must be a whole number, not 1.5."),
    ({"num_epochs": True}, "num_epochs", "must be a whole number, not true."),
    ({"num_epochs": [1]}, "num_epochs", "must be a whole number, not a list."),
    ({"suspend": "true"}, "suspend", 'must be true or false: remove the quotes around "true".'),
    ({"suspend": 1}, "suspend", "must be true or false, not 1."),
    ({"model_revision": 12}, "model_revision", 'must be text: put quotes around it ("12").'),
    ({"valid_path": ["a"]}, "valid_path", "must be text, not a list."),
    ({"lora_config": 8}, "lora_config", "must be a mapping of keys to values, not 8."),
    ({"deepspeed": "zero"}, "deepspeed", "must be a mapping of keys to values, not text."),
    ({"lora_config": {"modules_to_save": "a"}}, "lora_config.modules_to_save", "must be a list: write it as [value]."),
    ({"lora_config": {"target_modules": {}}}, "lora_config.target_modules", "or a list of module names, not a mapping"),
    ({"initial_base_model_ckpt_path": 3}, "initial_base_model_ckpt_path", "{repo_id: owner/name}, not 3."),
    ({"workers": {"resources": {"limits": {"cpu": 0.5}}}}, "workers.resources.limits.cpu", "such as 4, 500m or 64Gi"),
    ({"workers": {"resources": {"limits": {"cpu": "2 GB"}}}}, "workers.resources.limits.cpu", "such as 4, 500m"),
    # Bounds
    ({"num_epochs": 0}, "num_epochs", "must be at least 1, not 0."),
    ({"learning_rate": 0}, "learning_rate", "must be above 0"),
    ({"lora_config": {"lora_dropout": 1.0}}, "lora_config.lora_dropout", "must be below 1"),
    ({"lora_config": {"r": 513}}, "lora_config.r", "must be at most 512, not 513."),
    ({"max_dropped_row_share": 1.5}, "max_dropped_row_share", "must be at most 1"),
    ({"train_path": ""}, "train_path", "must not be empty"),
    ({"train_path": "a" * 2049}, "train_path", "must be at most 2048 characters long"),
    ({"lora_config": {"target_modules": []}}, "lora_config.target_modules", "list of module names"),
    # Choices
    ({"task": "instruction_tunning"}, "task", "did you mean instruction_tuning?"),
    ({"padding": "none"}, "padding", "padding must be longest or max_length, not 'none'"),
    ({"quantization": "fp4"}, "quantization", "quantization must be nf4 or int8, not 'fp4'"),
    ({"lr_scheduler_type": 3}, "lr_scheduler_type", "must be cosine, linear or constant, not 3."),
    # Missing
    ({"logger": {}}, "logger.provider", "provider is required."),
    ({"output": {}}, "output.uri", "uri is required."),
    ({"generation_config": {"prompt_format": {"user": "x"}}}, "generation_config.prompt_format.system", "required"),
    (
        {"generation_config": {"prompt_format": {"use_hugging_face_chat_template": True, "user": "{instruction}"}}},
        "generation_config.prompt_format.user",
        "user has no meaning beside use_hugging_face_chat_template: remove one of the two.",
    ),
    (
        {"generation_config": {"prompt_format": {"use_hugging_face_chat_template": False}}},
        "generation_config.prompt_format.use_hugging_face_chat_template",
        "must be True",
    ),
]


def _problem(result: LoadResult, path: str) -> str:
    assert result.job is None
    return next(problem.message for problem in result.errors if problem.path == path)


@pytest.mark.parametrize(("change", "path", "part"), CASES)
def test_a_wrong_spec_is_explained_at_its_place(change: dict[str, Any], path: str, part: str) -> None:
    bare = load_job(json.dumps(spec(**change)), source="job.yaml")
    assert part in _problem(bare, path)
    assert part in _problem(load_manifest(manifest(**change)), f"spec.{path}")


@pytest.mark.parametrize(("change", "path", "part"), CASES)
def test_no_sentence_is_pydantics(change: dict[str, Any], path: str, part: str) -> None:
    for problem in load_manifest(manifest(**change)).errors:
        assert "Input should" not in problem.message
        assert "permitted" not in problem.message
        assert problem.message.endswith((".", "?"))


def test_all_problems_are_reported_in_the_order_of_the_file() -> None:
    text = "num_epoch: 1\nmodel_id: 3\nlora_config: {r: '8', q: 1}\ntrain_path: x\npadding: no\n"
    result = load_job(text, source="job.yaml")
    assert [problem.path for problem in result.errors] == [
        "num_epoch",
        "model_id",
        "lora_config.r",
        "lora_config.q",
        "padding",
    ]


def test_the_guides_own_example_without_its_indentation_is_explained() -> None:
    text = (
        "model_id: meta-llama/Meta-Llama-Guard-2-8B\ntrain_path: s3://example-bucket/a.jsonl\ngeneration_config:\n"
        'prompt_format:\nsystem: "{instruction}"\nuser: "{instruction}"\nassistant: "{instruction} </s>"\n'
        'stopping_sequences: ["</s>"]\n'
    )
    result = load_job(text, source="job.yaml")
    assert _problem(result, "user").endswith("it belongs under generation_config.prompt_format; check the indentation.")
    assert _problem(result, "stopping_sequences").endswith("it belongs under generation_config; check the indentation.")
    assert "generation_config is empty, so it counts as not given." in [item.message for item in result.warnings]


def test_a_manifest_of_another_kind_is_only_told_so() -> None:
    result = load_job("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: []}\n", source="pod.yaml")
    assert [problem.path for problem in result.errors] == ["apiVersion", "kind"]
    assert result.errors[1].message == "kind must be FineTuneJob, not 'Pod'."


def test_a_manifest_without_its_type_is_told_what_to_write() -> None:
    result = load_manifest({"metadata": {"name": "a"}, "spec": spec()})
    assert [problem.message for problem in result.errors] == [
        "apiVersion is required: write apiVersion: finetune.dev/v1alpha1.",
        "kind is required: write kind: FineTuneJob.",
    ]


@pytest.mark.parametrize("name", ["1st", "Guard", "a.b", "a_b", "a-", "a" * 64])
def test_a_name_that_no_worker_could_carry_is_refused(name: str) -> None:
    assert "metadata.name" in [problem.path for problem in load_manifest(manifest() | _named(name)).errors]


def _named(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name}}


def test_what_the_server_adds_to_metadata_is_read() -> None:
    metadata = {
        "name": "guard",
        "namespace": "team-a",
        "uid": "6e9ad4ae",
        "generation": 2,
        "resourceVersion": "17",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"kueue.x-k8s.io/queue-name": "a"},
        "managedFields": [{"manager": "kubectl"}],
    }
    result = load_manifest(manifest() | {"metadata": metadata, "status": {"phase": "Running", "unheardOf": 1}})
    assert result.errors == []
    assert result.job is not None
    assert (result.job.metadata.generation, result.job.metadata.uid) == (2, "6e9ad4ae")
    assert result.job.status is not None
    assert result.job.status.phase == "Running"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("guard.yaml", "guard"),
        ("/tmp/My Guard (2).yaml", "my-guard-2"),  # noqa: S108  # a name only
        ("7b.yaml", "job-7b"),
        ("-", "job"),
        ("Ünï.yaml", "n"),
        ("a" * 80 + ".yaml", "a" * 63),
        ("a" * 62 + "--b.yaml", "a" * 62),
    ],
)
def test_a_bare_configuration_is_named_after_its_file(source: str, name: str) -> None:
    result = load_job(yaml.safe_dump(spec()), source=source)
    assert result.errors == []
    assert result.job is not None
    assert result.job.metadata.name == name


def test_an_empty_value_counts_as_not_given_and_is_named() -> None:
    result = load_job(f"model_id: {LLAMA}\ntrain_path: a.jsonl\nvalid_path:\n", source="job.yaml")
    assert result.job is not None
    assert result.job.spec.valid_path is None
    assert "valid_path is empty, so it counts as not given." in [warning.message for warning in result.warnings]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(
    [
        "model_id",
        "task",
        "lora_config",
        "generation_config",
        "workers",
        "logger",
        "num_devices",
        "output",
        "learning_rate",
    ]
)


@given(st.dictionaries(_KEYS | st.text(max_size=8), _VALUES, max_size=5))
def test_no_spec_raises_anything(changes: dict[str, Any]) -> None:
    result = load_manifest(manifest(**changes))
    assert (result.job is None) == bool(result.errors)
    for problem in result.errors:
        assert "Input should" not in problem.message
