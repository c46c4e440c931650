"""What a real S3 server refuses becomes one sentence with what to do, and never shows a secret."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage import fetch_file, open_store
from finetune_trainer.storage.errors import human_bytes, require_space, s3_error, safe_address
from finetune_trainer.storage.s3 import connect
from tests.s3_server import S3Server, free_port, isolate_aws


def put(server: S3Server, bucket: str, key: str, data: bytes = b"{}\n") -> str:
    """Create an object past the code under test; returns its address."""
    server.client().put_object(Bucket=bucket, Key=key, Body=data)
    return f"s3://{bucket}/{key}"


def refused(uri: str, cache: Path) -> JobError:
    """The error of fetching `uri`."""
    with pytest.raises(JobError) as failure:
        fetch_file(uri, cache)
    return failure.value


def test_an_object_is_fetched_once_per_content(s3_environment: S3Server, tmp_path: Path) -> None:
    uri = put(s3_environment, s3_environment.new_bucket(), "a/train.jsonl", b"one")
    first = fetch_file(uri, tmp_path)
    assert first.name == "train.jsonl"
    assert first.read_bytes() == b"one"
    modified = first.stat().st_mtime_ns
    assert fetch_file(uri, tmp_path) == first
    assert first.stat().st_mtime_ns == modified
    put(s3_environment, uri.split("/")[2], "a/train.jsonl", b"two")
    assert fetch_file(uri, tmp_path).read_bytes() == b"two"
    assert first.read_bytes() == b"one"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_public_bucket_is_read_without_credentials(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate_aws(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
    bucket = s3_server.new_bucket(public=True)
    uri = put(s3_server, bucket, "train.jsonl", b"public")
    assert not connect().signed
    assert fetch_file(uri, tmp_path).read_bytes() == b"public"
    assert open_store(f"s3://{bucket}").list() == ["train.jsonl"]


def test_without_credentials_a_private_bucket_asks_for_them(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate_aws(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
    error = refused(put(s3_server, s3_server.new_bucket(), "train.jsonl"), tmp_path)
    assert error.reason is Reason.STORAGE_ACCESS_DENIED
    assert "no credentials were found" in error.message
    assert "AWS_ACCESS_KEY_ID" in error.message
    with pytest.raises(JobError, match="AWS_ACCESS_KEY_ID"):
        open_store(f"s3://{s3_server.new_bucket(public=True)}").write_bytes("a", b"")


@pytest.mark.parametrize(
    ("variable", "said"), [("AWS_ACCESS_KEY_ID", "XAdminUserNotFound"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNot")]
)
def test_wrong_keys_are_named_but_never_shown(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    uri = put(s3_environment, s3_environment.new_bucket(), "train.jsonl")
    monkeypatch.setenv(variable, "wrong-key-0123456789")
    error = refused(uri, tmp_path)
    assert error.reason is Reason.STORAGE_ACCESS_DENIED
    assert said in error.message
    for secret in ("wrong-key", s3_environment.access_key, s3_environment.secret_key):
        assert secret not in error.message


def test_credentials_that_a_public_bucket_refuses_do_not_stand_in_the_way(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One job reads a public bucket and writes to a store with keys of its own."""
    uri = put(s3_environment, s3_environment.new_bucket(public=True), "train.jsonl", b"public")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-another-store")
    with caplog.at_level(logging.WARNING):
        assert fetch_file(uri, tmp_path).read_bytes() == b"public"
    assert "read without credentials" in caplog.text


def test_a_missing_bucket_and_a_missing_object_are_told_apart(s3_environment: S3Server, tmp_path: Path) -> None:
    no_bucket = refused("s3://no-such-bucket-here/train.jsonl", tmp_path)
    no_object = refused(f"s3://{s3_environment.new_bucket()}/train.jsonl", tmp_path)
    assert (no_bucket.reason, no_object.reason) == (Reason.STORAGE_NOT_FOUND, Reason.STORAGE_NOT_FOUND)
    assert "no bucket 'no-such-bucket-here'" in no_bucket.message
    assert "train.jsonl" in no_object.message
    assert "bucket" not in no_object.message.replace("s3://", "")
    assert "add the file's key" in refused("s3://some-bucket", tmp_path).message


