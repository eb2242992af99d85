"""What callers may: the roles that each method needs, and which methods need the leader."""

from __future__ import annotations

from hetis.planner.callers import CallerRole, Identity
from hetis.planner.failures import Reason, ServiceError

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
HEALTH_SERVICE = "grpc.health.v1.Health"
REFLECTION_SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
OPEN_SERVICES = (HEALTH_SERVICE, *REFLECTION_SERVICES)
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
