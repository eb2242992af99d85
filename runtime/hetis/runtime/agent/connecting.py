"""How an agent reaches its planner: address, certificates, token, and how long it waits between attempts."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from hetis.formats.endpoints import Endpoint, LeaderSearch, host_of, is_loopback, split_endpoints

LEAST_WAIT_S, MOST_WAIT_S = 0.5, 30.0
MOST_WAIT_FOR_LEADER_S = 4.0  # where planners answer, and one of them is about to lead
MOST_MESSAGE_BYTES = 4 << 20
OPTIONS = (
    # A planner that stands still is left after 15 s; hetis-planner allows agents so many pings. Without the limit for a
    # ping's answer, a minute by itself, that for a keepalive's is of no use where the other machine's kernel goes on.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
    # gRPC's own waiting stays below ours, which has the jitter.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 5000),  # for one attempt: another planner may answer
    ("grpc.use_local_subchannel_pool", 1),
)


class AgentOptionError(Exception):
    """Options that cannot be used, in words for the person who gave them: one message for each thing that is wrong."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerAddress:
    """The place of the planner and the credentials to show there. Files are read at every attempt, so that they can
    rotate.

    Attributes:
        server: ``host:port``, or several with commas between them: the leader among them is found. A name with several
            records is several addresses.
        ca: certificates that sign the planner's. None: those of the system, where TLS is on.
        cert, key: of this node, for mutual TLS. None: none.
        token_file: holds a bearer token. None: ``token_variable`` of the environment, if it is set.
        is_plain: no TLS.
    """

    server: str
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    token_variable: str = "HETIS_AGENT_TOKEN"
    is_plain: bool = False

    def __post_init__(self) -> None:
        if wrong := list(self._problems()):
            raise AgentOptionError(*wrong)

    def _problems(self) -> Iterator[str]:
        try:
            elsewhere = [host_of(address) for address in split_endpoints(self.server) if not is_loopback(address)]
        except ValueError:
            elsewhere = []
            yield f"--server is {self.server!r}, must be host:port such as planner.example:8470"
        if (self.cert is None) != (self.key is None):
            yield "--tls-cert and --tls-key come together"
        if self.is_plain and (self.ca is not None or self.cert is not None):
            yield "--insecure and certificates exclude each other"
        files = {"ca": self.ca, "cert": self.cert, "key": self.key}
        named = {f"--tls-{name}": path for name, path in files.items()} | {"--token-file": self.token_file}
        unreadable = {name: path for name, path in named.items() if path is not None and not os.access(path, os.R_OK)}
        yield from (f"{name}: {path} cannot be read" for name, path in unreadable.items())
        may_be_token = "--token-file" not in unreadable
        if self.is_plain and may_be_token and elsewhere and self._token():
            yield f"a token is not sent to {elsewhere[0]} without TLS; give --tls-ca instead of --insecure"

    def search(self) -> LeaderSearch:
        """Return the search for the planner that leads. In the clear a leader that a planner names is believed on this
        machine only."""
        addresses = split_endpoints(self.server)
        is_local = all(is_loopback(address) for address in addresses)
        return LeaderSearch(addresses, lambda address: not self.is_plain or (is_local and is_loopback(address)))

    def channel(self, endpoint: Endpoint) -> grpc.aio.Channel:
        """A new channel with what the files hold now.

        Raises:
            OSError: a file cannot be read any more.
        """
        if self.is_plain:
            return grpc.aio.insecure_channel(endpoint.address, options=OPTIONS)
        credentials = grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))
        options = list[tuple[str, str | int]](OPTIONS)
        if endpoint.name:
            options += [("grpc.ssl_target_name_override", endpoint.name), ("grpc.default_authority", endpoint.name)]
        return grpc.aio.secure_channel(endpoint.address, credentials, options=options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call: the token, if there is one."""
        token = self._token()
        return (("authorization", f"Bearer {token}"),) if token else ()

    def explained(self, message: str) -> str:
        """Return what a failure to connect most likely means, before gRPC's own words for it."""
        if "CERTIFICATE_VERIFY_FAILED" in message:
            signed = (
                f"--tls-ca {self.ca}" if self.ca is not None else "an authority that this system trusts; give --tls-ca"
            )
            return f"TLS: the planner's certificate is not signed by {signed} ({message})"
        if "handshake failed" in message:
            return f"TLS: the planner speaks none, or its certificate is not of this address ({message})"
        if "Socket closed" in message and self.is_plain:
            return f"the planner closed the connection: does it want TLS, with --tls-ca? ({message})"
        if "Socket closed" in message and self.cert is None:
            return f"TLS: the planner closed: does it ask for a certificate, --tls-cert and --tls-key? ({message})"
        return message

    def _token(self) -> str:
        if self.token_file is not None:
            return self.token_file.read_text(encoding="utf-8").strip()
        return os.environ.get(self.token_variable, "").strip()


class ReconnectBackoff:
    """Full jitter: a random moment within a time that doubles with every attempt that failed."""

    def __init__(self, seed: random.Random) -> None:
        self._random = seed
        self._attempts = 0

    def succeeded(self) -> None:
        """A stream stood: the next attempts come soon again."""
        self._attempts = 0

    def next_s(self, most_s: float = MOST_WAIT_S) -> float:
        limit_s = min(LEAST_WAIT_S * 2**self._attempts, most_s)
        self._attempts = min(self._attempts + 1, 16)
        return self._random.uniform(0, limit_s)

    def within_s(self, seconds: float) -> float:
        """A random moment within a time that the planner chose."""
        return self._random.uniform(0, seconds)


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
