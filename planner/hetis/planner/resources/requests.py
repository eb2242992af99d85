"""Changes that are done once, and to the end: whatever callers repeat, and whenever they stop waiting."""

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
_under_way = set[asyncio.Task[Any]]()  # the loop itself keeps tasks weakly


@dataclass(frozen=True, slots=True)
class CallAnswer(Generic[A]):
    """The answer of a changing call. ``is_new``: it was done now; False: before, and this is what was answered then."""

    response: A
    is_new: bool


def once(tx: Transaction, request: Message, response: type[A], work: Callable[[], A]) -> CallAnswer[A]:
    """Does ``work`` unless the same request was done with its ``request_id`` in the last 24 hours.

    Args:
        tx: the transaction in which ``work`` changes what it does.
        request: has a field ``request_id``, empty or a UUID, whose letters may be of either case.
        response: the class of the answer.
        work: what to do, and the answer.

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
    """A line of the audit log, in the transaction of what it is about."""
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
    """The name of the resource in the first of these fields that has one; as text or as the resource."""
    for field in fields:
        if field in message.DESCRIPTOR.fields_by_name:
            value = getattr(message, field)
            name = value if isinstance(value, str) else getattr(value, "name", "")
            if isinstance(name, str) and name:
                return name
    return ""


def fingerprint(request: Message) -> str:
    """Equal for requests that ask for the same; the id itself left out."""
    asked = type(request)()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns; it goes on when the caller is cancelled.

    A call whose deadline passes while its transaction commits must still tell watchers and fleet what it changed.
    """
    task = asyncio.ensure_future(work)
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    return await asyncio.shield(task)
