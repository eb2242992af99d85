"""Pages of lists."""

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

from hetis.planner.convert.clusters import without
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store import Reader, Store
from hetis.planner.store.records import Record
from hetis.planner.store.tables import Filter, RecordKind

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
