"""The present caller: the one whose call is being answered, or the planner itself."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody who changes things.

    Attributes:
        name: of a token or a certificate; quotas count by it.
        role: of the credentials.
    """

    name: str
    role: str


PLANNER = Caller(name="planner", role="planner")
"""The planner itself: proposals, and work resumed after a restart."""

_present: ContextVar[Caller] = ContextVar("hetis_present_caller", default=PLANNER)


def present_caller() -> Caller:
    """Return the caller on whose behalf this task works."""
    return _present.get()


def set_present_caller(caller: Caller) -> None:
    """Set the caller for the rest of this task, and for the tasks it starts."""
    _present.set(caller)
