"""Requests: checks that find all invalid fields, pages of lists, and changes that are made exactly once."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import logging
import math
import uuid
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

from hetis.formats.errors import DocumentError
from hetis.planner.callers import present_caller
from hetis.planner.convert.clusters import without
from hetis.planner.convert.names import ID_RULE, NameForm, is_id
from hetis.planner.failures import Reason, ServiceError, etag_mismatch, invalid_document, invalid_fields
from hetis.planner.store import AuditedChange, Reader, Store, Transaction, audit, etag_of
from hetis.planner.store.records import Record
from hetis.planner.store.tables import Filter, RecordKind
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.errors import HetisError
from hetis.v1 import document_pb2, failure_pb2

V = TypeVar("V")
State = TypeVar("State", bound=int)
_SHOWN = 80  # characters of an invalid value in a message
_SHOWN_STATES = 5
_MOST_PATHS = 100  # in an update mask; no resource has so many fields


class Checks:
    """Collects the errors of one request, to raise them together."""

    def __init__(self) -> None:
        self._violations: list[failure_pb2.FieldViolation] = []
        self._documents: list[ServiceError] = []

    def require(self, is_right: bool, field: str, description: str) -> bool:
        """Record ``description`` as an error of ``field`` unless ``is_right``; return ``is_right``."""
        if not is_right:
            self._violations.append(failure_pb2.FieldViolation(field=field, description=description))
        return is_right

    def request(self, request: Any, *, optional: Collection[str] = (), **forms: NameForm) -> None:
        """Check names (``optional`` ones may be empty), and ``request_id`` and ``page_size`` if there are any."""
        for field, form in forms.items():
            if getattr(request, field) or field not in optional:
                self.name(field, getattr(request, field), form)
        fields = request.DESCRIPTOR.fields_by_name
        if "request_id" in fields and request.request_id:
            is_uuid = _is_uuid(request.request_id)
            self.require(is_uuid, "request_id", f"is {_shown(request.request_id)}, must be a UUID")
        if "page_size" in fields:
            self.require(request.page_size >= 0, "page_size", f"is {request.page_size}, must not be below 0")

    def new_id(self, field: str, value: str) -> None:
        """Check an id that a caller chose."""
        self.require(is_id(value), field, f"is {_shown(value)}, must be {ID_RULE}")

    def name(self, field: str, value: str, form: NameForm) -> None:
        """Check a required resource name."""
        self.require(form.matches(value), field, f"is {_shown(value)}, must be {form.text}")

    def update_mask(self, paths: Sequence[str], known: Collection[str], rule: str) -> frozenset[str]:
        """Check the paths of a request's mask, each of which must be ``rule``, and return each of them once."""
        field = "update_mask.paths"
        if not self.require(len(paths) <= _MOST_PATHS, field, f"has {len(paths)}, at most {_MOST_PATHS} are allowed"):
            return frozenset()
        for number, path in enumerate(paths):
            self.require(path in known, f"{field}[{number}]", f"is {_shown(path)}, must be {rule}")
        return frozenset(paths)

    def states(self, field: str, given: Iterable[State], enum: object) -> frozenset[State]:
        """Check the states in a filter, which are values of a generated ``enum``, and return each of them once."""
        assert isinstance(enum, EnumTypeWrapper)
        states = frozenset(given)
        known = {number for number in enum.values() if number}  # 0 is UNSPECIFIED
        if unknown := sorted(states - known):
            shown = ", ".join(map(str, unknown[:_SHOWN_STATES]))
            rest = f" and {len(unknown) - _SHOWN_STATES} others" if len(unknown) > _SHOWN_STATES else ""
            self.require(False, field, f"holds {shown}{rest}, must be values of {enum.DESCRIPTOR.name}")
        return states & known

    async def document(
        self, field: str, document: document_pb2.Document, read: Callable[[document_pb2.Document], V]
    ) -> V | None:
        """Return the result of ``read``, called in a thread, or None if the document is invalid."""
        try:
            return await run_in_thread_gc_paused(read, document)
        except DocumentError as error:
            self._documents.append(invalid_document(error, field))
            return None

    def raise_if_wrong(self) -> None:
        """Raise the recorded errors, if any: INVALID_DOCUMENT if a document is the only error, else INVALID_FIELD."""
        if len(self._documents) == 1 and not self._violations:
            raise self._documents[0]
        found = [*self._violations, *(each for error in self._documents for each in error.violations)]
        if found:
            raise invalid_fields(found)


