"""Pages of lists, and tokens that are bound to their list."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from hetis.planner.failures import Reason, ServiceError

DEFAULT_SIZE = 50
MAX_SIZE = 500
R = TypeVar("R")
Place = str | tuple[float, str]
"""The position of a resource in its list: its name, or its time and name in lists ordered newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    """A request for a page.

    Attributes:
        size: most resources on it.
        after: position of the last resource of the previous page; None for the first page.
        list_digest: of the list and its filter, to which the next token is bound.
    """

    size: int
    after: Place | None
    list_digest: str

    @property
    def num_read(self) -> int:
        """The number of resources to read: one more than the page holds, to see whether there is another page."""
        return self.size + 1

    @property
    def after_number(self) -> int:
        """`after` in a list by number, from 1.

        Raises:
            ServiceError: INVALID_PAGE_TOKEN.
        """
        if self.after is None:
            return 0
        if isinstance(self.after, str) and self.after.isascii() and self.after.isdigit() and len(self.after) <= 18:
            return int(self.after)
        raise _invalid(str(self.after))

    def cut(self, found: Sequence[R], place_of: Callable[[R], Place]) -> tuple[list[R], str]:
        """Return the page, and the token of the next one, empty if there is none.

        Args:
            found: the first `num_read` resources after `after`, or as many as there are.
            place_of: returns a resource's position in the list.
        """
        page = list(found[: self.size])
        if len(found) <= self.size:
            return page, ""
        return page, _write_token(self.list_digest, place_of(page[-1]))


def read_page_request(request: Message, *, newest_first: bool = False) -> PageRequest:
    """Read a List request's ``page_token`` and its validated ``page_size``; its other fields are filters.

    Args:
        request: of a List method.
        newest_first: whether the list is by age, not by name.

    Raises:
        ServiceError: INVALID_PAGE_TOKEN.
    """
    page_size: int = request.page_size  # type: ignore[attr-defined]
    token: str = request.page_token  # type: ignore[attr-defined]
    digest = _list_digest(request)
    after = _read_token(token, digest, newest_first=newest_first) if token else None
    return PageRequest(size=min(page_size or DEFAULT_SIZE, MAX_SIZE), after=after, list_digest=digest)


def _list_digest(request: Message) -> str:
    filters = type(request)()
    filters.CopyFrom(request)
    filters.ClearField("page_size")
    filters.ClearField("page_token")
    text = request.DESCRIPTOR.full_name.encode() + b"\0" + filters.SerializeToString(deterministic=True)
    return hashlib.sha256(text).hexdigest()[:16]


def _write_token(digest: str, place: Place) -> str:
    time_s, name = (None, place) if isinstance(place, str) else place
    return base64.urlsafe_b64encode(json.dumps([digest, time_s, name]).encode()).decode()


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
        case _:
            raise _invalid(token)


def _is_text(name: str) -> bool:
    """Return whether a database accepts the name: tokens can be forged."""
    return bool(name) and "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)


def _invalid(token: str) -> ServiceError:
    return ServiceError(
        Reason.ERROR_REASON_INVALID_PAGE_TOKEN,
        f"page_token {token[:80]!r} is not from this list with this filter; begin again without it",
    )
