"""Variables of a worker: what a job may set, what it may not, and that credentials are only ever pointed at."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.workers import Secrets
from finetune_operator.desired import job_problems
from tests.operator.desired.built import SETTINGS, container, environment, stored

SECRETS = {"huggingFace": {"name": "hub"}, "objectStore": {"name": "store"}}


def _job_with(name: str) -> Any:
    # By reference: names such as HF_TOKEN are refused as plain values already.
    source = {"secretKeyRef": {"name": "own", "key": "key"}}
    return stored(workers={"env": [{"name": name, "valueFrom": source}]})


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "WANDB_API_KEY"])
def test_credentials_may_come_by_a_variable_where_secrets_give_none(name: str) -> None:
    job = _job_with(name)
    assert job_problems(job, SETTINGS) == []
    assert environment(job)[name] == {"secretKeyRef": {"name": "own", "key": "key"}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL_S3", "https://s3.example.com"),
        ("AWS_REGION", "eu-central-1"),
        ("TRITON_CACHE_DIR", "/data/triton"),
        ("CUDA_VISIBLE_DEVICES", "0"),
        ("NCCL_DEBUG", "INFO"),
        ("HF_ENDPOINT", "https://hub.example.com"),
    ],
)
def test_where_either_may_say_it_the_job_wins(name: str, value: str) -> None:
    job = stored(workers={"env": [{"name": name, "value": value}], "gpusPerNode": 0}, secrets=SECRETS)
    assert job_problems(job, SETTINGS) == []
    assert environment(job)[name] == value


def test_no_credential_is_asked_for_that_the_job_does_not_name() -> None:
    assert not any("valueFrom" in entry for entry in container(stored())["env"] if entry["name"] != "PET_NODE_RANK")


DEFAULTS = SETTINGS.model_copy(update={"object_store_secret": "team-store", "hugging_face_secret": "team-hub"})


def _from_secrets(job: Any) -> dict[str, tuple[str, bool]]:
    """Variable -> Secret that it comes from, and whether the pod starts without."""
    sources = {name: source for name, source in environment(job, DEFAULTS).items() if isinstance(source, dict)}
    references = {name: source["secretKeyRef"] for name, source in sources.items() if "secretKeyRef" in source}
    return {name: (found["name"], found.get("optional", False)) for name, found in references.items()}


def test_the_operators_secrets_serve_jobs_that_name_none_and_may_be_missing() -> None:
    found = _from_secrets(stored())
    assert found.pop("HF_TOKEN") == ("team-hub", True)
    assert found.keys() == _from_secrets(stored(secrets={"objectStore": {"name": "own"}})).keys() - {"HF_TOKEN"}
    assert set(found.values()) == {("team-store", True)}


@pytest.mark.parametrize(("given", "other"), [("huggingFace", "team-store"), ("objectStore", "team-hub")])
def test_of_the_operators_secrets_a_job_replaces_one_by_naming_its_own(given: str, other: str) -> None:
    found = _from_secrets(stored(secrets={given: SECRETS[given]}))
    assert {secret for secret, _ in found.values()} == {SECRETS[given]["name"], other}


@pytest.mark.parametrize(
    ("variable", "left"),
    [
        ("HF_TOKEN", "team-store"),
        ("HUGGING_FACE_HUB_TOKEN", "team-store"),
        ("AWS_SECRET_ACCESS_KEY", "team-hub"),
        ("AWS_SESSION_TOKEN", "team-hub"),
    ],
)
def test_credentials_of_the_operators_are_never_mixed_with_those_in_a_jobs_variables(variable: str, left: str) -> None:
    found = _from_secrets(_job_with(variable))
    assert {secret for secret, _ in found.values()} == {"own", left}


_names = st.sampled_from(
    ["AWS_REGION", "AWS_DEFAULT_REGION", "HF_TOKEN", "HOME", "USER", "CUDA_VISIBLE_DEVICES", "PET_NODE_RANK", "MINE"]
)


@given(st.lists(_names, max_size=4), st.booleans(), st.booleans(), st.integers(0, 2))
def test_an_accepted_job_has_each_variable_once(names: list[str], hub: bool, store: bool, gpus: int) -> None:
    secrets = {key: SECRETS[key] for key, wanted in (("huggingFace", hub), ("objectStore", store)) if wanted}
    source = {"configMapKeyRef": {"name": "own", "key": "key"}}
    job = stored(
        workers={"env": [{"name": name, "valueFrom": source} for name in names], "gpusPerNode": gpus}, secrets=secrets
    )
    if job_problems(job, SETTINGS):
        return
    made = [entry["name"] for entry in container(job)["env"]]
    assert len(set(made)) == len(made)
    assert set(names) <= set(made)
    assert not {"HOME", "PET_NODE_RANK"} & set(names)


def test_the_reference_names_every_key_that_is_taken_from_the_object_stores_secret() -> None:
    taken = set(environment(stored(secrets={"objectStore": {"name": "store"}}))) - set(environment(stored()))
    description = Secrets.model_fields["object_store"].description or ""
    assert taken == set(re.findall(r"AWS_\w+", description))
