"""The search for the leader among several planners, by their answers, and the timing of retries."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from hetis.formats.endpoints import Endpoint, LeaderSearch, is_loopback
from hetis.planner.client.connection import DISPATCH_SERVICE, Connection
from hetis.planner.client.errors import CallError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 1.0
ATTEMPT_S = 10.0  # one planner's time for a call that others may answer
NOT_LEADER = "NOT_LEADER"


def search_for(connection: Connection) -> LeaderSearch:
    """Return the search for a connection's leader.

    Tokens are sent unencrypted only to this machine, whoever names the leader.
    """
    return LeaderSearch(
        connection.addresses,
        lambda address: not connection.is_plain or (connection.is_local and is_loopback(address)),
    )


def leader_of(error: CallError) -> str:
    """Return the leader's address as named by a planner that does not lead, or an empty string."""
    return error.metadata.get("leader_address", "") if error.reason == NOT_LEADER else ""


@dataclass(slots=True, kw_only=True)
class Attempts:
    """The attempts of one call until its deadline.

    Args:
        leaders: the planners.
        method: in gRPC's form.
        end_s: the deadline.
        clock: monotonic seconds.
        jitter: returns a number from 0 to 1.
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
        """The timeout of the next attempt."""
        left_s = max(self.end_s - self.clock(), 0.0)
        is_dispatch = self.method.startswith(f"/{DISPATCH_SERVICE}/")
        return min(left_s, ATTEMPT_S) if self.leaders.are_several and not is_dispatch else left_s

    def next_wait_s(self, endpoint: Endpoint, error: CallError) -> float:
        """Return how long to wait before the next attempt.

        Raises:
            CallError: the error itself, if neither another planner nor waiting can help.
        """
        several = self.leaders.are_several
        is_elsewhere = error.reason == NOT_LEADER
        is_silence = error.code is grpc.StatusCode.DEADLINE_EXCEEDED and error.reason == ""
        if error.code is not grpc.StatusCode.UNAVAILABLE and not (several and is_silence):
            raise error
        goes_on = self.leaders.failed(endpoint, leader_of(error), self.tried)
        if not is_elsewhere and (not several or self.method.startswith(f"/{DISPATCH_SERVICE}/")):
            raise error  # gRPC retries a single planner; engines decide on their own
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
