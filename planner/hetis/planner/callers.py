"""The caller on whose behalf something is done: the one of the call that is being answered, or the planner itself."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody who changes things.

    Attributes:
        name: of a token or a certificate; what quotas count by.
        role: that the credentials were given for.
    """

    name: str
    role: str


PLANNER = Caller(name="planner", role="planner")
"""The planner itself: proposals, and what it begins again after a restart."""

_present: ContextVar[Caller] = ContextVar("hetis_present_caller", default=PLANNER)


def present_caller() -> Caller:
    """Return the caller that asked for what this task does."""
    return _present.get()


def set_present_caller(caller: Caller) -> None:
    """Set the caller for the rest of this task, and for the tasks that it starts."""
    _present.set(caller)
