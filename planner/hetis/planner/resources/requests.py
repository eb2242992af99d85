"""Changes that are made exactly once and completely, however often callers repeat a request or stop waiting for it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from hetis.planner.callers import present_caller
from hetis.planner.resources.answered_documents import with_documents, without_documents
from hetis.planner.store import AuditedChange, Transaction, audit

A = TypeVar("A", bound=Message)
T = TypeVar("T")
RESOURCES = ("cluster", "profile", "plan", "node")
_under_way = set[asyncio.Task[Any]]()  # the loop itself only has weak references to tasks


@dataclass(frozen=True, slots=True)
class CallAnswer(Generic[A]):
    """The answer of a changing call. If not ``is_new``, the change and the answer were made before."""

    response: A
    is_new: bool


def once(tx: Transaction, request: Message, response: type[A], work: Callable[[], A]) -> CallAnswer[A]:
    """Do ``work`` unless the same request was done with its ``request_id`` in the last 24 hours.

    Args:
        tx: the transaction in which ``work`` makes its changes.
        request: has a field ``request_id``, empty or a UUID in either case.
        response: the class of the answer.
        work: makes the changes and returns the answer.

    Raises:
        ServiceError: REQUEST_ID_REUSED.
    """
    request_id: str = request.request_id.lower()  # type: ignore[attr-defined]
    method, print_ = request.DESCRIPTOR.full_name, fingerprint(request)
    earlier = tx.requests.replay(method, request_id, print_)
    if earlier is not None:
        answered = response.FromString(earlier)
        _write_down(tx, request, answered, audit.REPEATED)
        return CallAnswer(with_documents(answered, tx), is_new=False)
    answer = work()
    _write_down(tx, request, answer, audit.OK)
    if request_id:
        tx.requests.remember(method, request_id, print_, without_documents(answer).SerializeToString())
    return CallAnswer(answer, is_new=True)


def _write_down(tx: Transaction, request: Message, answer: Message, outcome: str) -> None:
    """Add a line to the audit log, in the transaction of the change."""
    caller, plan = present_caller(), named_in(answer, "plan")
    tx.audit.append(
        AuditedChange(
            caller=caller.name,
            role=caller.role,
            method=request.DESCRIPTOR.name.removesuffix("Request"),
            resource=named_in(request, "name", "cluster", "profile", "node") or named_in(answer, *RESOURCES),
            request_id=request.request_id,  # type: ignore[attr-defined]
            plan=plan,
            outcome=outcome,
        ),
        time_s=tx.now_s,
    )


def named_in(message: Message, *fields: str) -> str:
    """Return the resource name in the first of these fields that has one, as text or in a message; or ""."""
    for field in fields:
        if field in message.DESCRIPTOR.fields_by_name:
            value = getattr(message, field)
            name = value if isinstance(value, str) else getattr(value, "name", "")
            if isinstance(name, str) and name:
                return name
    return ""


def fingerprint(request: Message) -> str:
    """Return a digest that is equal for equal requests, regardless of their ids."""
    asked = type(request)()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``, which is completed even if the caller is cancelled.

    A call whose deadline passes while its transaction commits must still tell watchers and fleet what it changed.
    """
    task = asyncio.ensure_future(work)
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    return await asyncio.shield(task)
