"""Near-misses of a real job: a job or sentences, and what is made of a job that is accepted never fails."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.defaults import effective_job, notices
from finetune_api.job_file import job_json, job_yaml
from finetune_api.load import LoadResult, load_job
from finetune_trainer.inputs import identity
from tests.api.formats import APART
from tests.api.jobs import manifest
from tests.hostile.samples import JSON, as_json, damaged, near_misses, some

WHOLE: dict[str, Any] = manifest(
    generation_config={"prompt_format": APART, "stopping_sequences": ["</A>"]},
    lora_config={"r": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    learning_rate=1e-4,
    num_epochs=3,
    valid_path="s3://bucket/valid.jsonl",
    checkpoint_and_evaluation_frequency={"strategy": "steps", "value": 10},
    workers={"nodes": 2, "gpusPerNode": 8, "env": [{"name": "A", "value": "b"}]},
    output={"uri": "s3://bucket/out"},
    logger={"provider": "wandb", "provider_config": {"project": "p"}},
)

TEXTS = st.one_of(
    near_misses(WHOLE, most=5).map(json.dumps),
    near_misses(WHOLE).map(yaml.safe_dump),
    near_misses(WHOLE["spec"]).map(yaml.safe_dump),
    damaged(yaml.safe_dump(WHOLE).encode()).map(lambda data: data.decode("utf-8", "replace")),
    damaged(as_json(WHOLE)).map(lambda data: data.decode("latin-1")),
    st.builds(lambda value: json.dumps(WHOLE | {"spec": value}), JSON),
    st.builds(lambda value: "a: &a " + json.dumps(value) + "\nspec: *a\nmetadata: {<<: *a}\n", JSON),
)


def test_the_job_itself_is_one() -> None:
    assert load_job(json.dumps(WHOLE), source="job.yaml").job is not None


def told(result: LoadResult) -> None:
    """All that is said can be shown; there is a job, or there is a reason why not."""
    assert (result.job is None) == bool(result.errors)
    for problem in [*result.errors, *result.warnings]:
        assert str(problem).isprintable()
        assert problem.message.endswith((".", "?", "…"))
        assert len(str(problem)) < 2000


@some(150)
@given(TEXTS)
@example("\t\x00")
@example("a: &a [*a]")
@example("spec: !!python/object/apply:os.system [ls]")
def test_there_is_a_job_or_a_reason(text: str) -> None:
    result = load_job(text, source="job.yaml")
    told(result)
    if result.job is None:
        return
    whole = effective_job(result.job)
    assert all(problem.message.endswith(".") for problem in notices(whole))
    json.dumps(identity(whole, "0" * 64))
    for written in (job_yaml(whole), job_json(whole)):
        again = load_job(written, source="job.yaml")
        assert again.job == whole, again.errors
