"""Callers: who they are, which roles they have, whose call is being answered, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum


class CallerRole(StrEnum):
    """The role of a caller's credentials. AGENT stands apart: it permits its own node's stream and dispatch only."""

    VIEWER = "viewer"
    ORCHESTRATOR = "orchestrator"
    ADMIN = "admin"
    AGENT = "agent"

    @property
    def includes(self) -> frozenset[CallerRole]:
        """The role itself and the roles that it implies."""
        if self is CallerRole.AGENT:
            return frozenset({self})
        ranked = (CallerRole.VIEWER, CallerRole.ORCHESTRATOR, CallerRole.ADMIN)
        return frozenset(ranked[: ranked.index(self) + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller."""

    name: str  # name of the token or certificate
    roles: frozenset[CallerRole]  # the granted roles and the roles that they imply
    # For agents: the node (``clusters/c/nodes/n``) or the cluster (``clusters/c``, any of its nodes) that the
    # credentials are valid for. None is any node, which only a planner without credentials grants.
    scope: str | None = None
    connection: str = ""  # of a caller without credentials, who is told apart from others by nothing else

    @property
    def account(self) -> str:
        """The name by which quotas are counted."""
        return f"{self.name} {self.connection}" if self.connection else self.name

    @property
    def role(self) -> str:
        """The caller's roles as text, without those that another one implies."""
        implied = {lower for role in self.roles for lower in role.includes if lower is not role}
        return ", ".join(sorted(self.roles - implied))

    def speaks_for(self, node: str) -> bool:
        """Return whether the caller may act as the agent of a node."""
        if CallerRole.AGENT not in self.roles:
            return False
        return self.scope is None or node == self.scope or node.startswith(f"{self.scope}/nodes/")

    def covers(self, other: Identity) -> bool:
        """Return whether the caller may do everything that the other may."""
        if not other.roles <= self.roles:
            return False
        if CallerRole.AGENT not in other.roles or self.scope in (None, other.scope):
            return True
        return other.scope is not None and other.scope.startswith(f"{self.scope}/nodes/")


ANYBODY = Identity(name="local", roles=frozenset(CallerRole))
"""The caller of every request to a planner that requires no credentials; such a planner listens on loopback only."""
PLANNER = Identity(name="planner", roles=frozenset())
"""The planner itself, as the caller of work that no client requested, such as proposals."""

_caller: ContextVar[Identity] = ContextVar("hetis_caller", default=PLANNER)


def present_caller() -> Identity:
    """Return the caller on whose behalf this task works."""
    return _caller.get()


def set_present_caller(caller: Identity) -> None:
    """Set the caller for the rest of this task, which is one call, and for the tasks that it starts."""
    _caller.set(caller)


class Turns:
    """Keeps every caller to ``most`` pieces of one kind of work at once; its others wait, those of others do not.

    The planner's own work never waits.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turns: dict[str, asyncio.Semaphore] = {}  # by account, of callers with work
        self._num: Counter[str] = Counter()  # of the pieces of each, with those that wait

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn of the present caller, and hold it."""
        caller = present_caller()
        if caller is PLANNER:
            yield
            return
        key = caller.account
        turns = self._turns.setdefault(key, asyncio.Semaphore(self._most))
        self._num[key] += 1
        try:
            async with turns:
                yield
        finally:
            self._num[key] -= 1
            if not self._num[key]:
                del self._turns[key], self._num[key]
