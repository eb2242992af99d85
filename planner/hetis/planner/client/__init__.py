"""Typed clients of the planning service, sync and asyncio, which need only the base install.

    from hetis.planner.client import Client

    with Client("127.0.0.1:8470") as client:
        plan = client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name="plans/night")).plan

`client.plans`, `client.clusters`, `client.profiles` and `client.dispatch` are the stubs that protobuf generates, so
every call is typed by the API. The channel below them gives every unary call a deadline and every changing call a
``request_id``, retries calls that may be retried, and raises `CallError` with the API's details.
"""

from __future__ import annotations

from hetis.planner.client.clients import AsyncClient, Client
from hetis.planner.client.connection import Connection, document_of_file
from hetis.planner.client.errors import CallError, Retries

__all__ = [
    "AsyncClient",
    "CallError",
    "Client",
    "Connection",
    "Retries",
    "document_of_file",
]
