"""The methods of the API: the role that each requires, which planners answer it, and what carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from hetis.planner.callers import CallerRole, Identity
from hetis.planner.failures import Reason, ServiceError


class AnsweredBy(Enum):
    """The planners that answer a method. Agents' live reports and watches need the leader."""

    LEADER = "leader"
    ANY = "any"  # any planner, from the store
    ANY_IN_PART = "any in part"  # any, without fields that only the leader knows: agents, reports and progress


@dataclass(frozen=True, slots=True)
class Method:
    """One method; ``handler`` is what carries it out, as a path in the parts of a term."""

    role: CallerRole
    handler: str
    answered_by: AnsweredBy = AnsweredBy.LEADER

    def carry_out(self, parts: object, request: Any) -> Any:
        """Return the answer of the parts of a term to a request: an awaitable, or an iterator of a stream's answers."""
        return attrgetter(self.handler)(parts)(request)

    @property
    def is_read(self) -> bool:
        return self.role is CallerRole.VIEWER or self.answered_by is not AnsweredBy.LEADER


_VIEWER, _ORCHESTRATOR, _ADMIN = CallerRole.VIEWER, CallerRole.ORCHESTRATOR, CallerRole.ADMIN
_ANY, _ANY_IN_PART = AnsweredBy.ANY, AnsweredBy.ANY_IN_PART
SERVICES: dict[str, dict[str, Method]] = {
    "ClusterService": {
        "CreateCluster": Method(_ORCHESTRATOR, "clusters.create"),
        "GetCluster": Method(_VIEWER, "clusters.get", _ANY_IN_PART),
        "ListClusters": Method(_VIEWER, "clusters.list", _ANY_IN_PART),
        "UpdateCluster": Method(_ORCHESTRATOR, "clusters.update"),
        "DeleteCluster": Method(_ADMIN, "clusters.delete"),
        "WatchCluster": Method(_VIEWER, "watches.watch"),
        "GetInventory": Method(_VIEWER, "nodes.inventory"),
        "GetNode": Method(_VIEWER, "nodes.get"),
        "ListNodes": Method(_VIEWER, "nodes.list"),
        "DrainNode": Method(_ORCHESTRATOR, "nodes.drain"),
        "UndrainNode": Method(_ORCHESTRATOR, "nodes.undrain"),
        "DisconnectNode": Method(_ADMIN, "nodes.disconnect"),
        "GetReplica": Method(_VIEWER, "running.get_replica", _ANY_IN_PART),
        "ListReplicas": Method(_VIEWER, "running.list_replicas", _ANY_IN_PART),
        "GetClusterTraffic": Method(_VIEWER, "traffic.get"),
        "GetRedispatch": Method(_VIEWER, "running.get_redispatch", _ANY),
        "ListRedispatches": Method(_VIEWER, "running.list_redispatches", _ANY),
    },
    "ProfileService": {
        "CreateProfile": Method(_ORCHESTRATOR, "profiles.create"),
        "GetProfile": Method(_VIEWER, "profiles.get", _ANY),
        "ListProfiles": Method(_VIEWER, "profiles.list", _ANY),
        "UpdateProfile": Method(_ORCHESTRATOR, "profiles.update"),
        "DeleteProfile": Method(_ADMIN, "profiles.delete"),
    },
    "PlanService": {
        "CreatePlan": Method(_ORCHESTRATOR, "creation.create"),
        "GetPlan": Method(_VIEWER, "plans.get", _ANY_IN_PART),
        "ListPlans": Method(_VIEWER, "plans.list", _ANY_IN_PART),
        "DeletePlan": Method(_ORCHESTRATOR, "plans.delete"),
        "WatchPlan": Method(_VIEWER, "plans.watch"),
        "CancelPlan": Method(_ORCHESTRATOR, "plans.cancel"),
        "ReadPlanDocument": Method(_VIEWER, "plans.read_document", _ANY),
        "ActivatePlan": Method(_ORCHESTRATOR, "activation.activate"),
        "RollbackPlan": Method(_ORCHESTRATOR, "activation.rollback"),
    },
    "DispatchService": {
        "SolveDispatch": Method(_VIEWER, "dispatch.solve_dispatch", _ANY),
        "SolveRedispatch": Method(_VIEWER, "dispatch.solve_redispatch", _ANY),
    },
    "AgentService": {"ConnectNode": Method(CallerRole.AGENT, "connect_node")},
}
METHODS = {
    f"/hetis.v1.{service}/{name}": method for service, found in SERVICES.items() for name, method in found.items()
}
"""All methods in gRPC's form, ``/package.Service/Method``."""

CONNECT = "/hetis.v1.AgentService/ConnectNode"
HEALTH_SERVICE = "grpc.health.v1.Health"
REFLECTION_SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
OPEN_SERVICES = (HEALTH_SERVICE, *REFLECTION_SERVICES)
"""Services for probes and tools: callable without credentials and without a deadline. They reveal only public facts."""
WRITES = frozenset(name for name, method in METHODS.items() if not method.is_read and name != CONNECT)
"""The methods that change something, whose rate is limited; a node has only one agent stream."""


def is_open(method: str) -> bool:
    """Return whether a method's service requires neither a role nor a deadline."""
    return method.split("/")[1] in OPEN_SERVICES


def needs_leader(method: str, *, reads_too: bool) -> bool:
    """Return whether only the leader may answer a method.

    ``reads_too``: whether to include methods that only read live state; if False, only those that make decisions.
    """
    found = METHODS.get(method)
    if is_open(method) or (found is not None and found.answered_by is not AnsweredBy.LEADER):
        return False
    return reads_too or found is None or method in WRITES


def has_role(identity: Identity, method: str) -> bool:
    """Return whether the caller has the role that the method requires."""
    found = METHODS.get(method)
    return found is not None and found.role in identity.roles


def require_role(identity: Identity, method: str, resource: str = "") -> None:
    """Check that the caller has the role that the method requires. Raises ROLE if not.

    ``resource`` is the name of the resource in the request, or "" if it has none.
    """
    if has_role(identity, method):
        return
    found = METHODS.get(method)
    has, wants = identity.role or "no role", "a role that does not exist" if found is None else found.role.value
    message = f"{method} needs role {wants}; {identity.name} has {has}"
    if resource:
        message += f"; the request is for {resource}"
    raise ServiceError(Reason.ERROR_REASON_ROLE, message, metadata={"role": has, "needed": wants})
