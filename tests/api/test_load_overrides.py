"""--set key=value on top of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune_api.load import LoadResult, load_job, load_job_file
from tests.api.jobs import manifest, spec

BARE = yaml.safe_dump(spec(num_epochs=3, context_length=512))
MANIFEST = yaml.safe_dump(manifest(num_epochs=3, context_length=512))


def _load(text: str, *overrides: str) -> LoadResult:
    return load_job(text, source="job.yaml", overrides=overrides)


@pytest.mark.parametrize("text", [BARE, MANIFEST])
def test_an_override_replaces_adds_and_removes_keys(text: str) -> None:
    result = _load(text, "num_epochs=1", "learning_rate=1e-3", "context_length=", "lora_config.r=4", "workers.nodes=2")
    assert result.errors == []
    assert result.job is not None
    found = result.job.spec
    assert (found.num_epochs, found.learning_rate, found.context_length) == (1, 1e-3, None)
    assert (found.lora_config.r, found.workers.nodes) == (4, 2)


@pytest.mark.parametrize("text", [BARE, MANIFEST])
def test_an_override_may_be_written_from_the_top_of_a_manifest(text: str) -> None:
    result = _load(text, "spec.seed=7", "metadata.name=other", 'generation_config.stopping_sequences=["a=b"]')
    assert result.job is not None
    assert (result.job.spec.seed, result.job.metadata.name) == (7, "other")
    assert result.job.spec.generation_config is not None
    assert result.job.spec.generation_config.stopping_sequences == ["a=b"]


@pytest.mark.parametrize(
    ("override", "path", "part"),
    [
        ("num_epoch=1", "num_epoch", "did you mean num_epochs?"),
        ("lora_config.rr=1", "lora_config.rr", "the nearest known one is r"),
        ("num_epochs='1'", "num_epochs", "remove the quotes"),
        ("num_epochs", "num_epochs", "does not have the form key=value"),
        ("=1", "", "does not have the form key=value"),
        ("lora_config..r=1", "lora_config..r", "does not have the form key=value"),
        ("num_epochs.x=1", "num_epochs.x", "spec.num_epochs holds a value of its own"),
        ("lora_config.target_modules=[a", "lora_config.target_modules", "is not YAML that can be read"),
    ],
)
def test_a_wrong_override_is_explained(override: str, path: str, part: str) -> None:
    result = _load(BARE, override)
    assert result.job is None
    (problem,) = result.errors
    assert problem.path == path
    assert part in problem.message


def test_a_file_is_read_with_its_overrides(tmp_path: Path) -> None:
    file = tmp_path / "my-job.yaml"
    file.write_text(BARE)
    result = load_job_file(file, ["num_epochs=9"])
    assert result.job is not None
    assert (result.job.spec.num_epochs, result.job.metadata.name) == (9, "my-job")
