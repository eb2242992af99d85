"""The attempts of one call at several planners, until its deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from hetis.commands.endpoints import STANDBY_ANSWER, Endpoint, LeaderSearch
from hetis.planner.client.connection import DEFAULT_DEADLINE_S
from hetis.planner.client.errors import CallError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 1.0
ATTEMPT_S = 10.0  # the time one planner has for a call that others may answer
NOT_LEADER = "NOT_LEADER"
_REFUSED_AT_ONCE = (NOT_LEADER, "DRAINING")
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def leader_of(error: CallError) -> str:
    """Return the leader's address as named by a planner that does not lead, or an empty string."""
    return error.metadata.get("leader_address", "") if error.reason == NOT_LEADER else ""


@dataclass(slots=True, kw_only=True)
class Attempts:
    """The attempts of one call until its deadline.

    Args:
        clock: monotonic seconds.
        may_change: whether the call may change something.
    """

    leaders: LeaderSearch
    end_s: float
    clock: Callable[[], float]
    may_change: bool = False
    tried: set[Endpoint] = field(default_factory=set)
    answer: Any = None  # the last answer
    is_of_standby: bool = False  # whether that is a standby's, so that it lacks what only the leader knows
    _num_waits: int = 0
    _is_in_doubt: bool = False  # an attempt without an answer may have been carried out
    _refusal: CallError | None = None  # the last one by a leader, such as that its store's disk is full

    @property
    def timeout_s(self) -> float:
        """The timeout of the next attempt."""
        left_s = max(self.end_s - self.clock(), 0.0)
        return min(left_s, ATTEMPT_S) if self.leaders.are_several else left_s

    def takes(self, endpoint: Endpoint, answer: Any, metadata: Any) -> bool:
        """Take the answer of a planner with the metadata behind it; return whether the leader should be called, too."""
        leader_address = next((str(value) for key, value in metadata or () if key == STANDBY_ANSWER), None)
        self.answer, self.is_of_standby = answer, leader_address is not None
        return leader_address is not None and self._asks_another(endpoint, leader_address)

    def _asks_another(self, endpoint: Endpoint, leader_address: str) -> bool:
        """Return whether to call another planner at once. With a standby's answer at hand, waiting does not pay."""
        return self.clock() < self.end_s and self.leaders.failed(endpoint, leader_address, self.tried)

    def next_wait_s(self, endpoint: Endpoint, error: CallError) -> float | None:
        """Return how long to wait before the next attempt, or None if a standby's answer has to do.

        Raises:
            CallError: the error itself, if neither another planner nor waiting can help. Its ``changed`` is ``unknown``
                if an earlier attempt may have been carried out, whatever the planner reports for the last one.
        """
        if self.is_of_standby and error.is_unreachable:
            return 0.0 if self._asks_another(endpoint, leader_of(error)) else None
        wait_s = self._wait_s(endpoint, error)
        if wait_s is None:
            raise self._of_all_attempts(error)
        self._is_in_doubt |= self.may_change and not _changed_nothing(error)
        if error.reason not in ("", *_REFUSED_AT_ONCE):
            self._refusal = error
        return wait_s

    def _wait_s(self, endpoint: Endpoint, error: CallError) -> float | None:
        """Return how long to wait before the next attempt, or None if there is no point in one."""
        several = self.leaders.are_several
        is_elsewhere = error.reason == NOT_LEADER
        is_silence = error.code is grpc.StatusCode.DEADLINE_EXCEEDED and error.reason == ""
        if error.code is not grpc.StatusCode.UNAVAILABLE and not (several and is_silence):
            return None
        goes_on = self.leaders.failed(endpoint, leader_of(error), self.tried)
        if not is_elsewhere and not several:
            return None  # gRPC retries a single planner
        if goes_on:
            wait_s = 0.0
        elif not several:
            return None
        else:
            self.tried.clear()
            longest_s = min(FIRST_WAIT_S * 2.0**self._num_waits, LONGEST_WAIT_S)
            self._num_waits += 1
            wait_s = longest_s * (0.5 + 0.5 * random.random())
        return None if self.clock() + wait_s >= self.end_s else wait_s

    def _of_all_attempts(self, error: CallError) -> CallError:
        """Return the error of the call, which says first what became of it: a refusal speaks of its own attempt."""
        refusal, message = self._refusal, str(error)
        if refusal is not None and error.reason in _REFUSED_AT_ONCE:  # the last one was by chance not the leader's
            message += f"; one before was refused: {refusal}"
        if refusal is not None and not error.reason and error.is_unreachable:
            doubt = "the call may have been carried out: " if self.may_change else ""
            message = f"{doubt}no planner answered its last attempt ({error}); one before was refused: {refusal}"
            self._is_in_doubt, error = self.may_change, refusal
        # A leader's refusal covers all attempts: had one been carried out, its answer would have been repeated.
        elif self._is_in_doubt and error.code in _NO_ANSWER:
            message = f"an earlier attempt of this call may have been carried out; its last one: {message}"
        elif message == str(error):
            return error
        return CallError(
            message,
            code=error.code,
            reason=error.reason,
            metadata={**error.metadata, "changed": "unknown"} if self._is_in_doubt else error.metadata,
            violations=error.violations,
            retry_after_s=error.retry_after_s,
        )


def attempts_of(leaders: LeaderSearch, request: Any, timeout_s: float | None) -> Attempts:
    """Return the attempts of a call that begins now; a timeout of None is the default deadline."""
    return Attempts(
        leaders=leaders,
        end_s=time.monotonic() + (DEFAULT_DEADLINE_S if timeout_s is None else timeout_s),
        clock=time.monotonic,
        may_change=bool(getattr(request, "request_id", "")),
    )


def _changed_nothing(error: CallError) -> bool:
    """Return whether a failed attempt certainly changed nothing."""
    changed = error.metadata.get("changed")
    return changed == "no" or (changed is None and error.reason in _REFUSED_AT_ONCE)
