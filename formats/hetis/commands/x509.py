"""What certificates say of themselves: until when they are valid, and for which hosts.

The standard library reads the dates of authorities only, and this does not justify a cryptography package.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME, _GENERALIZED_TIME, _VERSION, _EXTENSIONS = 0x17, 0x18, 0xA0, 0xA3
_DNS, _IP = 0x82, 0x87
_ALTERNATIVE_NAMES, _COMMON_NAME = b"\x55\x1d\x11", b"\x55\x04\x03"  # 2.5.29.17 and 2.5.4.3


def ends_of_certificates(pem: str) -> list[float]:
    """Return the expiry of each certificate in a PEM text as Unix time; unreadable certificates are left out."""
    return [end_s for _, end_s in validities(pem)]


def moment(unix_s: float) -> str:
    """Return a Unix time as messages show it."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")


def validities(pem: str) -> list[tuple[float, float]]:
    """Return the validity of each certificate in a PEM text, from and to, as Unix time, without unreadable ones."""
    found = list[tuple[float, float]]()
    for block in _CERTIFICATE.findall(pem):
        with suppress(ValueError, IndexError):
            found.append(_validity_of(ssl.PEM_cert_to_DER_cert(block)))
    return found


def names_of_certificate(pem: str) -> list[str]:
    """Return the hosts for which clients accept the first certificate of a PEM text; a ``*.`` stands for one label.

    They are the DNS names and addresses among its alternative names, or if it has none its common name.
    """
    block = _CERTIFICATE.search(pem)
    with suppress(ValueError, IndexError):
        fields = _fields_of(ssl.PEM_cert_to_DER_cert(block[0] if block else ""))
        for tag, extensions in fields:
            for _, extension in _contents(_contents(extensions)[0][1]) if tag == _EXTENSIONS else ():
                (_, kind), *_, (_, value) = _contents(extension)
                if kind == _ALTERNATIVE_NAMES and (found := _names_in(value)):
                    return found
        for _, part in _contents(fields[4][1]):
            (_, kind), (_, value) = _contents(_contents(part)[0][1])
            if kind == _COMMON_NAME:
                return [value.decode(errors="replace")]
    return []


def is_for_host(names: Iterable[str], host: str) -> bool:
    """Return whether a certificate with these names is for a host, by the rules of gRPC's clients."""
    with suppress(ValueError):
        return str(ip_address(host)) in names
    host = host.lower().rstrip(".")
    wildcard = f"*.{host.partition('.')[2]}"
    return any(name.lower().rstrip(".") in (host, wildcard) for name in names)


def _names_in(alternatives: bytes) -> list[str]:
    names = _contents(_contents(alternatives)[0][1])
    return [
        str(ip_address(value)) if tag == _IP else value.decode(errors="replace")
        for tag, value in names
        if tag in (_DNS, _IP)
    ]


def _fields_of(der: bytes) -> list[tuple[int, bytes]]:
    """Return the fields of TBSCertificate (RFC 5280) without the version, which is optional."""
    fields = _contents(_contents(_contents(der)[0][1])[0][1])
    return fields[1:] if fields[0][0] == _VERSION else fields


def _validity_of(der: bytes) -> tuple[float, float]:
    """Return `notBefore` and `notAfter`."""
    begin, end = _contents(_fields_of(der)[3][1])[:2]
    return _time_of(*begin), _time_of(*end)


def _time_of(tag: int, text: bytes) -> float:
    moment = text.decode("ascii")
    if tag == _UTC_TIME:
        moment = ("19" if moment[:2] >= "50" else "20") + moment
    elif tag != _GENERALIZED_TIME:
        raise ValueError("the validity is not a time")
    return datetime.strptime(moment, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _contents(der: bytes) -> list[tuple[int, bytes]]:
    """Return the tag and content of each element of a DER sequence, which is passed without its own header."""
    found, at = list[tuple[int, bytes]](), 0
    while at < len(der):
        tag, length, start = der[at], der[at + 1], at + 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[at + 2 : start], "big")
        found.append((tag, der[start : start + length]))
        at = start + length
    return found
