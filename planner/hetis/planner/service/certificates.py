"""The planner's certificate, and the authority of its clients' certificates, renewed without a restart."""

from __future__ import annotations

import ssl
from typing import Any

import grpc

from hetis.formats.errors import DocumentError, Problem
from hetis.formats.files import read_text
from hetis.planner.service.reloading import Reloaded
from hetis.planner.service.settings import TlsPart

_NO_PASSWORD = ""


class Certificates:
    """Server credentials that follow their files. Connections that stand keep the certificate they began with.

    Raises:
        DocumentError: the files cannot be used, with every problem.
    """

    def __init__(self, tls: TlsPart) -> None:
        paths = [tls.certificate, tls.key, *([tls.client_ca] if tls.client_ca is not None else [])]
        self.files = Reloaded("certificate", paths, lambda: _load(tls))
        self._asks_clients = tls.client_ca is not None
        self._told = self.files.version

    def credentials(self) -> grpc.ServerCredentials:
        newer: Any = self._newer  # may answer None, unlike what the stubs of grpc say
        return grpc.dynamic_ssl_server_credentials(
            self.files.value, newer, require_client_authentication=self._asks_clients
        )

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks before each handshake, in a thread of its own; None: nothing is new."""
        version, value = self.files.version, self.files.value
        if version == self._told:
            return None
        self._told = version
        return value


def _load(tls: TlsPart) -> grpc.ServerCertificateConfiguration:
    texts: dict[str, bytes] = {}
    problems: list[Problem] = []
    for path in filter(None, (tls.certificate, tls.key, tls.client_ca)):
        try:
            texts[path] = read_text(path).encode()
        except DocumentError as error:
            problems += error.problems
    if not problems:
        problems += _unusable(tls, texts)
    if problems:
        raise DocumentError(problems)
    authority = texts[tls.client_ca] if tls.client_ca is not None else None
    return grpc.ssl_server_certificate_configuration([(texts[tls.key], texts[tls.certificate])], authority)


def _unusable(tls: TlsPart, texts: dict[str, bytes]) -> list[Problem]:
    """What OpenSSL says against the files; gRPC would only refuse handshakes later."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    problems: list[Problem] = []
    if b"-----BEGIN CERTIFICATE-----" not in texts[tls.certificate]:
        problems.append(Problem(file=tls.certificate, message="holds no certificate in PEM form"))
    if b"PRIVATE KEY-----" not in texts[tls.key]:
        problems.append(Problem(file=tls.key, message="holds no private key in PEM form"))
    if not problems:
        try:
            context.load_cert_chain(tls.certificate, tls.key, password=lambda: _NO_PASSWORD)
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).replace("_", " ").lower()
            message = f"does not belong to the certificate {tls.certificate}, or is no key without password: {reason}"
            problems.append(Problem(file=tls.key, message=message))
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(cadata=texts[tls.client_ca].decode())
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error)
            message = f"holds no certificate authority in PEM form: {reason.replace('_', ' ').lower()}"
            problems.append(Problem(file=tls.client_ca, message=message))
    return problems
