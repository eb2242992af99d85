"""What is done to every call before it leaves: a deadline, credentials, and an id where it changes something."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import Message

from hetis.planner.client.connection import Connection, default_deadline_s

M = TypeVar("M")


class CallDetails(NamedTuple):
    """What gRPC's interceptors hand on; both of its own classes have these fields, and neither can be made."""

    method: Any
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any = None


def prepared_details(details: Any, connection: Connection, *, unary: bool) -> CallDetails:
    """The details with what the caller left open. Streams get no deadline: a watch is for ever."""
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
    """The request with a ``request_id`` if it has such a field and it is empty; the caller's message stays as it is."""
    if not isinstance(request, Message) or "request_id" not in request.DESCRIPTOR.fields_by_name:
        return request
    if getattr(request, "request_id"):  # noqa: B009  # which message it is, is not known here
        return request
    named = type(request)()
    named.CopyFrom(request)
    setattr(named, "request_id", str(new_id()))  # noqa: B010
    return named
