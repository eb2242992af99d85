"""Validation of requests: all wrong fields in one error."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TypeVar

from hetis.formats.errors import DocumentError
from hetis.planner.convert.names import ID_RULE, NameForm, is_id
from hetis.planner.failures import ServiceError, invalid_document, invalid_fields
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.v1 import document_pb2, failure_pb2

V = TypeVar("V")
_SHOWN = 80  # characters of a wrong value in a message


class Checks:
    """Collects the errors of one request, then raises them together."""

    def __init__(self) -> None:
        self._violations: list[failure_pb2.FieldViolation] = []
        self._documents: list[ServiceError] = []

    def require(self, is_right: bool, field: str, description: str) -> bool:
        """Record ``description`` as an error of ``field`` unless ``is_right``; return ``is_right``."""
        if not is_right:
            self._violations.append(failure_pb2.FieldViolation(field=field, description=description))
        return is_right

    def new_id(self, field: str, value: str) -> None:
        """Check an id that a caller chooses."""
        self.require(is_id(value), field, f"is {_shown(value)}, must be {ID_RULE}")

    def name(self, field: str, value: str, form: NameForm) -> None:
        """Check a required resource name."""
        self.require(form.matches(value), field, f"is {_shown(value)}, must be {form.text}")

    def optional_name(self, field: str, value: str, form: NameForm) -> None:
        """Check a resource name that may be empty."""
        if value:
            self.name(field, value, form)

    def request_id(self, value: str) -> None:
        """Check a UUID that may be empty."""
        if value:
            self.require(_is_uuid(value), "request_id", f"is {_shown(value)}, must be a UUID")

    def page_size(self, value: int) -> None:
        self.require(value >= 0, "page_size", f"is {value}, must not be below 0")

    async def document(
        self, field: str, document: document_pb2.Document, read: Callable[[document_pb2.Document], V]
    ) -> V | None:
        """Return the result of ``read``, called in a thread, or None if the document is wrong."""
        try:
            return await run_in_thread_gc_paused(read, document)
        except DocumentError as error:
            self._documents.append(invalid_document(error, field))
            return None

    def raise_if_wrong(self) -> None:
        """Raise the recorded errors, if any.

        Raises:
            ServiceError: INVALID_DOCUMENT if one document is the only error, else INVALID_FIELD.
        """
        if len(self._documents) == 1 and not self._violations:
            raise self._documents[0]
        found = [*self._violations, *(each for error in self._documents for each in error.violations)]
        if found:
            raise invalid_fields(found)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def _shown(value: str) -> str:
    if not value:
        return "empty"
    return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
