"""What a pod mounts: each claim once, nothing twice in one place, and only what is written to can be written."""

from __future__ import annotations

import posixpath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.job import FineTuneJob
from finetune_operator.desired import job_problems
from tests.operator.desired.built import SETTINGS, container, pod, stored

CACHE = "/var/cache/finetune"


def _claim_volume(name: str, path: str, claim: str, *, claim_read_only: bool = False, **mount: Any) -> dict[str, Any]:
    source = {"claimName": claim, **({"readOnly": True} if claim_read_only else {})}
    return {"name": name, "mountPath": path, "persistentVolumeClaim": source, **mount}


def _sources(job: FineTuneJob) -> dict[str, dict[str, Any]]:
    """Claim -> its volume's source; a claim is there once."""
    found = [volume["persistentVolumeClaim"] for volume in pod(job)["volumes"] if "persistentVolumeClaim" in volume]
    by_claim = {source["claimName"]: source for source in found}
    assert len(by_claim) == len(found)
    return by_claim


def _mounts(job: FineTuneJob) -> dict[str, dict[str, Any]]:
    return {mount["mountPath"]: mount for mount in container(job)["volumeMounts"]}


def test_a_claim_that_is_used_in_several_ways_is_one_volume() -> None:
    job = stored(
        train_path="pvc://shared/train.jsonl",
        output={"uri": "pvc://shared/out"},
        workers={
            "cache": {"persistentVolumeClaim": {"claimName": "shared"}},
            "volumes": [
                _claim_volume("first", "/first", "shared", subPath="a"),
                _claim_volume("second", "/second", "shared", readOnly=True),
            ],
        },
    )
    assert _sources(job) == {"shared": {"claimName": "shared"}}
    mounts = _mounts(job)
    assert {mounts[path]["name"] for path in (CACHE, "/mnt/pvc/shared", "/first", "/second")} == {"finetune-cache"}
    assert mounts["/first"]["subPath"] == "a"
    assert mounts["/second"]["readOnly"] is True
    assert "readOnly" not in mounts["/mnt/pvc/shared"]


@pytest.mark.parametrize(
    ("volumes", "read_only"),
    [
        ([], True),
        ([_claim_volume("more", "/more", "data", readOnly=True)], True),
        ([_claim_volume("more", "/more", "data", claim_read_only=True)], True),
        ([_claim_volume("more", "/more", "data")], False),
    ],
)
def test_a_claim_is_read_only_as_a_whole_when_nothing_writes_to_it(
    volumes: list[dict[str, Any]], read_only: bool
) -> None:
    """Otherwise a claim that is ReadOnlyMany could not be mounted at all."""
    job = stored(train_path="pvc://data/train.jsonl", workers={"volumes": volumes})
    assert _sources(job)["data"].get("readOnly", False) is read_only
    assert _mounts(job)["/mnt/pvc/data"]["readOnly"] is True


