"""Addresses of a service that runs in several places: a list of ``HOST:PORT``, or a name with several DNS records.

Also answers of HTTP servers, read within a size and a time.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Resolve = Callable[[str, int], Sequence[str]]
# Metadata with which a planner begins an answer that may take long; an answer from a proxy itself lacks it.
STREAM_OPEN = ("hetis-stream", "open")
# Key of the metadata behind a standby's answer to a read, which lacks what only the leader knows. Its value has the
# leader's addresses, separated by commas, and is empty if they are unknown.
STANDBY_ANSWER = "hetis-standby"
_TOKEN = re.compile(r"[!-~]*")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_NUMBERED = re.compile(r".*\.[0-9]+")  # no domain is a number, so this is an IPv4 address or a wrong one


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place where the service runs."""

    address: str  # ``host:port`` or ``unix:/path`` to connect to
    # Name expected in its certificate if the address is a DNS record of that name. Empty: the address's own host.
    name: str = ""


def split_endpoints(text: str) -> tuple[str, ...]:
    """Return the addresses of a list with commas: ``host:port`` or ``unix:/path``. Raises ValueError if it is none."""
    addresses = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for address in addresses or ("",):
        if not address.startswith("unix:"):
            split_address(address)
    return addresses


def split_address(address: str, *, least_port: int = 1) -> tuple[str, int]:
    """Return host, without brackets, and port, ``least_port`` to 65535. Raises ValueError if it is malformed."""
    host, _, port = address.rpartition(":")
    is_number = port.isascii() and port.isdigit()
    if not host.strip("[]") or "/" in host or not is_number or not least_port <= int(port) <= 65535:
        raise ValueError(f"{address!r} is not an address, expected HOST:PORT")
    return host.strip("[]"), int(port)


def is_host(text: str) -> bool:
    """Return whether a text may stand for a host in commands and files: a name or an IP address without brackets."""
    if is_ip(text):
        return "%" not in text
    return _HOST.fullmatch(text) is not None and _NUMBERED.fullmatch(text) is None


def is_sendable_token(text: str) -> bool:
    """Return whether gRPC sends a text as a bearer token: empty, or printable ASCII without blanks.

    It refuses a call with any other text without giving the reason.
    """
    return _TOKEN.fullmatch(text) is not None


def host_of(address: str) -> str:
    """Return the host of an address without brackets, or an empty string for a socket."""
    return "" if address.startswith("unix:") else address.rpartition(":")[0].strip("[]")


def is_ip(host: str) -> bool:
    """Return whether a host is an IP address without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def joined(host: str, port: int) -> str:
    """Return an address as one word."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    host = host_of(address)
    if address.startswith("unix:") or host == "localhost":
        return True
    return is_ip(host) and ipaddress.ip_address(host).is_loopback


def without_proxy(address: str) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options for a channel to an address: no proxy, which the environment may name, reaches loopback."""
    return (("grpc.enable_http_proxy", 0),) if is_loopback(address) else ()


def open_channel(library: Any, endpoint: Endpoint, options: Iterable[tuple[str, str | int]], credentials: Any) -> Any:
    """Return a channel of gRPC's ``library`` to an endpoint; without credentials it is not encrypted."""
    more = [*options, *without_proxy(endpoint.address)]
    if endpoint.name:
        more.append(("grpc.default_authority", endpoint.name))
    if credentials is None:
        return library.insecure_channel(endpoint.address, more)
    if endpoint.name:
        more.append(("grpc.ssl_target_name_override", endpoint.name))
    return library.secure_channel(endpoint.address, credentials, more)


