"""The options of `hetis-agent`, all checked before anything is started, and how it reaches its planner."""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from hetis.commands.endpoints import (
    Endpoint,
    LeaderSearch,
    host_of,
    is_loopback,
    is_sendable_token,
    open_channel,
    split_address,
    split_endpoints,
)
from hetis.commands.x509 import ends_of_certificates, moment
from hetis.engines.errors import OptionError

if TYPE_CHECKING:
    import grpc

    from hetis.runtime.agent.launched.parts import EngineSettingsDocument

T = TypeVar("T")
# The form of the planner's names of nodes
_NODE = re.compile(r"clusters/[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?/nodes/[^\W_][\w.-]{0,199}")
_TOKEN_VARIABLE = "HETIS_AGENT_TOKEN"
LEAST_WAIT_S, MOST_WAIT_S = 0.5, 30.0
MOST_WAIT_FOR_LEADER_S = 4.0  # longest wait while planners answer and one of them is about to lead
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


class Checking:
    """Checks all options, so that all problems are reported at once."""

    def __init__(self) -> None:
        self.wrong: list[str] = []  # a message for each problem so far

    def __call__(self, check: Callable[[], T]) -> T | None:
        """Return the result of the check, or None if it finds a problem."""
        try:
            return check()
        except OptionError as error:
            self.wrong += error.messages
            return None