def test_every_kind_of_volume_is_handed_through() -> None:
    job = stored(
        workers={
            "volumes": [
                {"name": "config", "mountPath": "/config", "configMap": {"name": "settings"}},
                {"name": "keys", "mountPath": "/keys", "secret": {"secretName": "keys"}},
                {"name": "room", "mountPath": "/room", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
                {"name": "plain", "mountPath": "/plain", "emptyDir": {}},
                _claim_volume("data", "/data", "data", subPath="part"),
            ]
        }
    )
    volumes = {volume.pop("name"): volume for volume in pod(job)["volumes"]}
    assert volumes["config"] == {"configMap": {"name": "settings"}}
    assert volumes["keys"] == {"secret": {"secretName": "keys"}}
    assert volumes["room"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
    assert volumes["plain"] == {"emptyDir": {}}
    assert volumes["data"] == {"persistentVolumeClaim": {"claimName": "data"}}
    mounts = _mounts(job)
    assert mounts["/config"] == {"name": "config", "mountPath": "/config", "readOnly": True}
    assert mounts["/keys"]["readOnly"] is True
    assert mounts["/room"] == {"name": "room", "mountPath": "/room"}
    assert mounts["/data"] == {"name": "data", "mountPath": "/data", "subPath": "part"}


def test_the_trainer_sees_its_job_and_not_what_the_operator_compares() -> None:
    (config,) = [volume["configMap"] for volume in pod(stored())["volumes"] if "configMap" in volume]
    assert config["items"] == [{"key": "job.yaml", "path": "job.yaml"}]
    mount = _mounts(stored())["/etc/finetune"]
    assert mount["readOnly"] is True
    assert container(stored())["command"][-1] == "/etc/finetune/job.yaml"


@pytest.mark.parametrize(
    ("settings", "workers", "cache"),
    [
        ({}, {}, {"emptyDir": {}}),
        ({}, {"cache": {"sizeLimit": "50Gi"}}, {"emptyDir": {"sizeLimit": "50Gi"}}),
        ({"cache_claim": "models"}, {}, {"persistentVolumeClaim": {"claimName": "models"}}),
        # Who asks for the node's disk gets it.
        ({"cache_claim": "models"}, {"cache": {"sizeLimit": "50Gi"}}, {"emptyDir": {"sizeLimit": "50Gi"}}),
        (
            {"cache_claim": "models"},
            {"cache": {"persistentVolumeClaim": {"claimName": "mine"}}},
            {"persistentVolumeClaim": {"claimName": "mine"}},
        ),
    ],
)
def test_the_cache_is_the_jobs_else_the_platforms_else_the_nodes_disk(
    settings: dict[str, Any], workers: dict[str, Any], cache: dict[str, Any]
) -> None:
    volumes = pod(stored(workers=workers), SETTINGS.model_copy(update=settings))["volumes"]
    (found,) = [volume for volume in volumes if volume["name"] == "finetune-cache"]
    assert found == {"name": "finetune-cache", **cache}


def test_the_platform_team_bounds_memory_and_disk() -> None:
    settings = SETTINGS.model_copy(update={"shared_memory_size": "8Gi", "scratch_size": "20Gi"})
    volumes = {volume["name"]: volume for volume in pod(stored(), settings)["volumes"]}
    assert volumes["finetune-shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert volumes["finetune-scratch"]["emptyDir"] == {"sizeLimit": "20Gi"}


@pytest.mark.parametrize("variable", ["HOME", "TMPDIR", "HF_HOME", "FINETUNE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_folders_that_libraries_write_to_are_on_a_volume_that_can_be_written(variable: str) -> None:
    made = container(stored())
    (folder,) = [entry["value"] for entry in made["env"] if entry["name"] == variable]
    writable = [mount["mountPath"] for mount in made["volumeMounts"] if not mount.get("readOnly")]
    assert any(folder == path or folder.startswith(f"{path}/") for path in writable)


_paths = st.sampled_from(["/data", "/data/", "/data/.", "/x/../data", "/data/more", "/mnt/pvc/shared", "/etc"])
_claims = st.sampled_from(["shared", "data", "a-claim.with-dots"])
_volumes = st.lists(
    st.builds(
        _claim_volume,
        st.sampled_from(["one", "two", "three"]),
        _paths,
        _claims,
        claim_read_only=st.booleans(),
        readOnly=st.booleans(),
    ),
    max_size=3,
    unique_by=lambda volume: volume["name"],
)


@given(_volumes, _claims, _claims, st.booleans())
def test_a_job_that_is_accepted_makes_a_pod_that_kubernetes_accepts(
    volumes: list[dict[str, Any]], data: str, results: str, cached: bool
) -> None:
    cache = {"cache": {"persistentVolumeClaim": {"claimName": results}}} if cached else {}
    job = stored(
        train_path=f"pvc://{data}/x.jsonl", output={"uri": f"pvc://{results}/y"}, workers={"volumes": volumes, **cache}
    )
    if job_problems(job, SETTINGS):
        return
    mounts, names = container(job)["volumeMounts"], [volume["name"] for volume in pod(job)["volumes"]]
    assert len({posixpath.normpath(mount["mountPath"]) for mount in mounts}) == len(mounts)
    assert len(set(names)) == len(names)
    assert {mount["name"] for mount in mounts} == set(names)
    sources = _sources(job)
    assert not sources[results].get("readOnly")
    assert "readOnly" not in _mounts(job)[f"/mnt/pvc/{results}"]
