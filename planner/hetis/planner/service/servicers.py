"""Services of the API, from the parts of a term that carry out their methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from hetis.planner.service.methods import SERVICES
from hetis.planner.service.server import Servicing
from hetis.v1.agent_service_pb2_grpc import add_AgentServiceServicer_to_server
from hetis.v1.audit_service_pb2_grpc import add_AuditServiceServicer_to_server
from hetis.v1.cluster_service_pb2_grpc import add_ClusterServiceServicer_to_server
from hetis.v1.dispatch_service_pb2_grpc import add_DispatchServiceServicer_to_server
from hetis.v1.plan_service_pb2_grpc import add_PlanServiceServicer_to_server
from hetis.v1.profile_service_pb2_grpc import add_ProfileServiceServicer_to_server

_ADD: Mapping[str, Callable[[Any, Any], None]] = {
    "ClusterService": add_ClusterServiceServicer_to_server,
    "ProfileService": add_ProfileServiceServicer_to_server,
    "PlanService": add_PlanServiceServicer_to_server,
    "DispatchService": add_DispatchServiceServicer_to_server,
    "AuditService": add_AuditServiceServicer_to_server,
    "AgentService": add_AgentServiceServicer_to_server,
}


def servicing(service: str, parts: object) -> Servicing:
    """Return a service of the API. Raises AttributeError if ``parts`` lack what carries out one of its methods."""
    handlers = {name: attrgetter(method.handler)(parts) for name, method in SERVICES[service].items()}
    servicer = SimpleNamespace(**{name: _without_context(handler) for name, handler in handlers.items()})
    return Servicing(service=f"hetis.v1.{service}", servicer=servicer, add=_ADD[service])


def _without_context(method: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the method in gRPC's form; whether it answers once or with a stream, `Calls` awaits or iterates it."""
    return lambda request, _context: method(request)
