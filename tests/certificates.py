"""Certificates made for a test: an authority, and certificates that it signs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates that are valid for a day."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self._certificate = _signed(self._name, self._key.public_key(), self._name, self._key, is_authority=True)

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def server(
        self, name: str = "localhost", *, since: datetime | None = None, until: datetime | None = None
    ) -> Signed:
        """``since``: start of its validity; None: an hour ago. ``until``: its end; None: in a day."""
        alternatives = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return self._sign(name, alternatives, since=since, until=until)

    def client(self, *uris: str, until: datetime | None = None) -> Signed:
        return self._sign("client", [x509.UniformResourceIdentifier(uri) for uri in uris], until=until)

    def server_for(self, *names: str, common_name: str = "planner") -> Signed:
        """``names``: DNS names and IP addresses; without any, the certificate has only its common name."""
        return self._sign(common_name, [_alternative(name) for name in names])

    def client_with_dns(self, name: str) -> Signed:
        return self._sign("client", [x509.DNSName(name)])

    def _sign(
        self,
        name: str,
        alternatives: list[x509.GeneralName],
        *,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Signed:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed(
            _name(name), key.public_key(), self._name, self._key, alternatives=alternatives, since=since, until=until
        )
        return Signed(
            certificate=certificate.public_bytes(serialization.Encoding.PEM),
            key=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )


def write(folder: Path, signed: Signed, *, name: str = "planner") -> tuple[str, str]:
    """Return the paths of certificate and key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(signed.certificate)
    key.write_bytes(signed.key)
    key.chmod(0o600)
    return str(certificate), str(key)


def _alternative(name: str) -> x509.GeneralName:
    if name.startswith("spiffe:"):
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _signed(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    *,
    alternatives: list[x509.GeneralName] | None = None,
    is_authority: bool = False,
    since: datetime | None = None,
    until: datetime | None = None,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(since or now - timedelta(hours=1))
        .not_valid_after(until or now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(key, hashes.SHA256())
