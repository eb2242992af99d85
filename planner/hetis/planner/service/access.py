"""Who calls, and what they may: identities, and the roles that each method needs."""

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
        if self is CallerRole.AGENT:
            return frozenset({self})
        ranked = (CallerRole.VIEWER, CallerRole.ORCHESTRATOR, CallerRole.ADMIN)
        return frozenset(ranked[: ranked.index(self) + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller."""

    name: str  # for logs; the name of a token or of a certificate
    roles: frozenset[CallerRole]  # those granted, with all that they imply
    # For agents, the node (``clusters/c/nodes/n``) or the cluster (``clusters/c``: any of its nodes) of the
    # credentials; None for any node, which only a planner without credentials grants
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
        """Raise WRONG_NODE unless the caller may act as the agent of a node."""
        if not self.speaks_for(node):
            message = f"the credentials {self.name} are of {self.scope or 'no node'}, not of {node}"
            raise ServiceError(Reason.ERROR_REASON_WRONG_NODE, message, metadata={"node": node})


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


_TABLE: dict[str, dict[tuple[CallerRole, ...], str]] = {
    "hetis.v1.ClusterService": {
        (CallerRole.VIEWER,): (
            "GetCluster ListClusters WatchCluster GetInventory GetNode ListNodes GetReplica ListReplicas"
            " GetRedispatch ListRedispatches"
        ),
        (CallerRole.ORCHESTRATOR,): "CreateCluster UpdateCluster DrainNode UndrainNode",
        (CallerRole.ADMIN,): "DeleteCluster DisconnectNode",
    },
    "hetis.v1.ProfileService": {
        (CallerRole.VIEWER,): "GetProfile ListProfiles",
        (CallerRole.ORCHESTRATOR,): "CreateProfile UpdateProfile",
        (CallerRole.ADMIN,): "DeleteProfile",
    },
    "hetis.v1.PlanService": {
        (CallerRole.VIEWER,): "GetPlan ListPlans WatchPlan ExplainPlan DiffPlans ReadPlanDocument",
        (CallerRole.ORCHESTRATOR,): "CreatePlan DeletePlan CancelPlan ActivatePlan RollbackPlan",
    },
    "hetis.v1.DispatchService": {
        (CallerRole.ORCHESTRATOR, CallerRole.AGENT): (
            "AdmitRequests DispatchRequests FinishRequests GrowRequests UpdateDispatchState"
        ),
        (CallerRole.VIEWER, CallerRole.AGENT): "GetDispatchState",
    },
    "hetis.v1.AuditService": {(CallerRole.ADMIN,): "ListAuditedChanges"},
    "hetis.v1.AgentService": {(CallerRole.AGENT,): "ConnectNode"},
}
NEEDED: dict[str, tuple[CallerRole, ...]] = {
    f"/{service}/{method}": roles
    for service, rows in _TABLE.items()
    for roles, methods in rows.items()
    for method in methods.split()
}
"""The roles of which a caller needs one, by ``/package.Service/Method``."""

CONNECT = "/hetis.v1.AgentService/ConnectNode"
OPEN_SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
"""Services for probes and tools: anybody may call them, without a deadline. They reveal nothing that is not published.
"""


def is_open(method: str) -> bool:
    """Return whether a method's service requires no role and no deadline."""
    return method.split("/")[1] in OPEN_SERVICES


_STANDBY = {
    "AuditService": "ListAuditedChanges",
    "ClusterService": "GetCluster ListClusters GetReplica ListReplicas GetRedispatch ListRedispatches",
    "ProfileService": "GetProfile ListProfiles",
    "PlanService": "GetPlan ListPlans ExplainPlan DiffPlans ReadPlanDocument",
}
STANDBY_READS = {f"/hetis.v1.{service}/{method}" for service, found in _STANDBY.items() for method in found.split()}
"""Methods that a planner answers from the store without leading. Agents' live reports and watches need the leader."""


def needs_leader(method: str, *, reads_too: bool) -> bool:
    """Return whether only the leader may answer.

    Args:
        method: as gRPC has it.
        reads_too: whether to include methods that change nothing but read live state; if False, only those that decide.
    """
    if is_open(method) or method in STANDBY_READS:
        return False
    return reads_too or (CallerRole.VIEWER not in NEEDED.get(method, ()) and method != CONNECT)


def require_role(identity: Identity, method: str) -> None:
    """Check that the caller has a role that the method needs. Raises ROLE if the caller has none."""
    needed = NEEDED.get(method, ())
    if not identity.roles.isdisjoint(needed):
        return
    has = identity.role or "no role"
    wants = " or ".join(needed) or "a role that does not exist"
    message = f"{method} needs role {wants}; {identity.name} has {has}"
    raise ServiceError(Reason.ERROR_REASON_ROLE, message, metadata={"role": has, "needed": wants})
