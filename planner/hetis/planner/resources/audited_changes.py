"""The audit log as an API resource."""

from __future__ import annotations

from dataclasses import asdict

from hetis.planner.convert.names import seconds_of, timestamp
from hetis.planner.resources.checks import Checks
from hetis.planner.resources.pages import read_page_request
from hetis.planner.store import AuditFilter, AuditLine, Store
from hetis.v1 import audit_service_pb2 as service_pb2

_TEXTS = ("caller", "method", "resource", "outcome")


class AuditedChanges:
    """Lines of the log, oldest first."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def list(self, request: service_pb2.ListAuditedChangesRequest) -> service_pb2.ListAuditedChangesResponse:
        checks = Checks()
        checks.request(request)
        for field in _TEXTS:
            checks.require(getattr(request, field).isprintable(), field, "holds characters that cannot be printed")
        checks.raise_if_wrong()
        which = AuditFilter(
            **{field: getattr(request, field) or None for field in _TEXTS},
            since_s=seconds_of(request.since_time) if request.HasField("since_time") else None,
            until_s=seconds_of(request.until_time) if request.HasField("until_time") else None,
        )
        page = read_page_request(request)
        after = page.after_number
        found = await self._store.read(lambda reader: reader.audit.page(after, page.num_read, which))
        lines, token = page.cut(found, lambda line: str(line.number))
        return service_pb2.ListAuditedChangesResponse(
            audited_changes=[_message(line) for line in lines], next_page_token=token
        )


def _message(line: AuditLine) -> service_pb2.AuditedChange:
    time = timestamp(line.time_s)
    return service_pb2.AuditedChange(
        number=line.number, time=time, epoch=line.epoch, hash=line.hash, **asdict(line.change)
    )
