"""Limits that keep one caller from taking what others need: streams, changes per second, connections, descriptors."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from hetis.formats.descriptors import raise_descriptor_limit
from hetis.planner.callers import CallerRole, Identity, Turns
from hetis.planner.failures import Reason, ServiceError, quota_exceeded
from hetis.planner.service.methods import CONNECT, METHODS, WRITES, is_open
from hetis.planner.service.settings import is_socket_path, split_address

MOST_OF_A_CALLER = 100
"""Limit on the watches and downloads of one caller."""
MOST_OF_A_HOST = 100
"""Limit on the calls and streams of one host to the services open to all callers: health and reflection."""
MOST_OF_ALL_HOSTS = 1_000
MAX_CALLS = 30_000
"""Limit of gRPC on all calls at once, even without a message yet: 10,000 agents, twice as many other calls."""
MOST_AT_ONCE = 500
"""Limit on the unary calls at once of one caller."""
MOST_READS = 16  # of one caller that are answered at once, until it has taken the answers; its others wait for them
FEW = 8  # calls at once, for which each caller has room although others have taken theirs
MOST_OF_OTHERS = 15_000  # unary calls at once of all callers but agents and admins; half as many more by those with few


class CallLimits:
    """Counts calls from before their message is read, so that callers who send none, or too many, keep nobody out."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._reads = Turns(MOST_READS)

    def turn(self, method: str) -> AbstractAsyncContextManager[None]:
        """Return a context in which a read of the present caller is answered, after its others; writes do not wait.

        Otherwise 450 reads of a large document by one caller, who takes no answer, are 3 GB of memory.
        """
        found = METHODS.get(method)
        return self._reads.turn() if found is not None and found.is_read else nullcontext()

    @contextmanager
    def opened(self, method: str, caller: Identity, *, peer: str, is_stream: bool) -> Iterator[None]:
        """Count a call as open, or raise TOO_MANY_STREAMS or QUOTA_EXCEEDED.

        Args:
            caller: who was identified; for open services anybody.
            peer: the address in gRPC's form, which includes the port.
        """
        limits = _limits(method, caller, peer, is_stream=is_stream)
        for key, most in limits.items():
            if key == _OTHERS and self._open[f"caller {caller.account}"] < FEW:
                most += most // 2
            if self._open[key] < most:
                continue
            if is_stream:
                message = f"{key}: {most} streams are open already, the maximum; end one first"
                raise ServiceError(Reason.ERROR_REASON_TOO_MANY_STREAMS, message, metadata={"max_streams": most})
            message = f"{key}: {most} calls are being answered already, the maximum"
            raise quota_exceeded(caller.name, "calls_at_once", message, limit=most, retry_after_s=1.0)
        self._open.update(limits.keys())
        try:
            yield
        finally:
            for key in limits:
                self._open[key] -= 1
                if not self._open[key]:
                    del self._open[key]


_OTHERS = "all callers together but agents and admins"
_RESERVED = CallerRole.AGENT, CallerRole.ADMIN


def _limits(method: str, caller: Identity, peer: str, *, is_stream: bool) -> dict[str, int]:
    if is_open(method):
        of = "" if is_stream else "calls of "  # a host with many watches may still probe
        return {f"{of}host {peer.rpartition(':')[0]}": MOST_OF_A_HOST, f"{of}all hosts together": MOST_OF_ALL_HOSTS}
    if method == CONNECT:  # a node has one agent stream, and agents may share credentials
        return {}
    if is_stream:
        return {f"caller {caller.account}": MOST_OF_A_CALLER}
    # Without credentials every caller has every role.
    is_reserved = not caller.connection and not caller.roles.isdisjoint(_RESERVED)
    of_caller = {f"caller {caller.account}": MOST_AT_ONCE}
    return of_caller if is_reserved else of_caller | {_OTHERS: MOST_OF_OTHERS}


_MOST_REMEMBERED = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_s: float


class WriteRates:
    """A token bucket per caller, from which each call takes one token.

    Args:
        per_s: tokens added per second.
        burst: capacity of a bucket.
        clock: monotonic seconds.
    """

    def __init__(self, *, per_s: float = 100.0, burst: int = 500, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, method: str, caller: Identity) -> None:
        """Take a token if the method is a write. Raises QUOTA_EXCEEDED, with the time until the next one."""
        if method not in WRITES:
            return
        now_s = self._clock()
        bucket = self._buckets.get(caller.account)
        if bucket is None:
            self._forget_full(now_s)
            bucket = self._buckets[caller.account] = _Bucket(float(self._burst), now_s)
        bucket.tokens = min(self._burst, bucket.tokens + self._per_s * (now_s - bucket.filled_s))
        bucket.filled_s = now_s
        if bucket.tokens < 1:
            raise quota_exceeded(
                caller.name,
                "writes_per_second",
                f"{caller.name} has exceeded {self._per_s:g} writes per second",
                limit=self._per_s,
                retry_after_s=(1 - bucket.tokens) / self._per_s,
            )
        bucket.tokens -= 1

    def _forget_full(self, now_s: float) -> None:
        """Drop full buckets if there are many: callers are names of credentials, which can be numerous."""
        if len(self._buckets) >= _MOST_REMEMBERED:
            full_s = self._burst / self._per_s
            self._buckets = {name: kept for name, kept in self._buckets.items() if now_s - kept.filled_s < full_s}


