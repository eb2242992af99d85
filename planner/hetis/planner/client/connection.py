"""Connections to a planner: the address, the credentials, channel options, and the preparation of requests."""

from __future__ import annotations

import errno
import json
import os
import ssl
import uuid
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from hetis.commands.endpoints import is_loopback, is_sendable_token, split_endpoints
from hetis.formats.files import FileStamp, file_label, file_stamp, read_text
from hetis.v1 import document_pb2

DEFAULT_DEADLINE_S = 30.0  # the planner allows at most 60 s

# As documented in docs/api.md; a test compares the two.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": "hetis.v1.ClusterService"},
                {"service": "hetis.v1.ProfileService"},
                {"service": "hetis.v1.PlanService"},
                {"service": "hetis.v1.DispatchService"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def _kept_alive(every_ms: int, within_ms: int) -> tuple[tuple[str, str | int], ...]:
    """Return the options of a channel that pings its planner so often, and leaves it without an answer within a time.

    gRPC's default for the second of the two timeouts is a minute, and the longer one applies.
    """
    return (
        ("grpc.keepalive_time_ms", every_ms),
        ("grpc.keepalive_timeout_ms", within_ms),
        ("grpc.http2.ping_timeout_ms", within_ms),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.primary_user_agent", "hetis-client"),
    )


CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    *_kept_alive(30_000, 10_000),
)
# With several planners, the client itself retries at another one, and must detect a dead one soon.
SEVERAL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.enable_retries", 0),
    # As agents do: a planner that hangs, or whose machine is gone, closes no connection and so ends no watch.
    *_kept_alive(10_000, 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """The address of a planner and the caller's credentials.

    The connection is unencrypted only if requested, or if the address is local and no TLS setting is specified.

    Attributes:
        address: ``host:port``, or several separated by commas, among which the leader is found. A name with several
            records is several addresses.
        ca: file of the authorities that the planner's certificate must be signed by. None: the system's authorities.
        cert, key: files of the client's own certificate and key, for mTLS; both or neither. These three are read again
            once they change, so that certificates can be renewed; calls that have begun keep the old ones.
        token, token_file: a bearer token, or its file, which is read again for every call, so that it can be renewed;
            at most one of them.
        plaintext: no TLS. None: as described above.
    """

    address: str
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token: str | None = None
    token_file: Path | None = None
    plaintext: bool | None = None

    def __post_init__(self) -> None:
        for name in ("ca", "cert", "key", "token_file"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))  # settings of a client may be texts
        try:
            split_endpoints(self.address)
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"{self.address!r} is not an address of a planner, expected HOST:PORT") from None
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs its key, and a key its certificate")
        if self.token is not None and self.token_file is not None:
            raise ValueError("there is a token and a token file: one of them, please")
        if self.token is not None and not is_sendable_token(self.token):
            raise ValueError("the token cannot be sent: it must be printable ASCII without blanks")
        if self.plaintext and (self.ca or self.cert):
            raise ValueError("certificates are of no use without TLS")
        if self.is_plain and not self.is_local and (self.token or self.token_file):
            raise ValueError("a token is not sent without TLS to another machine")

    @property
    def addresses(self) -> tuple[str, ...]:
        return split_endpoints(self.address)

    @property
    def is_local(self) -> bool:
        return all(is_loopback(address) for address in self.addresses)

    @property
    def is_plain(self) -> bool:
        return self.plaintext if self.plaintext is not None else self.is_local and not (self.ca or self.cert)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return TLS credentials from the present contents of the files.

        Raises:
            OSError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca.read_bytes() if self.ca else None,
            private_key=self.key.read_bytes() if self.key else None,
            certificate_chain=self.cert.read_bytes() if self.cert else None,
        )

    @property
    def file_stamps(self) -> tuple[FileStamp | None, ...]:
        """Return a value that differs once a file of `channel_credentials` has changed."""
        return tuple(file_stamp(path) for path in (self.ca, self.cert, self.key) if path is not None)

    def renewed_credentials(self) -> grpc.ChannelCredentials | None:
        """Return TLS credentials from files that have changed, or None while they are missing or half-written."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            credentials = self.channel_credentials()
            if self.ca:
                context.load_verify_locations(self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key, password=lambda: "")  # fails if the key is not its own
        except OSError:  # among them ssl.SSLError
            return None
        return credentials

    def metadata(self) -> list[tuple[str, str]]:
        """Return the metadata of every call.

        Raises:
            OSError: the token file cannot be read, or holds no token.
        """
        token = self.token
        if self.token_file is not None:
            token = self.token_file.read_text(encoding="utf-8", errors="replace").strip()
            if not token or not is_sendable_token(token):
                raise OSError(errno.EINVAL, "holds no token", str(self.token_file))
        return [("authorization", f"Bearer {token}")] if token else []


HEALTH_METHOD = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}


def says_serving(response: bytes) -> bool:
    return response == _SERVING


M = TypeVar("M")


def prepared_request(request: M) -> M:
    """Return a copy of the request with a new ``request_id`` if it has that field and it is empty, else the request."""
    if not isinstance(request, Message) or "request_id" not in request.DESCRIPTOR.fields_by_name:
        return request
    if getattr(request, "request_id"):  # noqa: B009  # the type of the message is not known here
        return request
    named = deepcopy(request)
    setattr(named, "request_id", str(uuid.uuid4()))  # noqa: B010
    return named


_MAX_NAME = 255


def document_of_file(path: str | os.PathLike[str], kind: document_pb2.DocumentKind.ValueType) -> document_pb2.Document:
    """Return the document in a file; ``-`` is standard input.

    Raises:
        DocumentError: the file cannot be read.
    """
    return document_pb2.Document(
        kind=kind, content=read_text(path).encode("utf-8"), source_name=file_label(path)[-_MAX_NAME:]
    )
