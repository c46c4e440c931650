"""Makes and reads the certificates of the progress endpoint: pure, so that a test can let ten years pass.

Trainers trust an authority for as long as their job lasts, so authorities live for years and overlap, while the
certificate that the server shows lives for days and only in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFE = timedelta(days=3650)
AUTHORITY_OVERLAP = AUTHORITY_LIFE / 10
"""An authority with less left gets a successor, which is handed out that long before it signs."""
LEAF_LIFE = timedelta(days=30)
LEAF_RENEWAL = LEAF_LIFE * 2 / 3
"""Age at which a server's certificate is replaced."""
END_OF_KEY = b"-----END PRIVATE KEY-----"
CLOCK_SKEW = timedelta(hours=1)
"""How far the clock of a pod's node may be behind ours."""


@dataclass(frozen=True)
class Authority:
    """A certificate authority with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        """Without the key, whatever logs it."""
        return f"Authority({self.certificate.subject.rfc4514_string()})"

    @property
    def expires(self) -> datetime:
        """End of its life, UTC."""
        return self.certificate.not_valid_after_utc

    @classmethod
    def create(cls, now: datetime) -> Self:
        """A new one, valid from `now` (UTC) for AUTHORITY_LIFE."""
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        # Authorities that overlap have different names, so that no client can take one for the other.
        name = _name(f"finetune-operator progress {serial:x}"[:64])
        certificate = (
            _builder(name, name, key, serial, now, AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    def leaf(self, hosts: Iterable[str], now: datetime) -> Leaf:
        """A server's certificate for `hosts`, DNS names or IP addresses, valid from `now` (UTC) for LEAF_LIFE."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(
                _name("finetune-operator"),
                self.certificate.subject,
                key,
                x509.random_serial_number(),
                now,
                LEAF_LIFE,
                issuer_key=self.key,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Leaf(_pem(certificate), _key_pem(key), now + LEAF_RENEWAL)


@dataclass(frozen=True)
class Leaf:
    """A server's certificate and private key, as PEM."""

    certificate: bytes
    key: bytes
    renew_at: datetime

    def __repr__(self) -> str:
        """Without the key, whatever logs it."""
        return f"Leaf(renew_at={self.renew_at.isoformat()})"


@dataclass(frozen=True)
class Authorities:
    """One authority, or an old one and its successors; the oldest first. Empty only until `renewed`."""

    members: tuple[Authority, ...] = ()

    @classmethod
    def parse(cls, certificates: bytes, keys: bytes) -> Self:
        """From the PEM of all certificates and of all keys, in the same order.

        Raises:
            ValueError: this is no such pair; the message never quotes it.
        """
        try:
            parsed = x509.load_pem_x509_certificates(certificates)
            parts = keys.split(END_OF_KEY)[:-1]
            loaded = [serialization.load_pem_private_key(part + END_OF_KEY, password=None) for part in parts]
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ValueError("it holds no certificates and private keys in PEM") from error
        if len(parsed) != len(loaded):
            raise ValueError(f"it holds {len(parsed)} certificates and {len(loaded)} private keys")
        members = []
        for certificate, key in zip(parsed, loaded, strict=True):
            if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
                raise ValueError("a private key does not belong to its certificate")
            members.append(Authority(certificate, key))
        return cls(tuple(members))

    @property
    def bundle(self) -> bytes:
        """PEM of all certificates: what a trainer trusts."""
        return b"".join(_pem(member.certificate) for member in self.members)

    @property
    def keys(self) -> bytes:
        """PEM of all private keys, in the order of `bundle`."""
        return b"".join(_key_pem(member.key) for member in self.members)

    def signer(self, now: datetime) -> Authority:
        """The one to sign with: the oldest that outlives a new leaf, since running jobs may know no younger one."""
        lasting = [member for member in self.members if member.expires > now + LEAF_LIFE]
        return lasting[0] if lasting else self.members[-1]

    def renewed(self, now: datetime) -> Self:
        """Without the expired, and with a successor where the youngest has less than AUTHORITY_OVERLAP left."""
        valid = tuple(member for member in self.members if member.expires > now)
        if not valid or valid[-1].expires - now < AUTHORITY_OVERLAP:
            valid += (Authority.create(now),)
        return self if valid == self.members else type(self)(valid)


def valid_certificates(pem: bytes, now: datetime) -> bytes:
    """The certificates in `pem` that have not expired, as PEM; empty when it holds anything that is none."""
    try:
        found = x509.load_pem_x509_certificates(pem)
        return b"".join(_pem(certificate) for certificate in found if certificate.not_valid_after_utc > now)
    except (ValueError, x509.InvalidVersion):
        return b""


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    serial: int,
    now: datetime,
    life: timedelta,
    issuer_key: ec.EllipticCurvePrivateKey | None = None,
) -> x509.CertificateBuilder:
    public, signing = key.public_key(), (issuer_key or key).public_key()
    return (
        x509.CertificateBuilder(issuer, subject, public, serial, now - CLOCK_SKEW, now + life)
        # Both identifiers are wanted by clients that check as strictly as Python 3.13 does.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