LOOK_S = 1.0
_FOLDER = "/proc/self/fd"
_KEPT_FOR_OTHERS = 0.25  # share of all descriptors, for files, the store, the status page, and solver processes
_SHARE_OF_A_HOST = 0.25  # share of all connections
_UNLIMITED = 1_000_000
_log = logging.getLogger("hetis.planner.connections")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Limits on open connections, in total and per host."""

    of_all: int
    of_a_host: int

    @classmethod
    def of_descriptors(cls, limit: int, *, of_a_host: int | None = None) -> ConnectionLimits:
        """Return the limits for a number of descriptors: 3/4 of them for connections, and 1/4 of those per host."""
        num = _UNLIMITED if limit == resource.RLIM_INFINITY else limit
        of_all = max(8, int(num * (1 - _KEPT_FOR_OTHERS)))
        return cls(of_all=of_all, of_a_host=min(of_all, of_a_host or max(2, int(of_all * _SHARE_OF_A_HOST))))


class ConnectionWatch:
    """Keeps each host to its share of the connections to the gRPC ports.

    gRPC limits their total, but in Python it neither counts connections per host nor exposes them. They are descriptors
    of this process, though: a thread inspects them periodically and shuts down those in excess of a host's limit, the
    newest first. gRPC then closes them as if the peer had gone away. Without `/proc` (on systems other than Linux) only
    the total limit applies.
    """

    def __init__(self, limits: ConnectionLimits, ports: frozenset[int], *, on_closed: Callable[[int], None]) -> None:
        """Watch nothing yet.

        Args:
            ports: the ports on which gRPC listens.
            on_closed: called in a thread with the number of excess connections that were just closed.
        """
        self._limits, self._ports, self._on_closed = limits, ports, on_closed
        self._known: dict[int, _Connection | None] = {}  # by inode; None: another kind of socket

    async def run(self) -> None:
        """Check periodically until cancelled."""
        while os.path.isdir(_FOLDER):
            try:
                await asyncio.to_thread(self.look)
            except OSError as error:
                _log.warning("connections could not be counted: %s", error)
            await asyncio.sleep(LOOK_S)

    def look(self) -> int:
        """Count all connections, and close those in excess of a host's limit, the newest first.

        Returns:
            The number of connections; also 0 if there are too few descriptors for any host to exceed its limit.
        """
        names = os.listdir(_FOLDER)
        if len(names) <= self._limits.of_a_host:
            return 0  # with 10,000 connections, what follows takes some 30 ms
        known = dict[int, _Connection | None]()
        for name in names:
            with suppress(OSError):  # closed in the meantime
                inode = _inode_of(os.readlink(f"{_FOLDER}/{name}"))
                if inode is not None:
                    known[inode] = self._known[inode] if inode in self._known else _connection(int(name), self._ports)
        num_of, closed = Counter[str](), Counter[str]()
        for inode in sorted(known, key=lambda inode: inode not in self._known):
            one = known[inode]
            if one is None:
                continue
            num_of[one.host] += 1
            if num_of[one.host] > self._limits.of_a_host and _shut_down(one, inode):
                closed[one.host] += 1
        self._known = known
        self._on_closed(closed.total())
        for host, num in closed.items():
            message = "too many connections from one host: the newest were closed"
            _log.warning(message, extra={"host": host, "closed": num, "limit": self._limits.of_a_host})
        return num_of.total()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Connection:
    descriptor: int
    host: str


def ports_of(addresses: Iterable[str]) -> frozenset[int]:
    """Return the TCP ports of the addresses; Unix sockets have none, and are protected by file modes."""
    return frozenset(split_address(address)[1] for address in addresses if not is_socket_path(address))


def _inode_of(link: str) -> int | None:
    """Return the inode of a descriptor if it is a socket, else None."""
    return int(link[len("socket:[") : -1]) if link.startswith("socket:[") else None


def _connection(descriptor: int, ports: frozenset[int]) -> _Connection | None:
    """Return an accepted connection to one of the ports, or None if the descriptor is something else."""
    with suppress(OSError), _opened(descriptor) as found:
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] in ports:
            return _Connection(descriptor=descriptor, host=str(found.getpeername()[0]))  # fails for listening sockets
    return None


def _shut_down(one: _Connection, inode: int) -> bool:
    """Shut down a connection if the descriptor still refers to it; return whether it did."""
    with suppress(OSError), _opened(one.descriptor) as found:
        if os.fstat(found.fileno()).st_ino == inode:
            found.shutdown(socket.SHUT_RDWR)
            return True
    return False


def _opened(descriptor: int) -> socket.socket:
    """Return a socket on a duplicate descriptor, so that closing either one leaves the other open."""
    own = os.dup(descriptor)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise


_ENOUGH = 16_384  # for 10,000 agents, watchers, solver processes, and the status page


_OWN, _OF_A_PROCESS = 28, 4  # descriptors of the planner itself, and those that it has for each solver process
_MOST_NEEDED = 1024  # a common limit, which must not keep a machine of many cores from planning


def least_descriptors(processes: int) -> int:
    """Return the limit of which the eighth that neither connections nor the status page may use is enough for all else.

    Below it, connections could take the last ones: then nothing could be counted, closed or started any more.
    """
    return min(_MOST_NEEDED, 8 * (_OWN + _OF_A_PROCESS * processes))


def raise_descriptors(processes: int) -> int:
    """Raise the limit as far as this process may, and return it; log a warning if it is low.

    Raises DocumentError if it is too low for the number of solver ``processes``.
    """
    soft = raise_descriptor_limit("hetis-planner", least=least_descriptors(processes))
    if soft != resource.RLIM_INFINITY and soft < _ENOUGH:
        _log.warning(
            "at most %d files and connections can be open; %d are enough for 10,000 agents (LimitNOFILE, ulimit -n)",
            soft,
            _ENOUGH,
        )
    return soft


def reserved_for_page(limit: int) -> int:
    """Return how many descriptors the status page may use: an eighth; the rest is for gRPC and the store."""
    return 256 if limit == resource.RLIM_INFINITY else max(8, min(256, limit // 8))
