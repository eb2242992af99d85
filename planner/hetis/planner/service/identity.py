"""The identity of a caller: a name for logs, roles, and for an agent the nodes that it speaks for."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from hetis.planner.callers import Caller, set_present_caller
from hetis.planner.failures import Reason, ServiceError


class CallerRole(StrEnum):
    """A role of credentials. AGENT stands apart: its own node's stream, and dispatch."""

    VIEWER = "viewer"
    ORCHESTRATOR = "orchestrator"
    ADMIN = "admin"
    AGENT = "agent"

    @property
    def includes(self) -> frozenset[CallerRole]:
        """The role itself and the roles that it implies."""
        return _INCLUDES[self]


_INCLUDES = {
    CallerRole.VIEWER: frozenset({CallerRole.VIEWER}),
    CallerRole.ORCHESTRATOR: frozenset({CallerRole.VIEWER, CallerRole.ORCHESTRATOR}),
    CallerRole.ADMIN: frozenset({CallerRole.VIEWER, CallerRole.ORCHESTRATOR, CallerRole.ADMIN}),
    CallerRole.AGENT: frozenset({CallerRole.AGENT}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller.

    Attributes:
        name: for logs; the name of a token or of a certificate.
        roles: those granted, with all that they imply.
        scope: for agents, the node (``clusters/c/nodes/n``) or the cluster (``clusters/c``: any of its nodes) of the
            credentials; None for any node, which only a planner without credentials grants.
    """

    name: str
    roles: frozenset[CallerRole]
    scope: str | None = None

    @property
    def role(self) -> str:
        """The roles that no other one implies, as text."""
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

    def require_node(self, node: str) -> None:
        """Check that the caller may act as the agent of a node.

        Raises:
            ServiceError: WRONG_NODE if the credentials are for another node.
        """
        if not self.speaks_for(node):
            raise ServiceError(
                Reason.ERROR_REASON_WRONG_NODE,
                f"the credentials {self.name} are of {self.scope or 'no node'}, not of {node}",
                metadata={"node": node},
            )


ANYBODY = Identity(name="local", roles=frozenset(CallerRole))
"""Every caller of a planner that asks for no credentials, which listens on loopback only."""

_caller: ContextVar[Identity] = ContextVar("hetis_caller")


def caller() -> Identity:
    """Return the caller of the current call, which the interceptor has set before the servicer runs."""
    return _caller.get()


def set_caller(identity: Identity) -> None:
    """Set the caller for the rest of this task, which is one call, and for the tasks that it starts."""
    _caller.set(identity)
    set_present_caller(Caller(name=identity.name, role=identity.role))