def records_of(host: str, port: int) -> Sequence[str]:
    """Return the IP addresses of a name, or nothing if it is not known at present."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(where[0]) for *_, where in found))


def resolve_endpoints(addresses: Sequence[str], records: Resolve = records_of) -> tuple[Endpoint, ...]:
    """Return every endpoint, in order: a name with several records gives as many, anything else one."""
    found = list[Endpoint]()
    for address in addresses:
        host, port = host_of(address), address.rpartition(":")[2]
        ips = () if is_loopback(address) or is_ip(host) else records(host, int(port))
        found += [Endpoint(joined(ip, int(port)), host) for ip in ips] if len(ips) > 1 else [Endpoint(address)]
    return tuple(dict.fromkeys(found))


class LeaderSearch:
    """The known endpoints and the one that led last. Thread-safe.

    Args:
        addresses: at least one.
        is_plain: no TLS. Then an unknown endpoint that a known one names as the leader is trusted only on this machine.
        resolve: returns the endpoints of addresses. It may query DNS, so only `refresh` calls it later on.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        is_plain: bool,
        resolve: Callable[[Sequence[str]], tuple[Endpoint, ...]] = resolve_endpoints,
    ) -> None:
        self._addresses, self._is_plain, self._resolve = tuple(addresses), is_plain, resolve
        self._lock = threading.Lock()
        self._given = resolve(self._addresses)
        self._present = self._given[0]
        self._has_names = any(not is_loopback(address) and not is_ip(host_of(address)) for address in self._addresses)
        self._is_stale = False

    @property
    def present(self) -> Endpoint:
        """The endpoint to call next."""
        return self._present

    @property
    def in_turn(self) -> tuple[Endpoint, ...]:
        """The endpoint to call next and, behind it, the others in the order in which they are tried."""
        with self._lock:
            begin = self._given.index(self._present) if self._present in self._given else 0
            turned = (*self._given[begin:], *self._given[:begin])
            return tuple(dict.fromkeys((self._present, *turned)))

    @property
    def are_several(self) -> bool:
        """Return whether another endpoint may answer if one does not."""
        return len(self._given) > 1 or self._present not in self._given

    @property
    def is_stale(self) -> bool:
        """Return whether all have failed and names may resolve differently by now, so that `refresh` is due."""
        return self._is_stale

    def refresh(self) -> None:
        """Resolve names again if all endpoints have failed. Waits for DNS."""
        if self._is_stale:
            found = self._resolve(self._addresses)
            with self._lock:
                self._given, self._is_stale = found, False
                if self._present not in found:
                    self._present = found[0]

    def failed(self, endpoint: Endpoint, leader_address: str, tried: set[Endpoint]) -> bool:
        """Record that a call to ``endpoint`` failed, and return whether another endpoint should be tried at once.

        ``leader_address`` has the leader's addresses according to its answer, and is empty if it named none. ``tried``
        are the endpoints that have failed since the caller last waited; modified.
        """
        tried.add(endpoint)
        with self._lock:
            named = self._named(leader_address)
            if named is not None and named not in tried:
                self._present = named
                return True
            if self._present != endpoint:
                return self._present not in tried  # another call has found out more
            if others := [other for other in self._given if other not in tried]:
                self._present = others[0]
                return True
            following = self._given.index(endpoint) + 1 if endpoint in self._given else 0
            self._present = self._given[following % len(self._given)]
            self._is_stale = self._has_names
            return False

    def _is_trusted(self, address: str) -> bool:
        return not self._is_plain or all(map(is_loopback, (address, *self._addresses)))

    def _named(self, leader_address: str) -> Endpoint | None:
        try:
            addresses = split_endpoints(leader_address)
        except ValueError:
            return None
        for address in addresses:
            for known in self._given:
                if known.address == address:
                    return known
            if self._is_trusted(address):
                return Endpoint(address)
        return None


_PIECE_BYTES = 64 * 2**10
Opened = Callable[..., Any]  # `urllib.request.urlopen`, or an opener's `open`


def metrics_body(url: str, *, timeout_s: float, max_bytes: int, opened: Opened) -> bytes | None:
    """Return the body of a ``/metrics`` answer, or None if it is larger than ``max_bytes``.

    The time limit applies to the whole body, not to each read. Raises OSError, ValueError or http.client.HTTPException
    if there is no answer, or none in time. `reason_of` describes the error.
    """
    import urllib.request  # not at the top: workers only need addresses

    ends_s = time.monotonic() + timeout_s
    request = urllib.request.Request(url, headers={"Accept": "text/plain; version=0.0.4"})
    pieces: list[bytes] = []
    size = 0
    with opened(request, timeout=timeout_s) as response:
        while piece := response.read1(_PIECE_BYTES):
            size += len(piece)
            if size > max_bytes:
                return None
            pieces.append(piece)
            if time.monotonic() > ends_s:
                raise TimeoutError(f"no complete response within {timeout_s:g} s")
    return b"".join(pieces)


def reason_of(error: Exception) -> str:
    """Return why there was no answer."""
    import urllib.error

    # urllib.error.URLError is an OSError whose reason is more specific than the error itself.
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__
