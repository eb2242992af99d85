"""AuditService: its one call is passed to the resource."""

# ruff: noqa: N802  # gRPC's names

from __future__ import annotations

from typing import Any

import grpc

from hetis.planner.resources.audited_changes import AuditedChanges
from hetis.v1 import audit_service_pb2 as pb
from hetis.v1 import audit_service_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class AuditServicer(audit_service_pb2_grpc.AuditServiceServicer):
    def __init__(self, changes: AuditedChanges) -> None:
        self._changes = changes

    async def ListAuditedChanges(
        self, request: pb.ListAuditedChangesRequest, context: Context
    ) -> pb.ListAuditedChangesResponse:
        return await self._changes.list(request)
