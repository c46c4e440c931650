"""A real S3 server on a folder of its own: versitygw, built from tests/tools.

What a store accepts, refuses and answers is decided by a server that strangers wrote, not by a double of ours.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.config import Config

from tests.processes import tethered
from tests.tools.build import binary

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

START_SECONDS = 30
ATTEMPTS = 3
"""Another process may take the free port between its choice and the server's start."""


@dataclass(frozen=True)
class S3Server:
    """A running server and the root account's credentials."""

    endpoint: str
    access_key: str
    secret_key: str
    log: Path

    def environment(self) -> dict[str, str]:
        """Variables with which any AWS client uses this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> S3Client:
        """A client of the test's own, independent of the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def new_bucket(self, *, public: bool = False) -> str:
        """Create an empty bucket and return its name. Anybody may read and list a public one."""
        name = f"test-{secrets.token_hex(6)}"
        client = self.client()
        client.create_bucket(Bucket=name)
        if public:
            arn = f"arn:aws:s3:::{name}"
            statements = [
                {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"{arn}/*"},
                {"Effect": "Allow", "Principal": "*", "Action": "s3:ListBucket", "Resource": arn},
            ]
            client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}))
        return name


@contextmanager
def run_s3_server(folder: Path, host: str = "127.0.0.1") -> Iterator[S3Server]:
    """Start a server whose buckets live under `folder`; it is stopped whatever happens.

    Args:
        folder: takes buckets and the log.
        host: an address of this machine, at which clients find it.

    Raises:
        RuntimeError: it did not come up; the text holds the end of its log, which stays in `folder`.
    """
    program = binary("versitygw")
    buckets, metadata = folder / "buckets", folder / "metadata"
    for path in (buckets, metadata):
        path.mkdir(parents=True)
    log = folder / "versitygw.log"
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    for attempt in range(ATTEMPTS):
        port = free_port()
        with log.open("ab") as output:
            process = subprocess.Popen(
                # The sidecar holds what would be extended attributes, which not every /tmp has.
                tethered([program, "--port", f"{host}:{port}", "posix", "--sidecar", metadata, buckets]),
                env={**os.environ, "ROOT_ACCESS_KEY": access_key, "ROOT_SECRET_KEY": secret_key},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            if _answers(process, host, port):
                yield S3Server(f"http://{host}:{port}", access_key, secret_key, log)
                return
            if attempt + 1 == ATTEMPTS:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"versitygw did not start, {log} ends with:\n{tail}")
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def isolate_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the credentials and settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Wait until the port accepts connections; False when the process ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False
