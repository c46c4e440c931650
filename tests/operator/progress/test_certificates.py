"""Trainers trust the endpoint throughout, while authorities and certificates come and go."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from finetune_operator.progress.certificates import (
    AUTHORITY_LIFE,
    AUTHORITY_OVERLAP,
    LEAF_LIFE,
    Authorities,
    Authority,
)

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY = timedelta(days=1)


def trusts(bundle: bytes, leaf: bytes, host: str, at: datetime) -> bool:
    """Whether a strict client that trusts `bundle` accepts `leaf` for `host` at that time."""
    store = Store(x509.load_pem_x509_certificates(bundle))
    verifier = PolicyBuilder().store(store).time(at).build_server_verifier(x509.DNSName(host))
    try:
        verifier.verify(x509.load_pem_x509_certificate(leaf), [])
    except VerificationError:
        return False
    return True


def test_a_leaf_is_good_for_its_hosts_from_an_hour_before_until_its_end() -> None:
    authorities = Authorities().renewed(NOW)
    leaf = authorities.signer(NOW).leaf(["finetune-operator.finetune-system.svc", "10.0.0.1"], NOW)
    host = "finetune-operator.finetune-system.svc"
    for at, good in [
        (NOW - timedelta(hours=2), False),
        (NOW - timedelta(minutes=59), True),
        (NOW, True),
        (leaf.renew_at, True),
        (NOW + LEAF_LIFE - timedelta(seconds=1), True),
        (NOW + LEAF_LIFE + timedelta(seconds=1), False),
    ]:
        assert trusts(authorities.bundle, leaf.certificate, host, at) is good, at
    assert not trusts(authorities.bundle, leaf.certificate, "elsewhere.svc", NOW)
    assert not trusts(Authorities().renewed(NOW).bundle, leaf.certificate, host, NOW)
    assert NOW < leaf.renew_at < NOW + LEAF_LIFE


def test_an_authority_is_left_alone_until_a_tenth_of_its_life_is_left() -> None:
    authorities = Authorities().renewed(NOW)
    end = NOW + AUTHORITY_LIFE
    assert authorities.renewed(end - AUTHORITY_OVERLAP) is authorities
    renewed = authorities.renewed(end - AUTHORITY_OVERLAP + timedelta(seconds=1))
    assert len(renewed.members) == 2
    assert renewed.members[0] is authorities.members[0]
    assert renewed.renewed(end - DAY) is renewed


def test_a_job_that_knows_only_the_old_authority_is_served_until_that_one_ends() -> None:
    """A job starts just before the renewal and runs; its ConfigMap is never read again."""
    host = "localhost"
    authorities = Authorities().renewed(NOW)
    old_bundle = authorities.bundle
    at = NOW + AUTHORITY_LIFE - AUTHORITY_OVERLAP
    while at < NOW + AUTHORITY_LIFE - LEAF_LIFE:
        authorities = authorities.renewed(at)
        leaf = authorities.signer(at).leaf([host], at)
        assert trusts(old_bundle, leaf.certificate, host, at), at
        at += 30 * DAY
    assert len(authorities.members) == 2

    # From here on the successor signs, which every job of the last year has in its bundle.
    at = NOW + AUTHORITY_LIFE - LEAF_LIFE + DAY
    leaf = authorities.signer(at).leaf([host], at)
    assert trusts(authorities.bundle, leaf.certificate, host, leaf.renew_at)
    assert not trusts(old_bundle, leaf.certificate, host, at)

    after = authorities.renewed(NOW + AUTHORITY_LIFE + DAY)
    assert after.members == authorities.members[1:]


def test_what_is_written_can_be_read_and_its_text_for_people_holds_no_key() -> None:
    authorities = Authorities((Authority.create(NOW), Authority.create(NOW + DAY)))
    again = Authorities.parse(authorities.bundle, authorities.keys)
    assert (again.bundle, again.keys) == (authorities.bundle, authorities.keys)
    leaf = again.signer(NOW).leaf(["localhost"], NOW)
    assert trusts(authorities.bundle, leaf.certificate, "localhost", NOW)
    for text in (repr(authorities), str(authorities.members[0]), repr(leaf)):
        assert "PRIVATE" not in text
        assert "key" not in text.lower()


FIRST, SECOND = Authorities().renewed(NOW), Authorities().renewed(NOW)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda: (b"", FIRST.keys), "no certificates"),
        (lambda: (FIRST.bundle, b""), "1 certificates and 0 private keys"),
        (lambda: (FIRST.bundle + SECOND.bundle, FIRST.keys), "2 certificates and 1 private keys"),
        (lambda: (FIRST.bundle, SECOND.keys), "does not belong"),
        (lambda: (FIRST.bundle[:200], FIRST.keys), "no certificates"),
        (lambda: (FIRST.bundle, FIRST.keys.replace(b"M", b"N")), "no certificates and private keys"),
        (lambda: (b"\xff\xfe", b"\xff\xfe"), "no certificates"),
        (lambda: (FIRST.keys, FIRST.bundle), "no certificates"),
    ],
)
def test_a_damaged_pair_is_said_to_be_one(damage: Callable[[], tuple[bytes, bytes]], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Authorities.parse(*damage())
    assert "-----" not in str(caught.value)
