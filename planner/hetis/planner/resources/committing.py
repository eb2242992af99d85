"""Changes that are made exactly once, answered as they were committed, and published whatever fails afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from hetis.planner.callers import present_caller
from hetis.planner.convert.clusters import without
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.resources.checks import is_uuid
from hetis.planner.store import AuditedChange, AuditLine, Store, Transaction, audit
from hetis.solver.errors import HetisError
from hetis.v1 import document_pb2

A = TypeVar("A", bound=Message)
T = TypeVar("T")
Publish = Callable[[], Awaitable[object]]
"""Publishes a committed change to watchers and passes it to the fleet. May be called again after it has failed."""
RESOURCES = ("cluster", "profile", "plan", "node")
MOST_KEPT_BYTES = 4096  # largest document in a stored answer; larger ones are in the resource itself
_LEFT_OUT = b"\0"  # marks an omitted document; no document has this content
_PUBLISH_S = 1.0  # how long an answer waits until its change is published, or until an unknown outcome is known
_AGAIN_S = 1.0  # pause before a change is published again, or looked for in the store
_LOOK_S = 30.0  # how long a change with an unknown outcome is looked for; a server ends broken connections earlier
_log = logging.getLogger("hetis.planner.resources")
_under_way = set[asyncio.Task[Any]]()  # the event loop itself holds only weak references to tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change(Generic[A]):
    """What a transaction is about to commit: the answer, the audit line, and what publishes the change."""

    answer: A
    line: AuditLine
    publish: Publish | None


async def change_once(
    store: Store, request: Message, response: type[A], work: Callable[[Transaction], tuple[A, Publish | None]]
) -> A:
    """Do ``work`` in one transaction, unless the same request was done with its ``request_id`` in the last 24 hours.

    The transaction is completed, and its changes are published, even if the caller is cancelled. What is committed is
    answered as done, and published as soon as the store permits. If the connection breaks during the commit, the audit
    log shows whether the change was made.

    Args:
        request: has a field ``request_id``, which is empty, or a UUID in upper or lower case.
        response: the class of the answer.
        work: makes the changes; returns the answer, and a function that then publishes the changes, or None.

    Raises:
        ServiceError: REQUEST_ID_REUSED.
    """

    async def change() -> A:
        tried = list[_Change[A]]()

        def once(tx: Transaction) -> None:
            tried.append(_once(request, response, work, tx))

        try:
            await store.write(once)
        except ServiceError as error:
            # After the end of a term the next leader reads what was committed.
            is_unknown = error.metadata.get("changed") == "unknown" and error.reason != Reason.ERROR_REASON_NOT_LEADER
            if not tried or not is_unknown:
                raise
            if not await _ends_soon(_publish_if_committed(store, tried[-1])):
                raise
        else:
            if (publish := tried[-1].publish) is not None:
                await _ends_soon(_publish(publish))
        return tried[-1].answer

    return await to_the_end(change())


def _once(
    request: Message, response: type[A], work: Callable[[Transaction], tuple[A, Publish | None]], tx: Transaction
) -> _Change[A]:
    request_id: str = request.request_id.lower()  # type: ignore[attr-defined]
    method, print_ = request.DESCRIPTOR.full_name, fingerprint(request)
    earlier = tx.requests.replay(method, request_id, print_)
    if earlier is not None:
        answered = response.FromString(earlier)
        line = write_down(tx, request, answered, audit.REPEATED)
        return _Change(answer=with_documents(answered, tx), line=line, publish=None)
    answer, publish = work(tx)
    line = write_down(tx, request, answer)
    if request_id:
        tx.requests.remember(method, request_id, print_, without_documents(answer).SerializeToString())
    return _Change(answer=answer, line=line, publish=publish)


async def _ends_soon(work: Coroutine[Any, Any, bool]) -> bool:
    """Return the result of ``work`` if it ends soon; otherwise it goes on, and the result is False."""
    task = _kept(work)
    task.add_done_callback(_report_bug)
    done, _ = await asyncio.wait({task}, timeout=_PUBLISH_S)
    return bool(done) and not task.cancelled() and task.exception() is None and task.result()


async def _publish(publish: Publish) -> bool:
    """Publish a committed change; tries again while the store is unavailable, which the fleet reads."""
    while True:
        try:
            await publish()
        except HetisError as error:
            _log.warning("a change is stored, but could not be published", extra={"why": str(error)})
            if not isinstance(error, ServiceError) or error.reason != Reason.ERROR_REASON_STORE_UNAVAILABLE:
                return True
            await asyncio.sleep(_AGAIN_S)
        else:
            return True


async def _publish_if_committed(store: Store, change: _Change[A]) -> bool:
    """Publish a change whose outcome is unknown once it is found in the store; return whether it was found."""
    for _ in range(round(_LOOK_S / _AGAIN_S)):
        try:
            lines = await store.read(lambda reader: reader.audit.page(change.line.number - 1, 1))
        except ServiceError:
            lines = []
        if lines:
            # Another line in its place means that it was not committed, and cannot be any more.
            is_committed = lines[0].hash == change.line.hash
            return is_committed and (change.publish is None or await _publish(change.publish))
        await asyncio.sleep(_AGAIN_S)
    return False


async def answered_before(store: Store, request: Message, response: type[A], error: HetisError) -> A:
    """Return the answer to the same request if it was done before under its ``request_id``, or raise ``error``.

    For calls that find an error before they reach `change_once`: what a request needed may be gone once it is done, but
    repeating it must not look as if it had not been done.
    """
    is_repeatable = is_uuid(request.request_id)  # type: ignore[attr-defined]
    if not is_repeatable or getattr(request, "validate_only", False):
        raise error

    def refuse(_tx: Transaction) -> tuple[A, None]:
        raise error

    return await change_once(store, request, response, refuse)


def write_down(tx: Transaction, request: Message, answer: Message, outcome: str = audit.OK) -> AuditLine:
    """Add a line to the audit log in the transaction of the change; `change_once` calls it for its changes."""
    caller, plan = present_caller(), named_in(answer, "plan")
    return tx.audit.append(
        AuditedChange(
            caller=caller.name,
            role=caller.role or caller.name,  # the planner itself has no role
            method=request.DESCRIPTOR.name.removesuffix("Request"),
            resource=named_in(request, "name", "cluster", "profile", "node") or named_in(answer, *RESOURCES),
            request_id=getattr(request, "request_id", ""),
            plan=plan,
            outcome=outcome,
        ),
        time_s=tx.now_s,
    )


def named_in(message: Message, *fields: str) -> str:
    """Return the resource name in the first of these fields that has one, as text or in a message, or else ""."""
    for field in _present_fields(message.DESCRIPTOR, fields):
        value = getattr(message, field)
        name = value if isinstance(value, str) else getattr(value, "name", "")
        if isinstance(name, str) and name:
            return name
    return ""


@cache
def _present_fields(message: Descriptor, fields: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(field for field in fields if field in message.fields_by_name)


def fingerprint(request: Message) -> str:
    """Return a digest that is equal for requests that are equal apart from their ids."""
    return hashlib.sha256(without(request, "request_id").SerializeToString(deterministic=True)).hexdigest()


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``, which is completed even if the caller is cancelled.

    If its deadline passes while its transaction commits, a call must still inform watchers and the fleet of its
    changes.
    """
    task = _kept(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_report_bug)
        raise


def _kept(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    task = asyncio.ensure_future(work)
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    return task


def _report_bug(task: asyncio.Task[Any]) -> None:
    """Log the error of work whose caller no longer waits if it is a bug; a refusal concerned that caller alone."""
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, HetisError):
        _log.error("a change whose caller no longer waits failed", exc_info=error)


def without_documents(answer: A) -> A:
    """Return a copy in which large documents are replaced by a mark."""
    kept = deepcopy(answer)
    for document in _documents(kept):
        if len(document.content) > MOST_KEPT_BYTES:
            document.content = _LEFT_OUT
        if len(document.text) > MOST_KEPT_BYTES:
            document.text = _LEFT_OUT
    return kept


def with_documents(answer: A, tx: Transaction) -> A:
    """Return the answer with its documents restored; those that the resource no longer has are empty."""
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