class EngineKind(StrEnum):
    SOCKET = "unix"
    VLLM = "vllm"
    SGLANG = "sglang"
    LAUNCH = "launch"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine next to the agent."""

    kind: EngineKind
    where: str = ""  # the path of a socket, the address of its metrics, or the file of its settings
    settings: EngineSettingsDocument | None = None  # settings of engines that the agent starts itself

    @classmethod
    def parse(cls, text: str) -> EngineChoice:
        """Parse ``unix:///path``, ``vllm:http://host:port``, ``sglang:http://host:port``, ``launch:/path`` or ``none``.

        Raises OptionError if the text is none of these, or with all problems of the settings file.
        """
        head, _, rest = re.sub(r"^(vllm|sglang)\s+", r"\1:", text.strip()).partition(":")
        expected = (
            "unix:///path/engine.sock, vllm:http://127.0.0.1:8000, sglang:http://127.0.0.1:30000, "
            "launch:/path/engine.yaml or none"
        )
        match head:
            case "unix" if rest.startswith("/") and rest.strip("/"):
                return cls(EngineKind.SOCKET, "/" + rest.lstrip("/"))
            case "vllm" | "sglang" if rest:
                return cls(EngineKind(head), _metrics_url(rest))
            case "launch" if rest:
                return cls(EngineKind.LAUNCH, rest, _engine_settings(rest))
            case "none" if not rest:
                return cls(EngineKind(head))
        raise OptionError(f"--engine is {text!r}, must be {expected}")


def _engine_settings(path: str) -> EngineSettingsDocument:
    from hetis.formats.errors import DocumentError
    from hetis.runtime.agent.launched.parts import load_settings

    try:
        return load_settings(Path(path))
    except DocumentError as error:
        raise OptionError(*(f"--engine: {problem}" for problem in error.problems)) from None


def _metrics_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number up to 65535, or brackets without an address
        is_right = False
    if is_right and "@" in parts.netloc:  # it would be shown wherever the engine is, and no engine asks for it
        raise OptionError("--engine has a user or password in its address, must be http://host:port")
    if not is_right:
        raise OptionError(f"--engine has the address {text!r}, must be http://host:port")
    return text if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/metrics"


def checked_node(text: str) -> str:
    if not _NODE.fullmatch(text):
        raise OptionError(f"--node is {f'{text!r}, must be' if text else 'missing:'} clusters/CLUSTER/nodes/NODE")
    return text


def checked_address(option: str, text: str) -> tuple[str, int]:
    """Return the host and port to listen on. Raises OptionError if the text is not ``host:port``."""
    try:
        return split_address(text, least_port=0)
    except ValueError:
        raise OptionError(f"{option} is {text!r}, must be host:port such as 127.0.0.1:9470") from None


def checked_devices(source: str) -> str:
    """Check the source of devices. Raises OptionError if there is no such source."""
    from hetis.runtime.agent.devices import SOURCES, DevicesUnavailableError, SimulatedDevices

    kind, _, rest = source.partition(":")
    if kind == "simulated":
        try:
            SimulatedDevices.parse(rest)
        except DevicesUnavailableError as error:
            raise OptionError(str(error)) from None
    elif kind not in ("auto", "nvml", "none") or rest:
        raise OptionError(f"--devices is {source!r}, must be {SOURCES.replace('`', '')}")
    return source


def loopback_server(server: str) -> bool:
    """Return whether the planner is on this machine, where it listens without TLS by default."""
    try:
        return all(is_loopback(address) for address in split_endpoints(server))
    except ValueError:
        return False


def default_state_dir(home: str | None, node: str) -> Path:
    """Return a directory that differs for each node, so that several agents of a demonstration do not collide."""
    return Path(home or Path.home() / ".local" / "state") / "hetis" / "agent" / node.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerAddress:
    """The planner's address and the credentials to present there.

    Files are read at every attempt, so that credentials can be rotated.
    """

    # ``host:port``, or several separated by commas, of which the leader is found. A name with several DNS records
    # counts as several addresses.
    server: str
    ca: Path | None = None  # certificates that sign the planner's. None: the system's, if TLS is on.
    # cert, key: this node's, for mutual TLS. None: not used.
    cert: Path | None = None
    key: Path | None = None
    token_file: Path | None = None  # holds a bearer token. None: use HETIS_AGENT_TOKEN if it is set.
    is_plain: bool = False  # no TLS

    def __post_init__(self) -> None:
        if wrong := list(self._problems()):
            raise OptionError(*wrong)

    def _problems(self) -> Iterator[str]:
        try:
            elsewhere = [host_of(address) for address in split_endpoints(self.server) if not is_loopback(address)]
        except ValueError:
            elsewhere = []
            yield f"--server is {self.server!r}, must be host:port such as planner.example:8470"
        if (self.cert is None) != (self.key is None):
            yield "--tls-cert and --tls-key must be given together"
        if self.is_plain and (self.ca is not None or self.cert is not None):
            yield "--insecure and certificates cannot be combined"
        files = {"--tls-ca": self.ca, "--tls-cert": self.cert, "--tls-key": self.key, "--token-file": self.token_file}
        unreadable = {name: path for name, path in files.items() if path is not None and not os.access(path, os.R_OK)}
        yield from (f"{name}: {path} cannot be read" for name, path in unreadable.items())
        if self.token_file is None and not is_sendable_token(self._token()):  # a file may yet be written
            yield _not_sendable(_TOKEN_VARIABLE)
        if self.is_plain and "--token-file" not in unreadable and elsewhere and self._token():
            yield f"a token is not sent to {elsewhere[0]} without TLS; give --tls-ca instead of --insecure"

    def search(self) -> LeaderSearch:
        return LeaderSearch(split_endpoints(self.server), is_plain=self.is_plain)

    def channel(self, endpoint: Endpoint) -> grpc.aio.Channel:
        """Return a new channel that uses the present contents of the files. Raises OSError if one cannot be read."""
        import grpc  # not earlier: it takes the level of its own log from the environment, which the options change

        files = (self.ca, self.key, self.cert)
        credentials = None if self.is_plain else grpc.ssl_channel_credentials(*map(_read, files))
        channel: grpc.aio.Channel = open_channel(grpc.aio, endpoint, OPTIONS, credentials)
        return channel

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call: the token, or nothing if there is none.

        Raises OSError if the token's file cannot be read or holds no token, as while it is being written.
        """
        token = self._token()
        if self.token_file is not None and not token:
            raise OSError(f"{self.token_file} holds no token: it is empty")
        if not is_sendable_token(token):
            where = self.token_file if self.token_file is not None else _TOKEN_VARIABLE
            raise OSError(_not_sendable(where))
        return (("authorization", f"Bearer {token}"),) if token else ()

    def explained(self, message: str) -> str:
        """Return the most likely cause of a failure to connect, followed by gRPC's own words for it."""
        if (ended := self._expiry()) is not None:
            return f"TLS: the certificate {self.cert} expired at {ended}: renew it ({message})"
        if "certificate has expired" in message:
            return f"TLS: the planner's certificate has expired: renew it on the planner's machine ({message})"
        if "CERTIFICATE_VERIFY_FAILED" in message:
            signed = f"--tls-ca {self.ca}" if self.ca else "an authority that this system trusts; give --tls-ca"
            return f"TLS: the planner's certificate is not signed by {signed} ({message})"
        if "handshake failed" in message:
            return f"TLS: the planner does not use it, or its certificate is not for this address ({message})"
        if "Socket closed" in message and self.is_plain:
            return f"the planner closed the connection: if it requires TLS, give --tls-ca ({message})"
        if "Socket closed" in message and self.cert is None:
            return (
                "TLS: the planner closed the connection: if it requires a client certificate, give --tls-cert and "
                f"--tls-key ({message})"
            )
        return message

    def _expiry(self) -> str | None:
        """Return when this agent's certificate expired, or None if it is valid or there is none."""
        pem = b""
        with suppress(OSError):  # a file that is gone has another message
            pem = _read(self.cert) or b""
        end_s = next(iter(ends_of_certificates(pem.decode(errors="replace"))), math.inf)
        return moment(end_s) if end_s <= time.time() else None

    def _token(self) -> str:
        if self.token_file is not None:
            return self.token_file.read_text(encoding="utf-8", errors="replace").strip()
        return os.environ.get(_TOKEN_VARIABLE, "").strip()


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
        """Return a random delay of at most ``seconds``, the time that the planner has set."""
        return self._random.uniform(0, seconds)


def _not_sendable(where: object) -> str:
    return f"{where} holds no token: characters other than printable ones without blanks"


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
