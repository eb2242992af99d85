"""The rights of callers: the roles that each method requires, and which methods require the leader."""

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
        (CallerRole.VIEWER,): "SolveDispatch SolveRedispatch",
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
"""The roles by ``/package.Service/Method``, one of which a caller must have."""

CONNECT = "/hetis.v1.AgentService/ConnectNode"
HEALTH_SERVICE = "grpc.health.v1.Health"
REFLECTION_SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
OPEN_SERVICES = (HEALTH_SERVICE, *REFLECTION_SERVICES)
"""Services for probes and tools: callable without credentials and without a deadline. They reveal only public facts.
"""


def is_open(method: str) -> bool:
    """Return whether a method's service requires neither a role nor a deadline."""
    return method.split("/")[1] in OPEN_SERVICES


_STANDBY = {
    "AuditService": "ListAuditedChanges",
    "DispatchService": "SolveDispatch SolveRedispatch",
    "ClusterService": "GetCluster ListClusters GetReplica ListReplicas GetRedispatch ListRedispatches",
    "ProfileService": "GetProfile ListProfiles",
    "PlanService": "GetPlan ListPlans ExplainPlan DiffPlans ReadPlanDocument",
}
STANDBY_READS = {f"/hetis.v1.{service}/{method}" for service, found in _STANDBY.items() for method in found.split()}
"""Methods that any planner answers from the store. Agents' live reports and watches need the leader."""

_LIVE = {"ClusterService": "GetCluster ListClusters GetReplica ListReplicas", "PlanService": "GetPlan ListPlans"}
LIVE_READS = {f"/hetis.v1.{service}/{method}" for service, found in _LIVE.items() for method in found.split()}
"""Those of `STANDBY_READS` whose answers have fields that only the leader knows: agents, reports and progress."""


def needs_leader(method: str, *, reads_too: bool) -> bool:
    """Return whether only the leader may answer a method.

    Args:
        method: in gRPC's form, ``/package.Service/Method``.
        reads_too: whether to include methods that only read live state; if False, only those that make decisions.
    """
    if is_open(method) or method in STANDBY_READS:
        return False
    return reads_too or (CallerRole.VIEWER not in NEEDED.get(method, ()) and method != CONNECT)


def has_role(identity: Identity, method: str) -> bool:
    """Return whether the caller has one of the roles that the method requires."""
    return not identity.roles.isdisjoint(NEEDED.get(method, ()))


def require_role(identity: Identity, method: str, resource: str = "") -> None:
    """Check that the caller has a role that the method requires. Raises ROLE if not.

    ``resource`` is the name of the resource in the request, or "" if it has none.
    """
    if has_role(identity, method):
        return
    needed = NEEDED.get(method, ())
    has = identity.role or "no role"
    wants = " or ".join(needed) or "a role that does not exist"
    message = f"{method} needs role {wants}; {identity.name} has {has}"
    if resource:
        message += f"; the request is for {resource}"
    raise ServiceError(Reason.ERROR_REASON_ROLE, message, metadata={"role": has, "needed": wants})
