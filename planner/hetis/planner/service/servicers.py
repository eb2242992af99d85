"""The methods of every service, as functions of a request or a stream of requests alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from hetis.planner.callers import present_caller
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.nodes import Nodes
from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.resources.plan_creation import PlanCreation
from hetis.planner.resources.plans import Plans
from hetis.planner.resources.profiles import Profiles
from hetis.planner.resources.watches import ClusterWatches, RunningResources
from hetis.planner.service.server import Servicing
from hetis.v1.agent_service_pb2_grpc import add_AgentServiceServicer_to_server
from hetis.v1.audit_service_pb2_grpc import add_AuditServiceServicer_to_server
from hetis.v1.cluster_service_pb2_grpc import add_ClusterServiceServicer_to_server
from hetis.v1.dispatch_service_pb2_grpc import add_DispatchServiceServicer_to_server
from hetis.v1.plan_service_pb2_grpc import add_PlanServiceServicer_to_server
from hetis.v1.profile_service_pb2_grpc import add_ProfileServiceServicer_to_server

Methods = Mapping[str, Callable[[Any], Any]]
_ADD: Mapping[str, Callable[[Any, Any], None]] = {
    "ClusterService": add_ClusterServiceServicer_to_server,
    "ProfileService": add_ProfileServiceServicer_to_server,
    "PlanService": add_PlanServiceServicer_to_server,
    "DispatchService": add_DispatchServiceServicer_to_server,
    "AuditService": add_AuditServiceServicer_to_server,
    "AgentService": add_AgentServiceServicer_to_server,
}


def servicing(service: str, methods: Methods) -> Servicing:
    """Return a service of the API from its methods by name; registering it fails if one is missing."""
    servicer = SimpleNamespace(**{name: _without_context(method) for name, method in methods.items()})
    return Servicing(service=f"hetis.v1.{service}", servicer=servicer, add=_ADD[service])


def _without_context(method: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the method in gRPC's form; whether it answers once or with a stream, `Calls` awaits or iterates it."""
    return lambda request, _context: method(request)


def cluster_methods(clusters: Clusters, nodes: Nodes, running: RunningResources, watches: ClusterWatches) -> Methods:
    return {
        "CreateCluster": clusters.create,
        "GetCluster": clusters.get,
        "ListClusters": clusters.list,
        "UpdateCluster": clusters.update,
        "DeleteCluster": clusters.delete,
        "WatchCluster": watches.watch,
        "GetInventory": nodes.inventory,
        "GetNode": nodes.get,
        "ListNodes": nodes.list,
        "DrainNode": nodes.drain,
        "UndrainNode": nodes.undrain,
        "DisconnectNode": nodes.disconnect,
        "GetReplica": running.get_replica,
        "ListReplicas": running.list_replicas,
        "GetRedispatch": running.get_redispatch,
        "ListRedispatches": running.list_redispatches,
    }


def profile_methods(profiles: Profiles) -> Methods:
    return {
        "CreateProfile": profiles.create,
        "GetProfile": profiles.get,
        "ListProfiles": profiles.list,
        "UpdateProfile": profiles.update,
        "DeleteProfile": profiles.delete,
    }


def plan_methods(creation: PlanCreation, plans: Plans, activation: PlanActivation) -> Methods:
    return {
        "CreatePlan": creation.create,
        "GetPlan": plans.get,
        "ListPlans": plans.list,
        "DeletePlan": plans.delete,
        "WatchPlan": plans.watch,
        "CancelPlan": plans.cancel,
        "ExplainPlan": plans.explain,
        "DiffPlans": plans.diff,
        "ReadPlanDocument": plans.read_document,
        "ActivatePlan": activation.activate,
        "RollbackPlan": activation.rollback,
    }


def agent_methods(fleet: LiveFleet) -> Methods:
    """Return the stream of an agent, as the node in its credentials; the fleet does the rest."""
    return {"ConnectNode": lambda requests: fleet.connect(present_caller(), requests)}
