"""A spec that is too large is refused in one sentence, before anything is done with it that costs more than that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api import load
from finetune_api.crd import structural_schema
from finetune_api.job import FineTuneJob
from finetune_api.load import load_job, load_manifest
from finetune_api.spec_size import SPEC_LIMIT_BYTES, SPEC_LIMIT_VALUES, may_have_more_values, size_fault
from tests.api.extremes import nested, nodes
from tests.api.jobs import manifest


def _padded(size_bytes: int) -> dict[str, Any]:
    """A manifest whose spec takes that much as JSON."""
    made = manifest(deepspeed={})
    missing = size_bytes - _size(made["spec"])
    made["spec"]["deepspeed"] = {f"{number:06d}": "a" * 4000 for number in range(missing // 4012)}
    rest = size_bytes - _size(made["spec"])
    made["spec"]["deepspeed"] |= {"rest": "a" * (rest - len(',"rest":""'))}
    assert _size(made["spec"]) == size_bytes
    return made


def _size(spec: Any) -> int:
    return len(json.dumps(spec, separators=(",", ":"), ensure_ascii=False).encode())


def test_the_sentence_says_how_large_it_is_how_large_it_may_be_and_what_to_do() -> None:
    result = load_manifest(_padded(SPEC_LIMIT_BYTES + 1024))
    (problem,) = result.errors
    assert (result.job, result.warnings, problem.path) == (None, [], "spec")
    assert problem.message == (
        "spec takes 129 KiB as JSON (deepspeed alone 129), and 128 KiB is the most that is read: shorten its texts and "
        "lists; what is data belongs into a file that the spec names."
    )


def test_a_spec_of_exactly_that_size_is_read() -> None:
    assert load_manifest(_padded(SPEC_LIMIT_BYTES)).job is not None


def test_what_counts_is_bytes_not_characters() -> None:
    long = {f"{number}": "\U0001f600" * 4000 for number in range(9)}
    assert len(json.dumps(long, ensure_ascii=False)) < SPEC_LIMIT_BYTES < _size(long)
    (problem,) = load_manifest(manifest(deepspeed=long)).errors
    assert problem.message.startswith("spec takes 141 KiB as JSON (deepspeed alone 141)")


def test_the_size_of_a_file_is_not_what_counts() -> None:
    spaced = json.dumps(_padded(SPEC_LIMIT_BYTES), indent=40)
    assert len(spaced) > SPEC_LIMIT_BYTES
    assert load_job(spaced, source="job.json").job is not None


@pytest.mark.parametrize(("values", "fits"), [(SPEC_LIMIT_VALUES, True), (SPEC_LIMIT_VALUES + 1, False)])
def test_values_are_counted_whatever_they_are(values: int, *, fits: bool) -> None:
    rows: list[Any] = [[{}, []] * 50 for _ in range(98)]
    # Keys of the spec, the block in it, its lists and what is in those.
    held = len(manifest()["spec"]) + 1 + 1 + len(rows) + 100 * len(rows)
    rows.append(["a"] * (values - held - 1))
    result = load_manifest(manifest(deepspeed={"rows": rows}))
    messages = [problem.message for problem in result.errors]
    assert messages == (
        [] if fits else ["spec holds more than 10000 values, which is the most that is read: shorten its lists."]
    )


TOO_LARGE: dict[str, Any] = {
    "bytes": {"deepspeed": {"a": "b" * 1_400_000}},
    "values": {"deepspeed": {"a": [[] for _ in range(20_000)]}},
    "levels": {"deepspeed": {"a": nested(2000)}},
    "no mapping": nested(2000),
}


@pytest.mark.parametrize("spec", TOO_LARGE.values(), ids=list(TOO_LARGE))
def test_nothing_else_is_done_with_what_is_too_large(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        pytest.fail("it is looked at")

    monkeypatch.setattr(load, "_without_nulls", refuse)
    monkeypatch.setattr(FineTuneJob, "model_validate", refuse)
    (problem,) = load_manifest({**manifest(), "spec": spec}).errors
    assert problem.path == "spec"
    assert problem.message.startswith("spec ")
    assert problem.message.endswith(".")


def test_what_is_no_json_is_for_the_models_to_refuse() -> None:
    assert size_fault({"a": {1, 2}}) is None
    assert size_fault("text") is None
    assert size_fault(None) is None


def test_every_single_field_fits_at_its_longest() -> None:
    """The bounds of single fields and that of the whole make sense together: no text is allowed that is never read."""
    for path, node in nodes(structural_schema()["properties"]["spec"]):
        # Six bytes is what a control character takes in JSON.
        assert 6 * node.get("maxLength", 0) < SPEC_LIMIT_BYTES, path
        if node.get("type") == "array" and "maxLength" in node["items"]:
            assert node["maxItems"] * node["items"]["maxLength"] < 3 * SPEC_LIMIT_BYTES, path
        assert node.get("maxItems", 0) < SPEC_LIMIT_VALUES, path


@pytest.mark.parametrize(
    "value",
    [[], [[]] * 50, [1.5, True, None, "a"] * 9, {f"{number}": "," * number for number in range(50)}, {"a": {"b": {}}}],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_no_text_of_few_values_is_taken_for_one_of_more(value: Any, indent: int | None) -> None:
    held = [value]
    for item in held:
        held.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
    assert not may_have_more_values(json.dumps(value, indent=indent), len(held))


@pytest.mark.parametrize("values", ["[]", "{}", "1", '""', '{"a":1}'])
def test_a_text_of_more_values_than_may_be_is_told_without_a_reader(values: str) -> None:
    assert may_have_more_values(f"[{','.join([values] * 400)}]", 100)


def test_what_stands_in_a_text_is_no_value() -> None:
    assert not may_have_more_values(json.dumps({"a": '[{,"\\' * 1000}), 2)
    assert not may_have_more_values('{"' + '\\"[' * 1000, 2)
    assert not may_have_more_values('{"a\\', 2)
