"""The search for the leader among several planners, by their answers, and the timing of retries."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from hetis.formats.endpoints import Endpoint, LeaderSearch, is_loopback
from hetis.planner.client.connection import DISPATCH_SERVICE, Connection, default_deadline_s
from hetis.planner.client.errors import CallError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 1.0
ATTEMPT_S = 10.0  # one planner's time for a call that others may answer
NOT_LEADER = "NOT_LEADER"
_REFUSED_AT_ONCE = (NOT_LEADER, "DRAINING")
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


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
        may_change: whether the call may change something.
    """

    leaders: LeaderSearch
    method: str
    end_s: float
    clock: Callable[[], float]
    jitter: Callable[[], float] = random.random
    may_change: bool = False
    tried: set[Endpoint] = field(default_factory=set)
    _num_waits: int = 0
    _is_in_doubt: bool = False  # an attempt may have been carried out without an answer

    @property
    def timeout_s(self) -> float:
        """The timeout of the next attempt."""
        left_s = max(self.end_s - self.clock(), 0.0)
        is_dispatch = self.method.startswith(f"/{DISPATCH_SERVICE}/")
        return min(left_s, ATTEMPT_S) if self.leaders.are_several and not is_dispatch else left_s

    def next_wait_s(self, endpoint: Endpoint, error: CallError) -> float:
        """Return how long to wait before the next attempt.

        Raises:
            CallError: the error itself, if neither another planner nor waiting can help. Its ``changed`` is ``unknown``
                if an earlier attempt may have been carried out, whatever the planner says of the last one.
        """
        wait_s = self._wait_s(endpoint, error)
        if wait_s is None:
            raise self._of_all_attempts(error)
        self._is_in_doubt |= self.may_change and not _changed_nothing(error)
        return wait_s

    def _wait_s(self, endpoint: Endpoint, error: CallError) -> float | None:
        """Return how long to wait before the next attempt, or None if there is no point in one."""
        several = self.leaders.are_several
        is_elsewhere = error.reason == NOT_LEADER
        is_silence = error.code is grpc.StatusCode.DEADLINE_EXCEEDED and error.reason == ""
        if error.code is not grpc.StatusCode.UNAVAILABLE and not (several and is_silence):
            return None
        goes_on = self.leaders.failed(endpoint, leader_of(error), self.tried)
        if not is_elsewhere and (not several or self.method.startswith(f"/{DISPATCH_SERVICE}/")):
            return None  # gRPC retries a single planner; engines decide on their own
        if goes_on:
            wait_s = 0.0
        elif not several:
            return None
        else:
            self.tried.clear()
            longest_s = min(FIRST_WAIT_S * 2.0**self._num_waits, LONGEST_WAIT_S)
            self._num_waits += 1
            wait_s = longest_s * (0.5 + 0.5 * self.jitter())
        return None if self.clock() + wait_s >= self.end_s else wait_s

    def _of_all_attempts(self, error: CallError) -> CallError:
        # A leader's refusal is true of all attempts: it would have repeated its answer to one that was carried out.
        if not self._is_in_doubt or error.code not in _NO_ANSWER:
            return error
        return CallError(
            f"{error}; an earlier attempt of this call may have been carried out",
            code=error.code,
            reason=error.reason,
            metadata={**error.metadata, "changed": "unknown"},
            violations=error.violations,
            retry_after_s=error.retry_after_s,
        )


def attempts_of(leaders: LeaderSearch, method: str, request: Any, timeout_s: float | None) -> Attempts:
    """Return the attempts of a call that begins now; a timeout of None is the method's default deadline."""
    return Attempts(
        leaders=leaders,
        method=method,
        end_s=time.monotonic() + (default_deadline_s(method) if timeout_s is None else timeout_s),
        clock=time.monotonic,
        may_change=bool(getattr(request, "request_id", "")),
    )


def _changed_nothing(error: CallError) -> bool:
    """Return whether a failed attempt surely changed nothing."""
    changed = error.metadata.get("changed")
    return changed == "no" or (changed is None and error.reason in _REFUSED_AT_ONCE)
