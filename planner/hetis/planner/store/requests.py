"""Completed requests by the id that their caller gave them: a repeated one gets the same answer and is not redone."""

from __future__ import annotations

import sqlalchemy as sa

import hetis.planner.store.schema as schema
from hetis.planner.failures import Reason, ServiceError

KEPT_S = 24 * 3600.0  # see docs/api.md


class RequestTable:
    """Answers to requests of the last 24 hours, written in the transaction that carried out the request."""

    def __init__(self, connection: sa.Connection, *, now_s: float) -> None:
        self._connection = connection
        self._now_s = now_s

    def replay(self, method: str, request_id: str, fingerprint: str) -> bytes | None:
        """Return the answer that the same request got, or None if it was not done before or gave no id.

        Args:
            method: such as ``/hetis.v1.ClusterService/CreateCluster``.
            request_id: empty if the caller gave none.
            fingerprint: equal for equal requests.

        Raises:
            ServiceError: REQUEST_ID_REUSED.
        """
        if not request_id:
            return None
        table = schema.requests
        query = sa.select(table.c.method, table.c.fingerprint, table.c.response).where(
            table.c.request_id == request_id, table.c.end_time_s > self._now_s
        )
        row = self._connection.execute(query).one_or_none()
        if row is None:
            return None
        if (row.method, row.fingerprint) != (method, fingerprint):
            raise ServiceError(
                Reason.ERROR_REASON_REQUEST_ID_REUSED,
                f"request_id {request_id} was used for another request; take a new one",
                metadata={"request_id": request_id},
            )
        return bytes(row.response)

    def remember(self, method: str, request_id: str, fingerprint: str, response: bytes) -> None:
        """Store the answer to a request that has just been done, and forget old ones."""
        if not request_id:
            return
        table = schema.requests
        self._connection.execute(sa.delete(table).where(table.c.end_time_s <= self._now_s))
        self._connection.execute(
            sa.insert(table).values(
                request_id=request_id,
                method=method,
                fingerprint=fingerprint,
                response=response,
                end_time_s=self._now_s + KEPT_S,
            )
        )
