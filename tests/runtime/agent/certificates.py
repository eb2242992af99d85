"""An authority whose certificates are files, as agents read them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from tests.certificates import Authority, write


@dataclass(frozen=True, slots=True)
class Pair:
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path


class CertificateAuthority:
    """Signs for names on the loopback."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._authority = folder, Authority(name)
        self.cert = folder / f"{name}.pem"
        self.cert.write_bytes(self._authority.pem)

    def sign(self, name: str, *, has_expired: bool = False) -> Pair:
        until = datetime.now(UTC) - timedelta(minutes=1) if has_expired else None
        cert, key = write(self._folder, self._authority.server(name, until=until), name=name)
        return Pair(Path(cert), Path(key))

    def server(self, name: str, *, asks_clients: bool, has_expired: bool = False) -> grpc.ServerCredentials:
        """Credentials of a server; with ``asks_clients``, clients need a certificate of this authority."""
        pair = self.sign(name, has_expired=has_expired)
        return grpc.ssl_server_credentials(
            [(pair.key.read_bytes(), pair.cert.read_bytes())],
            root_certificates=self.cert.read_bytes() if asks_clients else None,
            require_client_auth=asks_clients,
        )
