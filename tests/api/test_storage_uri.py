"""Every form of address is taken apart one way, and what is no address is refused with the forms that are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.storage_uri import READABLE, Scheme, StorageUri, UriError, parse, parse_output

READ: list[tuple[str, StorageUri, str]] = [
    ("s3://bucket/a/b.jsonl", StorageUri(Scheme.S3, "bucket", "a/b.jsonl"), "s3://bucket/a/b.jsonl"),
    ("s3://bucket/a/", StorageUri(Scheme.S3, "bucket", "a"), "s3://bucket/a"),
    ("s3://bucket", StorageUri(Scheme.S3, "bucket", ""), "s3://bucket"),
    ("s3://bucket/", StorageUri(Scheme.S3, "bucket", ""), "s3://bucket"),
    ("S3://bucket/Key", StorageUri(Scheme.S3, "bucket", "Key"), "s3://bucket/Key"),
    ("s3://b.u-c_k.1/a b/ü?x#y=1", StorageUri(Scheme.S3, "b.u-c_k.1", "a b/ü?x#y=1"), "s3://b.u-c_k.1/a b/ü?x#y=1"),
    ("s3://bucket/a//b", StorageUri(Scheme.S3, "bucket", "a//b"), "s3://bucket/a//b"),
    ("s3://bucket/a/../b", StorageUri(Scheme.S3, "bucket", "a/../b"), "s3://bucket/a/../b"),
    ("pvc://claim/a/b", StorageUri(Scheme.PVC, "claim", "a/b"), "pvc://claim/a/b"),
    ("pvc://my.claim-1", StorageUri(Scheme.PVC, "my.claim-1", ""), "pvc://my.claim-1"),
    ("pvc://c/..a/b..", StorageUri(Scheme.PVC, "c", "..a/b.."), "pvc://c/..a/b.."),
    ("file:///a/b", StorageUri(Scheme.LOCAL, "", "/a/b"), "/a/b"),
    ("file:///a/b/", StorageUri(Scheme.LOCAL, "", "/a/b"), "/a/b"),
    ("file:///", StorageUri(Scheme.LOCAL, "", "/"), "/"),
    ("/a/b", StorageUri(Scheme.LOCAL, "", "/a/b"), "/a/b"),
    ("/", StorageUri(Scheme.LOCAL, "", "/"), "/"),
    ("a/b/", StorageUri(Scheme.LOCAL, "", "a/b"), "a/b"),
    ("../a b.jsonl", StorageUri(Scheme.LOCAL, "", "../a b.jsonl"), "../a b.jsonl"),
    ("a:b", StorageUri(Scheme.LOCAL, "", "a:b"), "a:b"),
    (
        "hf://datasets/owner/name/train.jsonl",
        StorageUri(Scheme.HUB_DATASET, "owner/name", "train.jsonl"),
        "hf://datasets/owner/name/train.jsonl",
    ),
    (
        "hf://datasets/owner/na-me.v2/a/train",
        StorageUri(Scheme.HUB_DATASET, "owner/na-me.v2", "a/train"),
        "hf://datasets/owner/na-me.v2/a/train",
    ),
    (
        "hf://datasets/owner/name@v1.0/a/train.jsonl",
        StorageUri(Scheme.HUB_DATASET, "owner/name", "a/train.jsonl", "v1.0"),
        "hf://datasets/owner/name@v1.0/a/train.jsonl",
    ),
    (
        "hf://datasets/squad/train.jsonl",
        StorageUri(Scheme.HUB_DATASET, "squad", "train.jsonl"),
        "hf://datasets/squad/train.jsonl",
    ),
    (
        "hf://datasets/squad@main/train.jsonl",
        StorageUri(Scheme.HUB_DATASET, "squad", "train.jsonl", "main"),
        "hf://datasets/squad@main/train.jsonl",
    ),
]


@pytest.mark.parametrize(("uri", "parsed", "written"), READ, ids=[case[0] for case in READ])
def test_an_address_is_taken_apart_and_written_again(uri: str, parsed: StorageUri, written: str) -> None:
    assert parse(uri) == parsed
    assert str(parsed) == written
    assert parse(written) == parsed


NO_SPACES = "is not an address: write it without spaces around it or control characters."
HUB_FORM = "does not have the form hf://datasets/owner/name/file.jsonl."


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("", f"'' {NO_SPACES}"),
        (" s3://bucket/key", f"' s3://bucket/key' {NO_SPACES}"),
        ("s3://bucket/key\n", f"'s3://bucket/key\\n' {NO_SPACES}"),
        ("a\tb", f"'a\\tb' {NO_SPACES}"),
        ("a\x00b", f"'a\\x00b' {NO_SPACES}"),
        ("gs://bucket/key", f"gs:// addresses are not read: copy it to one of {READABLE}."),
        ("https://a.example/b", f"https:// addresses are not read: copy it to one of {READABLE}."),
        ("S3A://bucket/key", f"s3a:// addresses are not read: copy it to one of {READABLE}."),
        ("abfss://c@a/key", f"abfss:// addresses are not read: copy it to one of {READABLE}."),
        ("s3://", "'s3://' does not have the form s3://bucket/key."),
        ("s3:///key", "'s3:///key' does not have the form s3://bucket/key."),
        ("s3://b/key", "'s3://b/key' does not have the form s3://bucket/key."),
        ("s3://user:word@bucket/key", "'s3://user:word@bucket/key' does not have the form s3://bucket/key."),
        (f"s3://{'b' * 64}/key", f"'s3://{'b' * 64}/key' does not have the form s3://bucket/key."),
        ("pvc://", "'pvc://' does not have the form pvc://claim/path."),
        ("pvc://Claim/a", "'pvc://Claim/a' does not have the form pvc://claim/path."),
        ("pvc://claim-/a", "'pvc://claim-/a' does not have the form pvc://claim/path."),
        ("pvc://claim/a/../../b", "'pvc://claim/a/../../b' leaves its volume: write the path without '..'."),
        ("pvc://claim/..", "'pvc://claim/..' leaves its volume: write the path without '..'."),
        ("file://a/b", "'file://a/b' names no absolute path: write file:///path or the plain path."),
        ("file://", "'file://' names no absolute path: write file:///path or the plain path."),
        ("hf://owner/name", f"'hf://owner/name' {HUB_FORM}"),
        ("hf://models/owner/name/file.bin", f"'hf://models/owner/name/file.bin' {HUB_FORM}"),
        ("hf://datasets", f"'hf://datasets' {HUB_FORM}"),
        ("hf://datasets/owner", f"'hf://datasets/owner' {HUB_FORM}"),
        ("hf://datasets/owner/name", f"'hf://datasets/owner/name' {HUB_FORM}"),
        ("hf://datasets/owner/name/", f"'hf://datasets/owner/name/' {HUB_FORM}"),
        ("hf://datasets/owner/name//", f"'hf://datasets/owner/name//' {HUB_FORM}"),
        ("hf://datasets/owner/name@main", f"'hf://datasets/owner/name@main' {HUB_FORM}"),
    ],
)
def test_what_is_no_address_is_refused_with_the_form_it_should_have(uri: str, sentence: str) -> None:
    with pytest.raises(UriError) as caught:
        parse(uri)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("s3://bucket/a", ["b", "c.json"], "s3://bucket/a/b/c.json"),
        ("s3://bucket", ["b"], "s3://bucket/b"),
        ("pvc://claim", ["b"], "pvc://claim/b"),
        ("/", ["b"], "/b"),
        ("a", ["b"], "a/b"),
        ("hf://datasets/o/n@v1/a", ["b.jsonl"], "hf://datasets/o/n@v1/a/b.jsonl"),
    ],
)
def test_an_address_below_another(base: str, parts: list[str], joined: str) -> None:
    assert str(parse(base).join(*parts)) == joined


_PREFIXES = st.sampled_from(
    ["", "/", "s3://", "s3://bucket/", "pvc://claim/", "file:///", "hf://datasets/", "hf://datasets/o/n/", "gs://x/"]
)


@given(_PREFIXES, st.text("ab.-_@:/ ü\t", max_size=12) | st.text(max_size=12))
def test_whatever_is_written_is_read_or_refused_in_a_sentence(prefix: str, rest: str) -> None:
    parsed = read_or_sentence(prefix + rest)
    if isinstance(parsed, str):
        assert parsed.endswith(".")
    else:
        assert parsed.path == "/" or not parsed.path.endswith("/")
        assert bool(parsed.container) == (parsed.scheme is not Scheme.LOCAL)


@given(
    st.sampled_from(["", "/", "s3://bucket/", "pvc://claim/", "hf://datasets/o/n/"]), st.text("ab.-_@:/", max_size=9)
)
def test_an_address_that_was_written_is_read_as_the_same(prefix: str, rest: str) -> None:
    parsed = read_or_sentence(prefix + rest)
    if isinstance(parsed, StorageUri):
        assert parse(str(parsed)) == parsed


def read_or_sentence(uri: str) -> StorageUri | str:
    """The address taken apart, or why it is none."""
    try:
        return parse(uri)
    except UriError as error:
        return str(error)


@pytest.mark.parametrize(
    ("text", "repository", "branch"),
    [
        ("hf://owner/name", "owner/name", None),
        ("hf://owner/na-me.v2/", "owner/na-me.v2", None),
        ("hf://owner/name@v1.0", "owner/name", "v1.0"),
    ],
)
def test_results_go_to_a_model_repository(text: str, repository: str, branch: str | None) -> None:
    found = parse_output(text)
    assert (found.scheme, found.container, found.path, found.revision) == (Scheme.HUB_MODEL, repository, "", branch)
    assert parse_output(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "hf://name",
        "hf://owner/name/adapter",
        "hf://datasets/owner",
        "hf://datasets/owner/name/file.jsonl",
        "hf://spaces/owner",
        "hf://owner/name@",
        "hf://owner/name@a/b",
        "hf://",
    ],
)
def test_what_is_no_model_repository_holds_no_results(text: str) -> None:
    with pytest.raises(UriError, match="holds no results: write hf://owner/name"):
        parse_output(text)


@pytest.mark.parametrize("text", ["s3://bucket/jobs", "pvc://claim/jobs", "/mnt/out", "out"])
def test_other_outputs_are_read_as_everything_else(text: str) -> None:
    assert parse_output(text) == parse(text)
