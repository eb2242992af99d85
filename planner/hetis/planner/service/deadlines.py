"""Every unary call says how long its caller waits."""

from __future__ import annotations

from hetis.planner.failures import Reason, ServiceError

LONGEST_S = 60.0
LONGEST_OF_DISPATCH_S = 10.0
_CLOCKS_S = 0.5  # a deadline is rounded up on its way, and counted on two clocks


def longest_s(method: str) -> float:
    """The farthest deadline of a unary method."""
    return LONGEST_OF_DISPATCH_S if method.startswith("/hetis.v1.DispatchService/") else LONGEST_S


def require_deadline(method: str, remaining_s: float | None) -> None:
    """
    Raises:
        ServiceError: DEADLINE_REQUIRED or DEADLINE_TOO_LONG.
    """
    most_s = longest_s(method)
    if remaining_s is None:
        raise ServiceError(
            Reason.ERROR_REASON_DEADLINE_REQUIRED,
            f"{method} has no deadline: set one, of at most {most_s:g} s",
            metadata={"max_s": f"{most_s:g}"},
        )
    if remaining_s > most_s + _CLOCKS_S:
        raise ServiceError(
            Reason.ERROR_REASON_DEADLINE_TOO_LONG,
            f"{method} has a deadline in {remaining_s:.0f} s: it may be {most_s:g} s away at most",
            metadata={"max_s": f"{most_s:g}"},
        )
