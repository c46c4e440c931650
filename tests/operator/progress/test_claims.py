"""What cannot be a pod's token for us is told by itself, and every token of a real API server is let through."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.progress.claims import CLOCK_TOLERANCE, Claims, read_claims
from tests.operator.progress.fake_cluster import jwt, token_of, worker

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
AUDIENCE = "finetune-operator"
POD = worker()
NAME = POD["metadata"]["name"]

NO_CLAIMS: list[Any] = [None, [], 1, "text", {}, {"aud": AUDIENCE}]
NO_AUDIENCES: list[Any] = [None, [], ["https://kubernetes.default.svc"], "other", 1, {}]
NO_ENDS: list[Any] = [None, "never", [], 0, -1, True]


def read(token: str) -> Claims | None:
    return read_claims(token, AUDIENCE, NOW)


@pytest.mark.parametrize("audiences", [["finetune-operator"], ["other", "finetune-operator"], "finetune-operator"])
def test_a_pods_token_names_its_pod_and_its_end(audiences: Any) -> None:
    in_an_hour = NOW.timestamp() + 3600
    assert read(token_of(POD, aud=audiences, exp=in_an_hour)) == Claims("team-a", NAME, in_an_hour)


def test_a_token_of_a_service_account_alone_names_no_pod() -> None:
    assert read(token_of(None)) == Claims("team-a", None, 4_000_000_000)


def test_a_token_that_ended_by_our_clock_is_still_one_by_a_clock_that_is_a_little_behind() -> None:
    ended = NOW - CLOCK_TOLERANCE
    assert read(token_of(POD, exp=ended.timestamp() + 1)) is not None
    assert read(token_of(POD, exp=ended.timestamp() - 1)) is None
    assert read(token_of(POD, exp=(NOW - timedelta(days=1)).timestamp())) is None


@pytest.mark.parametrize(
    "token",
    [
        "",
        "garbage",
        "..",
        "a.b.c",
        "a.b",
        f"{token_of(POD)}.more",
        f"{token_of(POD)}\udcff",
        token_of(POD).replace(".", ""),
        *(jwt(claims) for claims in NO_CLAIMS),
        "a." + base64.urlsafe_b64encode(b"[" * 100_000).decode() + ".c",
        "a." + base64.urlsafe_b64encode(b'{"exp":' + b"9" * 10_000 + b"}").decode() + ".c",
        "a." + base64.urlsafe_b64encode(b"\xff\xfe{}").decode() + ".c",
        "ä.ö.ü",
        *(token_of(POD, aud=audience) for audience in NO_AUDIENCES),
        *(token_of(POD, exp=end) for end in NO_ENDS),
        *(token_of(POD, sub=subject) for subject in (None, "admin", "system:serviceaccount:team-b:default", 1)),
        token_of(POD, **{"kubernetes.io": None}),
        token_of(POD, **{"kubernetes.io": {"namespace": None}}),
        token_of(POD, **{"kubernetes.io": []}),
    ],
)
def test_what_cannot_be_a_token_for_us_is_none(token: str) -> None:
    assert read(token) is None


@pytest.mark.parametrize("bound", [None, [], {}, {"name": None}, {"name": 1}, "pod"])
def test_a_pod_that_is_not_named_is_no_pod(bound: Any) -> None:
    claims = read(token_of(POD, **{"kubernetes.io": {"namespace": "team-a", "pod": bound}}))
    assert claims == Claims("team-a", None, 4_000_000_000)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.text() | ANY_JSON.map(jwt) | st.binary().map(lambda data: f"a.{base64.urlsafe_b64encode(data).decode()}.c"))
def test_nothing_that_is_sent_makes_it_fail(token: str) -> None:
    assert read(token) is None


@given(st.sampled_from(["aud", "exp", "sub", "kubernetes.io"]), ANY_JSON)
def test_no_claim_of_whatever_kind_makes_it_fail(name: str, value: Any) -> None:
    claims = read(token_of(POD, **{name: value}))
    assert claims is None or claims.namespace == "team-a"
