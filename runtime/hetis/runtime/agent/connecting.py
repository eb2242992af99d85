"""The agent's connection to its planner: address, certificates, token, and the backoff between attempts."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from hetis.formats.endpoints import Endpoint, LeaderSearch, host_of, is_loopback, split_endpoints

LEAST_WAIT_S, MOST_WAIT_S = 0.5, 30.0
MOST_WAIT_FOR_LEADER_S = 4.0  # used when planners answer and one of them is about to lead
MOST_MESSAGE_BYTES = 4 << 20
OPTIONS = (
    # A planner that hangs is abandoned after 15 s; hetis-planner permits agents this many pings. The keepalive timeout
    # has no effect as long as the other machine's kernel responds, unless the ping timeout, a minute by default, is
    # lowered too.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
    # gRPC's own backoff stays below ours, which has the jitter.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 5000),  # limits a single attempt: another planner may answer
    ("grpc.use_local_subchannel_pool", 1),
)


class AgentOptionError(Exception):
    """Options that cannot be used, with one message for each problem, written for the person who gave them."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerAddress:
    """The planner's address and the credentials to present there.

    Files are read at every attempt, so that credentials can be rotated.

    Attributes:
        server: ``host:port``, or several separated by commas, of which the leader is found. A name with several DNS
            records counts as several addresses.
        ca: certificates that sign the planner's. None: the system's, if TLS is on.
        cert, key: this node's, for mutual TLS. None: not used.
        token_file: holds a bearer token. None: use the environment variable ``token_variable`` if it is set.
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
        """Return the search for the leading planner. Without TLS, a leader that a planner names is trusted only if it
        is on this machine.
        """
        addresses = split_endpoints(self.server)
        is_local = all(is_loopback(address) for address in addresses)
        return LeaderSearch(addresses, lambda address: not self.is_plain or (is_local and is_loopback(address)))

    def channel(self, endpoint: Endpoint) -> grpc.aio.Channel:
        """Return a new channel that uses the current contents of the files.

        Raises:
            OSError: a file can no longer be read.
        """
        if self.is_plain:
            return grpc.aio.insecure_channel(endpoint.address, options=OPTIONS)
        credentials = grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))
        options = list[tuple[str, str | int]](OPTIONS)
        if endpoint.name:
            options += [("grpc.ssl_target_name_override", endpoint.name), ("grpc.default_authority", endpoint.name)]
        return grpc.aio.secure_channel(endpoint.address, credentials, options=options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call: the token, or nothing if there is none."""
        token = self._token()
        return (("authorization", f"Bearer {token}"),) if token else ()

    def explained(self, message: str) -> str:
        """Return the most likely cause of a failure to connect, followed by gRPC's own words for it."""
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
    """Full jitter: each delay is random within a limit that doubles with every failed attempt."""

    def __init__(self, seed: random.Random) -> None:
        self._random = seed
        self._attempts = 0

    def succeeded(self) -> None:
        """Reset the delays because a stream was established."""
        self._attempts = 0

    def next_s(self, most_s: float = MOST_WAIT_S) -> float:
        limit_s = min(LEAST_WAIT_S * 2**self._attempts, most_s)
        self._attempts = min(self._attempts + 1, 16)
        return self._random.uniform(0, limit_s)

    def within_s(self, seconds: float) -> float:
        """Return a random delay within a limit that the planner chose, in seconds."""
        return self._random.uniform(0, seconds)


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
