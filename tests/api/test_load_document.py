"""Text to plain data: scalars as kubectl reads them, and one sentence for everything that is no job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.document import SIZE_LIMIT_BYTES, DocumentError, decode, parse_mapping, parse_value
from finetune_api.load import load_job, load_job_file

# What sigs.k8s.io/yaml, which kubectl uses, makes of each scalar.
SCALARS: list[tuple[str, Any]] = [
    ("1e-4", 0.0001),
    ("1E-4", 0.0001),
    ("5e-6", 0.000005),
    ("1e3", 1000),
    ("+1e2", 100),
    (".5", 0.5),
    ("1.", 1),
    ("1_000", 1000),
    ("014", 12),
    ("0o14", 12),
    ("08", 8),
    ("0x1F", 31),
    ("0b11", 3),
    ("1:30", "1:30"),
    ("1:30.5", "1:30.5"),
    ("2024-01-01", "2024-01-01"),
    ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
    ("y", True),
    ("off", False),
    ("tRue", "tRue"),
    ("~", None),
    ("=", "="),
    ("'5'", "5"),
    ("!!str 5", "5"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_a_scalar_is_what_kubectl_takes_it_for(text: str, value: Any) -> None:
    read = parse_value(f"a: {text}", "job.yaml")["a"]
    assert read == value
    assert isinstance(read, bool) == isinstance(value, bool)


REFUSED = [
    ("", "job.yaml is empty"),
    ("# only a comment\n---\n", "job.yaml is empty"),
    ("- a\n- b\n", "holds a list"),
    ("just text", "holds a single value"),
    ("a: [1", r"line 1, column 6"),
    ("a: 1\nb:\n\tc: 2\n", r"line 3, column 1: .*spaces, not tabs"),
    ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: the key 'a' was already given on line 1"),
    ("x: {a: 1, a: 2}", "the key 'a' was already given"),
    ("a: 1\n---\nb: 2\n", "holds 2 documents"),
    ("? [a]\n: 1\n", "a key must be a single text"),
    ("a: !!python/name:os.system x", "the tag .* has no meaning here"),
    ("a: !!binary aGk=", "has no meaning here"),
    ("a: !!bool maybe", "cannot be read"),
    ("a: 0x", None),
    ("a: .inf", "no finite number"),
    ("a: 1e400", "no finite number"),
    ("a: " + "9" * 5000, "cannot be read"),
    ("a: \x01", "line 1 holds a control character"),
    ("a: *b", "undefined alias"),
    ("a: &a [*a]", "an alias .* that it is part of"),
    ("a: &a {b: *a}", "an alias .* that it is part of"),
    ("a: " + "[" * 5000, "nested too deeply"),
    ("a: " + "[" * 200 + "]" * 200, "nested too deeply"),
    ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
    ('{"a": NaN}', "NaN is no finite number"),
    ('{"a": 1e400}', "1e400 is no finite number"),
    ('{"a": ' + "[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "part"), [case for case in REFUSED if case[1]])
def test_what_is_no_job_gets_one_sentence(text: str, part: str) -> None:
    result = load_job(text, source="job.yaml")
    assert result.job is None
    (problem,) = result.errors
    assert problem.path == ""
    assert re.search(part, problem.message)
    assert problem.message.startswith("job.yaml ")
    assert problem.message.endswith((".", "?"))
    assert "\n" not in problem.message


@pytest.mark.parametrize("brackets", ["[" * 8000, ("[" * 120 + "]" * 120 + ",") * 4, "{" * 900, "[{" * 500])
def test_open_brackets_are_read_to_a_depth_only(brackets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each token PyYAML looks at all that are open, so 8 KiB of them would take a second."""
    tokens: list[int] = []
    fetch = yaml.SafeLoader.fetch_more_tokens

    def noted(loader: yaml.SafeLoader) -> None:
        tokens.append(loader.flow_level)
        fetch(loader)

    monkeypatch.setattr(yaml.SafeLoader, "fetch_more_tokens", noted)
    (problem,) = load_job("a: " + brackets, source="job.yaml").errors
    assert problem.message == "job.yaml is nested too deeply to be a job."
    assert len(tokens) < 150


def test_who_has_little_patience_reads_short_yaml_alone() -> None:
    assert load_job("model_id: a/b", source="job.yaml", patience=10).errors[0].path == "train_path"
    (problem,) = load_job("model_id: a/b\ntrain_path: c", source="job.yaml", patience=5).errors
    assert problem.message == (
        "job.yaml is not YAML that can be read: line 2, column 12: there is more than is read of YAML here."
    )
    # What is in brackets counts more, since it takes longer.
    assert "model_id" in load_job("a: 1, 2, 3, 4", source="job.yaml", patience=10).errors[0].message
    (problem,) = load_job("a: [1, 2, 3, 4]", source="job.yaml", patience=10).errors
    assert "there is more than is read of YAML here" in problem.message
    aliases = "a: &a [1, 1, 1]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]"
    (problem,) = load_job(aliases, source="job.yaml", patience=80).errors
    assert problem.message == "job.yaml has more than 80 values once its aliases (*) are written out."


def test_json_in_a_json_file_is_reported_as_json() -> None:
    (problem,) = load_job('{"a": \n 1,}', source="job.json").errors
    assert problem.message.startswith("job.json is not JSON: line 2, column")


def test_json_with_tabs_is_read() -> None:
    assert parse_mapping('{\n\t"a": {"b": [1, 2.5, "x", null]}}', "job.json") == {"a": {"b": [1, 2.5, "x", None]}}


def test_aliases_and_merge_keys_are_read() -> None:
    text = "base: &base {a: 1, b: 2}\nuse: *base\nmerged: {<<: *base, b: 3}\n"
    expected = {"base": {"a": 1, "b": 2}, "use": {"a": 1, "b": 2}, "merged": {"a": 1, "b": 3}}
    assert parse_mapping(text, "job.yaml") == expected


def test_aliases_that_grow_to_billions_of_values_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(DocumentError, match="more than 100000 values"):
        parse_mapping("\n".join(lines), "job.yaml")


def test_keys_are_text() -> None:
    assert parse_mapping("1: a\ntrue: b\n", "job.yaml") == {"1": "a", "true": "b"}


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert decode(b"\xef\xbb\xbfa: 1", "job.yaml") == "a: 1"


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"a: 1\nb: \xff\n", "not UTF-8 text (line 2)"),
        ("a: 1".encode("utf-16"), "not UTF-8 text (line 1)"),
        (b"a" * (SIZE_LIMIT_BYTES + 1), "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_text_gets_one_sentence(tmp_path: Path, data: bytes, part: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(data)
    (problem,) = load_job_file(file).errors
    assert part in problem.message


def test_a_missing_file_and_a_folder_get_one_sentence(tmp_path: Path) -> None:
    (missing,) = load_job_file(tmp_path / "none.yaml").errors
    (folder,) = load_job_file(tmp_path).errors
    assert missing.message == f"{tmp_path / 'none.yaml'} does not exist: check the path."
    assert folder.message == f"{tmp_path} is a folder: name the job's file in it."


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), _PLAIN, min_size=1, max_size=4))
def test_what_was_written_as_yaml_is_read_back(value: dict[str, Any]) -> None:
    assert parse_mapping(yaml.safe_dump(value, default_style='"'), "job.yaml") == value


@given(st.text())
def test_no_text_raises_anything(text: str) -> None:
    result = load_job(text, source="job.yaml")
    assert result.job is None
    assert result.errors