def test_an_unreachable_endpoint_is_retryable_and_named(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:password@{endpoint}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    error = refused("s3://bucket/train.jsonl", tmp_path)
    assert error.reason is Reason.STORAGE_UNAVAILABLE
    assert error.exit_code >= 128
    assert endpoint in error.message
    assert "password" not in error.message


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_ENDPOINT_URL_S3", "minio:9000", "https://"),
        ("AWS_MAX_ATTEMPTS", "many", "whole number"),
        ("AWS_REGION", "not a region", "us-east-1"),
    ],
)
def test_settings_that_cannot_be_read_are_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    isolate_aws(monkeypatch)
    monkeypatch.setenv(variable, value)
    with pytest.raises(JobError, match=said) as failure:
        connect()
    assert failure.value.reason is Reason.INVALID_SPEC
    assert variable in failure.value.message


def test_empty_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_aws(monkeypatch)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")
    connection = connect()
    assert (connection.endpoint, connection.signed) == (None, False)
    assert connection.client.meta.region_name == "us-east-1"
    assert connection.client.meta.endpoint_url == "https://s3.amazonaws.com"


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_both_region_variables_are_read(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    isolate_aws(monkeypatch)
    monkeypatch.setenv(variable, "eu-central-1")
    assert connect().client.meta.region_name == "eu-central-1"


def answer(code: str, status: int) -> ClientError:
    """An answer of a server as botocore raises it."""
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # type: ignore[typeddict-item]  # the other keys are never read


@pytest.mark.parametrize(
    ("error", "reason", "said"),
    [
        (answer("SlowDown", 503), Reason.STORAGE_UNAVAILABLE, "SlowDown"),
        (answer("InternalError", 500), Reason.STORAGE_UNAVAILABLE, "try again later"),
        (answer("ExpiredToken", 400), Reason.STORAGE_ACCESS_DENIED, "AWS_ACCESS_KEY_ID"),
        (answer("InvalidAccessKeyId", 403), Reason.STORAGE_ACCESS_DENIED, "AWS_ACCESS_KEY_ID"),
        (answer("InvalidRequest", 400), Reason.STORAGE_ACCESS_DENIED, "InvalidRequest"),
        (answer("403", 403), Reason.STORAGE_ACCESS_DENIED, "or it does not exist"),
        (answer("PermanentRedirect", 301), Reason.STORAGE_ACCESS_DENIED, "AWS_REGION"),
        (answer("RequestTimeTooSkewed", 403), Reason.STORAGE_UNAVAILABLE, "clock"),
        (answer("QuotaExceeded", 403), Reason.DISK_FULL, "no space left"),
        (EndpointConnectionError(endpoint_url="http://x"), Reason.STORAGE_UNAVAILABLE, "does not answer"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), Reason.DISK_FULL, "/data/x"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), Reason.STORAGE_ACCESS_DENIED, "permissions"),
        (OSError(errno.ESTALE, "Stale file handle", "/data/x"), Reason.STORAGE_UNAVAILABLE, "Stale file handle"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_answers_that_no_local_server_gives(error: Exception, reason: Reason, said: str) -> None:
    result = s3_error(error, "s3://bucket/key", endpoint=None, signed=True)
    assert result.reason is reason
    assert said in result.message


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:secret@s3.example.com:9000/path?X-Amz-Signature=abc", "https://s3.example.com:9000"),
        ("http://127.0.0.1:7070", "http://127.0.0.1:7070"),
    ],
)
def test_only_scheme_and_host_of_an_address_are_shown(address: str, shown: str) -> None:
    assert safe_address(address) == shown


def test_a_download_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "a model")
    with pytest.raises(JobError, match=r"a model needs 1152922 TB but .* free") as failure:
        require_space(tmp_path / "not" / "yet", 2**60, "a model")
    assert failure.value.reason is Reason.DISK_FULL


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (269_060_552, "269 MB"), (16_060_000_000, "16.1 GB")],
)
def test_sizes_have_a_unit(count: int, text: str) -> None:
    assert human_bytes(count) == text
