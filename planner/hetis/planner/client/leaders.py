"""Which of several planners is asked, and when again: the leader is found by what planners answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from hetis.formats.endpoints import Endpoint, LeaderSearch, is_loopback
from hetis.planner.client.connection import DISPATCH_SERVICE, Connection
from hetis.planner.client.errors import CallError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 1.0
ATTEMPT_S = 10.0  # one planner's time for a call, where others may answer it
NOT_LEADER = "NOT_LEADER"


def search_for(connection: Connection) -> LeaderSearch:
    """Return the search for the leader with a connection. Tokens go nowhere in the clear but to this machine, whoever
    names the leader."""
    return LeaderSearch(
        connection.addresses,
        lambda address: not connection.is_plain or (connection.is_local and is_loopback(address)),
    )


def leader_of(error: CallError) -> str:
    """Return where the leader is, as a planner said that does not lead; empty: it did not say."""
    return error.metadata.get("leader_address", "") if error.reason == NOT_LEADER else ""


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

    leaders: LeaderSearch
    method: str
    end_s: float
    clock: Callable[[], float]
    jitter: Callable[[], float] = random.random
    tried: set[Endpoint] = field(default_factory=set)
    _num_waits: int = 0

    @property
    def timeout_s(self) -> float:
        """Return the timeout of the next try."""
        left_s = max(self.end_s - self.clock(), 0.0)
        is_dispatch = self.method.startswith(f"/{DISPATCH_SERVICE}/")
        return min(left_s, ATTEMPT_S) if self.leaders.are_several and not is_dispatch else left_s

    def next_wait_s(self, endpoint: Endpoint, error: CallError) -> float:
        """Return how long to wait before the next try.

        Raises:
            CallError: the error itself, which no other planner and no waiting helps.
        """
        several = self.leaders.are_several
        is_elsewhere = error.reason == NOT_LEADER
        is_silence = error.code is grpc.StatusCode.DEADLINE_EXCEEDED and error.reason == ""
        if error.code is not grpc.StatusCode.UNAVAILABLE and not (several and is_silence):
            raise error
        goes_on = self.leaders.failed(endpoint, leader_of(error), self.tried)
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
