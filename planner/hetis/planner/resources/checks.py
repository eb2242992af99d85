"""Checks of requests, which find all invalid fields."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

from hetis.formats.errors import DocumentError
from hetis.planner.convert.names import ID_RULE, NameForm, is_id
from hetis.planner.failures import ServiceError, etag_mismatch, invalid_document, invalid_fields
from hetis.planner.store import etag_of
from hetis.planner.store.records import Record
from hetis.planner.threads import run_in_thread_gc_paused
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
            self.require(is_uuid(request.request_id), "request_id", f"is {_shown(request.request_id)}, must be a UUID")
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


def is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def _shown(value: str) -> str:
    if not value:
        return "empty"
    return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
