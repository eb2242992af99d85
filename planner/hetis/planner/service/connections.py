"""Limits on connections to the gRPC ports: in total, enforced by gRPC, and per host, enforced here.

gRPC for Python neither counts connections per host nor exposes them. But they are descriptors of this process: a thread
inspects them periodically and shuts down those in excess of a host's limit, the newest first. gRPC then closes them as
when a peer goes away. Without `/proc` (on systems other than Linux) only the total limit applies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from hetis.planner.service.addresses import is_socket_path, split_address

LOOK_S = 1.0
_FOLDER = "/proc/self/fd"
_KEPT_FOR_OTHERS = 0.25  # of all descriptors: files, the store, the status page, solver processes
_SHARE_OF_A_HOST = 0.25  # of all connections
_UNLIMITED = 1_000_000
_log = logging.getLogger("hetis.planner.connections")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """The most open connections, in total and per host."""

    of_all: int
    of_a_host: int

    @classmethod
    def of_descriptors(cls, limit: int, *, of_a_host: int | None = None) -> ConnectionLimits:
        """Return the limits for a number of descriptors: 3/4 of them for connections, 1/4 of those per host."""
        num = _UNLIMITED if limit == resource.RLIM_INFINITY else limit
        of_all = max(8, int(num * (1 - _KEPT_FOR_OTHERS)))
        return cls(of_all=of_all, of_a_host=min(of_all, of_a_host or max(2, int(of_all * _SHARE_OF_A_HOST))))


class ConnectionWatch:
    """Keeps each host to its share.

    Attributes:
        closed: excess connections closed since the start.
    """

    def __init__(self, limits: ConnectionLimits, ports: frozenset[int]) -> None:
        """``ports``: the ports that gRPC listens on."""
        self.closed = 0
        self._limits, self._ports = limits, ports
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
        """Count all connections, and close those in excess of a host's limit, newest first.

        Returns:
            The number of connections; 0 also if there are too few descriptors for any host to exceed its limit.
        """
        names = os.listdir(_FOLDER)
        if len(names) <= self._limits.of_a_host:
            return 0  # with 10,000 connections the rest takes some 30 ms
        known = dict[int, _Connection | None]()
        for name in names:
            with suppress(OSError):  # closed meanwhile
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
        self.closed += closed.total()
        for host, num in closed.items():
            _log.warning(
                "too many connections of one host, the newest were closed",
                extra={"host": host, "closed": num, "limit": self._limits.of_a_host},
            )
        return num_of.total()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Connection:
    descriptor: int
    host: str


def ports_of(addresses: Iterable[str]) -> frozenset[int]:
    """Return the TCP ports in use; Unix sockets have none, and are protected by file modes."""
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