def check(request: Message, *, optional: Collection[str] = (), **forms: NameForm) -> None:
    """Check a request as `Checks.request` does. Raises INVALID_FIELD with all errors."""
    checks = Checks()
    checks.request(request, optional=optional, **forms)
    checks.raise_if_wrong()


def require_etag(record: Record | None, etag: str, name: str = "") -> None:
    """Raise ETAG_MISMATCH unless ``etag`` is empty or the record's; ``name``: for when there may be no record."""
    if etag and etag != etag_of(record):
        raise etag_mismatch(name or (record.name if record else ""), given=etag, present=etag_of(record))


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def _shown(value: str) -> str:
    if not value:
        return "empty"
    return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")


DEFAULT_SIZE = 50
MAX_SIZE = 500
# Limit on the stored bodies of a page, documents included, that are in memory at once. An answer has at most 4 MiB: the
# rest is for the names, states and times of 500 resources, which are not in the bodies.
MOST_PAGE_BYTES = 3 * 2**20
R = TypeVar("R", bound=Record)
Item = TypeVar("Item")
M = TypeVar("M", bound=Message)
Place = str | tuple[float, str]
"""The position of a resource in its list: its name or, in lists ordered newest first, its time and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    """A request for a page."""

    size: int  # limit on the number of resources
    after: Place | None  # position of the last resource of the previous page; None for the first page
    list_digest: str  # digest of the list and its filter, to which the next token is bound

    @property
    def num_read(self) -> int:
        """The number of resources to read: one more than the page holds, which shows whether there is another page."""
        return self.size + 1

    @property
    def after_number(self) -> int:
        """The position `after` in a list ordered by number, from 1. Raises INVALID_PAGE_TOKEN."""
        if self.after is None:
            return 0
        if isinstance(self.after, str) and self.after.isascii() and self.after.isdigit() and len(self.after) <= 18:
            return int(self.after)
        raise _invalid(str(self.after))

    def cut(self, found: Sequence[Item], place_of: Callable[[Item], Place]) -> tuple[list[Item], str]:
        """Return the resources of the page, and the token of the next page, empty if there is none.

        Args:
            found: the first `num_read` resources after `after`, or as many as there are.
            place_of: returns a resource's position in the list.
        """
        page = list(found[: self.size])
        return page, self.token_behind(place_of(page[-1])) if len(found) > self.size else ""

    def fitting(
        self, found: Sequence[Item], token: str, message_of: Callable[[Item], M], place_of: Callable[[Item], Place]
    ) -> tuple[list[M], str]:
        """Return the messages of a page's resources, and the token of the next page, which may begin earlier.

        They are as many of the first ones as have at most `MOST_PAGE_BYTES` together, but at least one.

        Args:
            found, token: the page, and the token of the next one if all of it fits.
            message_of: returns a resource's message.
            place_of: returns a resource's position in the list.
        """
        messages, num_bytes = list[M](), 0
        for item in found:
            message = message_of(item)
            num_bytes += message.ByteSize()
            if messages and num_bytes > MOST_PAGE_BYTES:
                return messages, self.token_behind(place_of(found[len(messages) - 1]))
            messages.append(message)
        return messages, token

    def token_behind(self, place: Place) -> str:
        """Return the token of the page that continues behind ``place``."""
        time_s, name = (None, place) if isinstance(place, str) else place
        return base64.urlsafe_b64encode(json.dumps([self.list_digest, time_s, name]).encode()).decode()


def read_page_request(request: Message, *, newest_first: bool = False) -> PageRequest:
    """Return a List request's ``page_token`` and ``page_size``, which were validated; its other fields are filters.

    Args:
        newest_first: whether the list is ordered by age rather than by name.

    Raises:
        ServiceError: INVALID_PAGE_TOKEN.
    """
    page_size: int = request.page_size  # type: ignore[attr-defined]
    token: str = request.page_token  # type: ignore[attr-defined]
    digest = _list_digest(request)
    after = _read_token(token, digest, newest_first=newest_first) if token else None
    return PageRequest(size=min(page_size or DEFAULT_SIZE, MAX_SIZE), after=after, list_digest=digest)


async def read_page(
    store: Store, request: Message, kind: RecordKind[R], *, parent: str = "", **filters: Filter
) -> tuple[list[R], str]:
    """Return the page of records for a validated List request, and the token of the next page.

    The page is shorter than requested if larger records would make it exceed `MOST_PAGE_BYTES`.

    ``parent`` is a cluster, which must exist; empty ``filters`` are ignored. Raises INVALID_PAGE_TOKEN or NOT_FOUND.
    """
    page = read_page_request(request, newest_first=kind.newest_first)
    given = {column: value for column, value in filters.items() if value} | ({"cluster": parent} if parent else {})

    def read(tx: Reader) -> tuple[list[R], bool]:
        if parent:
            tx.clusters.require(parent)
        return kind.of(tx).bounded_page(page.after, page.size, most_bytes=MOST_PAGE_BYTES, **given)

    records, is_more = await store.read(read)
    return records, page.token_behind(kind.place_of(records[-1])) if is_more else ""


def _list_digest(request: Message) -> str:
    filters = without(request, "page_size", "page_token")
    text = request.DESCRIPTOR.full_name.encode() + b"\0" + filters.SerializeToString(deterministic=True)
    return hashlib.sha256(text).hexdigest()[:16]


def _read_token(token: str, digest: str, *, newest_first: bool) -> Place:
    try:
        parts = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        raise _invalid(token) from None
    match parts:
        case [str(given), None, str(name)] if given == digest and not newest_first and _is_text(name):
            return name
        case [str(given), float(time_s), str(name)] if given == digest and newest_first and _is_text(name):
            if math.isfinite(time_s):
                return time_s, name
    raise _invalid(token)


def _is_text(name: str) -> bool:
    """Return whether a database accepts the name, since tokens can be forged."""
    return bool(name) and "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)


def _invalid(token: str) -> ServiceError:
    message = f"page_token {token[:80]!r} does not belong to this list and filter; start again without it"
    return ServiceError(Reason.ERROR_REASON_INVALID_PAGE_TOKEN, message)


A = TypeVar("A", bound=Message)
T = TypeVar("T")
Tell = Callable[[], Awaitable[object]]
RESOURCES = ("cluster", "profile", "plan", "node")
MOST_KEPT_BYTES = 4096  # largest document in a stored answer; larger ones are in the resource itself
_LEFT_OUT = b"\0"  # marks an omitted document; no document has this content
_log = logging.getLogger("hetis.planner.resources")
_under_way = set[asyncio.Task[Any]]()  # the event loop itself holds only weak references to tasks


async def change_once(
    store: Store, request: Message, response: type[A], work: Callable[[Transaction], tuple[A, Tell | None]]
) -> A:
    """Do ``work`` in one transaction, unless the same request was done with its ``request_id`` in the last 24 hours.

    The transaction is completed, and its changes are published, even if the caller is cancelled.

    Args:
        request: has a field ``request_id``, which is empty, or a UUID in upper or lower case.
        response: the class of the answer.
        work: makes the changes; returns the answer, and a function that then publishes the changes, or None.

    Raises:
        ServiceError: REQUEST_ID_REUSED.
    """

    async def change() -> A:
        answer, tell = await store.write(partial(_once, request, response, work))
        if tell is not None:
            await tell()
        return answer

    return await to_the_end(change())


def _once(
    request: Message, response: type[A], work: Callable[[Transaction], tuple[A, Tell | None]], tx: Transaction
) -> tuple[A, Tell | None]:
    request_id: str = request.request_id.lower()  # type: ignore[attr-defined]
    method, print_ = request.DESCRIPTOR.full_name, fingerprint(request)
    earlier = tx.requests.replay(method, request_id, print_)
    if earlier is not None:
        answered = response.FromString(earlier)
        write_down(tx, request, answered, audit.REPEATED)
        return with_documents(answered, tx), None
    answer, tell = work(tx)
    write_down(tx, request, answer)
    if request_id:
        tx.requests.remember(method, request_id, print_, without_documents(answer).SerializeToString())
    return answer, tell


async def answered_before(store: Store, request: Message, response: type[A], error: HetisError) -> A:
    """Return the answer to the same request if it was done before under its ``request_id``, or raise ``error``.

    For calls that find an error before they reach `change_once`: what a request needed may be gone once it is done, but
    repeating it must not look as if it had not been done.
    """
    is_repeatable = _is_uuid(request.request_id)  # type: ignore[attr-defined]
    if not is_repeatable or getattr(request, "validate_only", False):
        raise error

    def refuse(_tx: Transaction) -> tuple[A, None]:
        raise error

    return await change_once(store, request, response, refuse)


def write_down(tx: Transaction, request: Message, answer: Message, outcome: str = audit.OK) -> None:
    """Add a line to the audit log in the transaction of the change; `change_once` calls it for its changes."""
    caller, plan = present_caller(), named_in(answer, "plan")
    tx.audit.append(
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
    task = asyncio.ensure_future(work)
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_report_bug)
        raise


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
