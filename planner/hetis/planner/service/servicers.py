"""Services of the API, from the rows of their methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from hetis.planner.service.methods import SERVICES, Method
from hetis.planner.service.server import Servicing
from hetis.v1.agent_service_pb2_grpc import add_AgentServiceServicer_to_server
from hetis.v1.cluster_service_pb2_grpc import add_ClusterServiceServicer_to_server
from hetis.v1.dispatch_service_pb2_grpc import add_DispatchServiceServicer_to_server
from hetis.v1.plan_service_pb2_grpc import add_PlanServiceServicer_to_server
from hetis.v1.profile_service_pb2_grpc import add_ProfileServiceServicer_to_server

_ADD: Mapping[str, Callable[[Any, Any], None]] = {
    "ClusterService": add_ClusterServiceServicer_to_server,
    "ProfileService": add_ProfileServiceServicer_to_server,
    "PlanService": add_PlanServiceServicer_to_server,
    "DispatchService": add_DispatchServiceServicer_to_server,
    "AgentService": add_AgentServiceServicer_to_server,
}


def servicing(service: str, answer: Callable[[Method, Any, Any], Any]) -> Servicing:
    """Return a service of the API; ``answer`` is called with the row of a method, the request and gRPC's context."""
    handlers = {name: partial(answer, method) for name, method in SERVICES[service].items()}
    return Servicing(service=f"hetis.v1.{service}", servicer=SimpleNamespace(**handlers), add=_ADD[service])
