"""Changes that are made exactly once and completely, however often callers repeat a request or stop waiting for it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from hetis.planner.callers import present_caller
from hetis.planner.store import AuditedChange, Transaction, audit
from hetis.v1 import document_pb2

A = TypeVar("A", bound=Message)
T = TypeVar("T")
RESOURCES = ("cluster", "profile", "plan", "node")
MOST_KEPT_BYTES = 4096  # of a document in a stored answer; the resource in the answer has larger ones already
_LEFT_OUT = b"\0"  # cannot be a document
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


def without_documents(answer: A) -> A:
    """Return a copy whose large documents are marked as left out."""
    kept = type(answer)()
    kept.CopyFrom(answer)
    for document in _documents(kept):
        if len(document.content) > MOST_KEPT_BYTES:
            document.content = _LEFT_OUT
        if len(document.text) > MOST_KEPT_BYTES:
            document.text = _LEFT_OUT
    return kept


def with_documents(answer: A, tx: Transaction) -> A:
    """Return the answer with its documents restored, or with empty ones that the resource has no longer."""
    missing = [document for document in _documents(answer) if _LEFT_OUT in (document.content, document.text)]
    if missing:
        known = {document.digest: document for body in _bodies(answer, tx) for document in _documents(body)}
        for document in missing:
            present = known.get(document.digest, document_pb2.Document())
            if document.content == _LEFT_OUT:
                document.content = present.content
            if document.text == _LEFT_OUT:
                document.text = present.text
    return answer


def _bodies(answer: Message, tx: Transaction) -> Iterator[Message]:
    """Yield the stored bodies of the resources in an answer."""
    for field, table in (("cluster", tx.clusters), ("profile", tx.profiles), ("plan", tx.plans)):
        if field in answer.DESCRIPTOR.fields_by_name and answer.HasField(field):
            record = table.get(getattr(answer, field).name)
            if record is not None:
                yield record.body


def _documents(message: Message) -> Iterator[document_pb2.Document]:
    if isinstance(message, document_pb2.Document):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in value if field.is_repeated else (value,):
            yield from _documents(part)
