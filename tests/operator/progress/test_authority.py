"""All operators of an installation end with one authority, and nothing of somebody else's is overwritten."""

from __future__ import annotations

import asyncio
import base64
import logging
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.errors import Forbidden, SetupProblem, Unavailable, api_error
from finetune_operator.names import CA_KEY
from finetune_operator.progress.authority import SECRET_KEY, CertificateAuthority
from finetune_operator.progress.certificates import AUTHORITY_LIFE, Authorities
from tests.operator.progress.fake_cluster import FakeCluster

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
SECRET = ("finetune-system", "finetune-operator-tls")
CONFIG_MAP = ("team-a", "finetune-progress-ca")


class Clocks:
    """Wall clock and monotonic clock, both moved by hand."""

    def __init__(self) -> None:
        self.now = NOW
        self.seconds = 0.0

    def authority(self, cluster: FakeCluster) -> CertificateAuthority:
        return CertificateAuthority(
            cluster,
            namespace=SECRET[0],
            secret=SECRET[1],
            config_map=CONFIG_MAP[1],
            now=lambda: self.now,
            clock=lambda: self.seconds,
        )


def secret(data: dict[str, bytes] | None = None) -> dict[str, Any]:
    encoded = {key: base64.b64encode(value).decode() for key, value in (data or {}).items()}
    metadata = {"name": SECRET[1], "namespace": SECRET[0], "labels": {"theirs": "kept"}}
    return {"metadata": metadata, "type": "Opaque", **({"data": encoded} if data is not None else {})}


def cluster_with(body: dict[str, Any] | None) -> FakeCluster:
    cluster = FakeCluster()
    if body is not None:
        cluster.secrets[SECRET] = cluster.stored(body)
    return cluster


def stored_bundle(cluster: FakeCluster) -> bytes:
    return base64.b64decode(cluster.secrets[SECRET]["data"][CA_KEY])


@pytest.mark.parametrize("body", [None, secret(), secret({}), secret({CA_KEY: b""}), secret({"note": b"theirs"})])
def test_a_missing_or_empty_secret_is_filled_once_and_read_ever_after(body: dict[str, Any] | None) -> None:
    cluster = cluster_with(body)
    made = asyncio.run(Clocks().authority(cluster).load())
    assert stored_bundle(cluster) == made.bundle
    assert asyncio.run(Clocks().authority(cluster).load()).bundle == made.bundle
    assert sum(request in ("create_secret", "update_secret") for request in cluster.requests) == 1
    if body is not None:
        assert cluster.secrets[SECRET]["metadata"]["labels"] == {"theirs": "kept"}
        assert set(body.get("data", {})) <= set(cluster.secrets[SECRET]["data"])


@pytest.mark.parametrize("body", [None, secret()])
def test_two_operators_that_start_at_once_end_with_the_same_authority(body: dict[str, Any] | None) -> None:
    cluster = cluster_with(body)
    theirs = Authorities().renewed(NOW)
    written = secret({CA_KEY: theirs.bundle, SECRET_KEY: theirs.keys})

    def other_operator() -> None:
        cluster.secrets[SECRET] = cluster.stored(written)

    cluster.before_write = other_operator
    assert asyncio.run(Clocks().authority(cluster).load()).bundle == theirs.bundle
    assert stored_bundle(cluster) == theirs.bundle


def test_a_write_that_was_carried_out_without_an_answer_is_found_by_the_next_read() -> None:
    cluster = cluster_with(secret())
    update = cluster.update_secret

    async def answer_is_lost(namespace: str, body: dict[str, Any]) -> dict[str, Any]:
        await update(namespace, body)
        raise api_error(None, message="timeout")

    cluster.update_secret = answer_is_lost  # type: ignore[method-assign]
    authority = Clocks().authority(cluster)
    with pytest.raises(Unavailable):
        asyncio.run(authority.load())
    written = stored_bundle(cluster)
    assert asyncio.run(authority.load()).bundle == written


@pytest.mark.parametrize(
    "data",
    [
        {CA_KEY: b"garbage", SECRET_KEY: b"garbage"},
        {CA_KEY: Authorities().renewed(NOW).bundle},
        {SECRET_KEY: Authorities().renewed(NOW).keys},
    ],
)
def test_a_damaged_secret_is_reported_and_left_alone(data: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    cluster = cluster_with(secret(data))
    before = cluster.secrets[SECRET]
    with caplog.at_level(logging.DEBUG), pytest.raises(SetupProblem, match="finetune-operator-tls is damaged"):
        asyncio.run(Clocks().authority(cluster).load())
    assert cluster.secrets[SECRET] == before
    assert "PRIVATE" not in caplog.text


def test_a_secret_that_may_not_be_created_is_asked_for() -> None:
    cluster = FakeCluster()
    cluster.refused["create_secret"] = Forbidden(403, "Forbidden", "secrets is forbidden")
    with pytest.raises(SetupProblem, match="kubectl create secret generic finetune-operator-tls"):
        asyncio.run(Clocks().authority(cluster).load())


def test_a_secret_that_somebody_writes_all_the_time_is_reported() -> None:
    cluster = cluster_with(secret())

    def again() -> None:
        cluster.secrets[SECRET] = cluster.stored(secret())
        cluster.before_write = again

    cluster.before_write = again
    with pytest.raises(SetupProblem, match="again and again"):
        asyncio.run(Clocks().authority(cluster).load())


def test_a_renewed_authority_is_handed_out_beside_the_old_one_at_once() -> None:
    cluster, clocks = cluster_with(secret()), Clocks()
    authority = clocks.authority(cluster)
    asyncio.run(authority.ensure_ca(CONFIG_MAP[0]))
    old = stored_bundle(cluster)

    clocks.now = NOW + AUTHORITY_LIFE * 0.95
    asyncio.run(authority.load())
    asyncio.run(authority.ensure_ca(CONFIG_MAP[0]))
    bundle = cluster.config_maps[CONFIG_MAP]["data"][CA_KEY].encode()
    assert bundle == stored_bundle(cluster)
    assert bundle.startswith(old)
    assert bundle.count(b"BEGIN CERTIFICATE") == 2
