"""Results of different jobs never meet in one place; a local run writes where it was told to."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.defaults import notices
from finetune_api.job import Metadata
from finetune_api.output import output_address, working_name
from tests.api.jobs import job

UID = "0123abcd-4567-89ab-cdef-0123456789ab"


@pytest.mark.parametrize(
    ("spec", "metadata", "address"),
    [
        ({}, {}, None),
        ({}, {"uid": UID}, None),
        ({"output_dir": "out"}, {}, "out"),
        ({"output": {"uri": "s3://bucket/jobs"}}, {}, "s3://bucket/jobs"),
        ({"output": {"uri": "s3://bucket/jobs/"}}, {}, "s3://bucket/jobs/"),
        ({"output": {"uri": "s3://bucket/jobs"}}, {"namespace": "team"}, "s3://bucket/jobs"),
        (
            {"output": {"uri": "s3://bucket/jobs"}},
            {"namespace": "team", "uid": UID},
            "s3://bucket/jobs/team/guard/0123abcd",
        ),
        ({"output": {"uri": "s3://bucket/"}}, {"namespace": "team", "uid": UID}, "s3://bucket/team/guard/0123abcd"),
        ({"output": {"uri": "pvc://claim"}}, {"uid": UID}, "pvc://claim/default/guard/0123abcd"),
        ({"output_dir": "/mnt/out"}, {"uid": UID}, "/mnt/out/default/guard/0123abcd"),
        ({"output": {"uri": "hf://owner/name"}}, {}, "hf://owner/name"),
        ({"output": {"uri": "hf://owner/name@v2"}}, {"namespace": "team", "uid": UID}, "hf://owner/name@v2"),
    ],
)
def test_where_results_go(spec: dict[str, Any], metadata: dict[str, Any], address: str | None) -> None:
    placed = job(**spec).model_copy(update={"metadata": Metadata(name="guard", **metadata)})
    assert output_address(placed) == address


def test_jobs_of_one_name_in_one_namespace_do_not_meet() -> None:
    base = job(output={"uri": "s3://bucket"})
    uids = [UID, UID.replace("0123abcd", "0123abce")]
    addresses = {output_address(base.model_copy(update={"metadata": Metadata(name="guard", uid=uid)})) for uid in uids}
    assert len(addresses) == 2


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({}, "finetune-guard"),
        ({"namespace": "team"}, "finetune-guard"),
        ({"uid": UID}, "finetune-guard-0123abcd"),
        ({"namespace": "team", "uid": UID}, "finetune-team-guard-0123abcd"),
    ],
)
def test_a_jobs_branch_on_the_hub_is_its_own(metadata: dict[str, Any], name: str) -> None:
    assert working_name(job().model_copy(update={"metadata": Metadata(name="guard", **metadata)})) == name


@pytest.mark.parametrize(("spec", "told"), [({"quantization": "nf4"}, 2), ({}, 1)])
def test_whoever_wants_a_merged_model_of_a_quantized_base_is_told_into_what_it_is_merged(
    spec: dict[str, Any], told: int
) -> None:
    found = [notice.message for notice in notices(job(output={"uri": "out", "merged": True}, **spec))]
    merged = [message for message in found if message.startswith("output.merged ")]
    assert len(merged) == told
    assert ("not as quantized for training" in merged[-1]) is bool(spec)
