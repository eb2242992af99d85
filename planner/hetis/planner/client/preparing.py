"""The preparation of every call: a deadline, credentials, and a request id if it changes something."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import Message

from hetis.planner.client.connection import Connection, default_deadline_s

M = TypeVar("M")


class CallDetails(NamedTuple):
    """The details that gRPC's interceptors pass on.

    Both its own classes have these fields, and neither can be constructed.
    """

    method: Any
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any = None


def prepared_details(details: Any, connection: Connection, *, unary: bool) -> CallDetails:
    """Return the details with the caller's gaps filled. Streams get no deadline: a watch never ends."""
    timeout = details.timeout
    if timeout is None and unary:
        method = details.method.decode() if isinstance(details.method, bytes) else str(details.method)
        timeout = default_deadline_s(method)
    given = list(details.metadata or ())
    if not any(key == "authorization" for key, _ in given):
        given += connection.metadata()
    return CallDetails(
        method=details.method,
        timeout=timeout,
        metadata=given,
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
        compression=getattr(details, "compression", None),
    )


def prepared_request(request: M, new_id: Callable[[], uuid.UUID] = uuid.uuid4) -> M:
    """Return a copy of the request with a ``request_id`` if it has an empty field for it, else the request."""
    if not isinstance(request, Message) or "request_id" not in request.DESCRIPTOR.fields_by_name:
        return request
    if getattr(request, "request_id"):  # noqa: B009  # which message it is, is not known here
        return request
    named = type(request)()
    named.CopyFrom(request)
    setattr(named, "request_id", str(new_id()))  # noqa: B010
    return named
