"""Which of several planners is asked: the leader, found by what planners answer, and looked for when it is gone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from hetis.formats.endpoints import Endpoint, is_loopback, resolve_endpoints, split_endpoints
from hetis.planner.client.connection import DISPATCH_SERVICE, Connection
from hetis.planner.client.errors import CallError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 1.0
ATTEMPT_S = 10.0  # one planner's time for a call, where others may answer it
NOT_LEADER = "NOT_LEADER"


class Leaders:
    """The planners that are known, and the one that led last. Safe to share between threads.

    Args:
        connection: with one address or several, and how to speak to whoever a planner names as the leader.
        resolve: endpoints of addresses; looked up again when all have failed.
    """

    def __init__(
        self, connection: Connection, resolve: Callable[[Sequence[str]], tuple[Endpoint, ...]] = resolve_endpoints
    ) -> None:
        self._connection = connection
        self._resolve = resolve
        self._lock = threading.Lock()
        self._given = resolve(connection.addresses)
        self._present = self._given[0]

    @property
    def present(self) -> Endpoint:
        """Who is asked next."""
        return self._present

    @property
    def are_several(self) -> bool:
        """Whether another planner may answer where one does not."""
        return len(self._given) > 1 or self._present not in self._given

    def failed(self, endpoint: Endpoint, error: CallError, tried: set[Endpoint]) -> bool:
        """Notes how a call of ``endpoint`` ended; whether there is a planner to be asked at once.

        Args:
            tried: those that have failed since the caller last waited; it is changed.
        """
        tried.add(endpoint)
        with self._lock:
            named = self._named(error) if error.reason == NOT_LEADER else None
            if named is not None and named not in tried:
                self._present = named
                return True
            if self._present != endpoint:
                return self._present not in tried  # another call has found out more
            others = [other for other in self._given if other not in tried]
            if others:
                self._present = others[0]
                return True
            self._given = self._resolve(self._connection.addresses) if endpoint in self._given else self._given
            position = self._given.index(endpoint) + 1 if endpoint in self._given else 0
            self._present = self._given[position % len(self._given)]
            return False

    def _named(self, error: CallError) -> Endpoint | None:
        """The leader, as a planner says; None: it says none to which a connection of this kind may be made."""
        try:
            addresses = split_endpoints(error.metadata.get("leader_address", ""))
        except ValueError:
            return None
        for address in addresses:
            for known in self._given:
                if known.address == address:
                    return known
            # Tokens go nowhere in the clear but to this machine, whoever says that the leader is there.
            if not self._connection.is_plain or (is_loopback(address) and self._connection.is_local):
                return Endpoint(address)
        return None


@dataclass(slots=True, kw_only=True)
class Attempts:
    """One call's tries until its deadline.

    Args:
        leaders: who is asked.
        method: as gRPC has it.
        end_s: the deadline.
        clock: seconds that only grow.
        jitter: from 0 to 1.
    """

    leaders: Leaders
    method: str
    end_s: float
    clock: Callable[[], float]
    jitter: Callable[[], float] = random.random
    tried: set[Endpoint] = field(default_factory=set)
    _num_waits: int = 0

    @property
    def timeout_s(self) -> float:
        """Of the next one."""
        left_s = max(self.end_s - self.clock(), 0.0)
        is_dispatch = self.method.startswith(f"/{DISPATCH_SERVICE}/")
        return min(left_s, ATTEMPT_S) if self.leaders.are_several and not is_dispatch else left_s

    def next_wait_s(self, endpoint: Endpoint, error: CallError) -> float:
        """How long to wait before the next try.

        Raises:
            CallError: the error itself, which no other planner and no waiting helps.
        """
        several = self.leaders.are_several
        is_elsewhere = error.reason == NOT_LEADER
        is_silence = error.code is grpc.StatusCode.DEADLINE_EXCEEDED and error.reason == ""
        if error.code is not grpc.StatusCode.UNAVAILABLE and not (several and is_silence):
            raise error
        goes_on = self.leaders.failed(endpoint, error, self.tried)
        if not is_elsewhere and (not several or self.method.startswith(f"/{DISPATCH_SERVICE}/")):
            raise error  # one planner is asked again by gRPC; engines decide by themselves
        if goes_on:
            wait_s = 0.0
        elif not several:
            raise error
        else:
            self.tried.clear()
            longest_s = min(FIRST_WAIT_S * 2.0**self._num_waits, LONGEST_WAIT_S)
            self._num_waits += 1
            wait_s = longest_s * (0.5 + 0.5 * self.jitter())
        if self.clock() + wait_s >= self.end_s:
            raise error
        return wait_s
