"""DispatchRequests files: new requests in order of admission. In words, one is ``8000/300``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from hetis.formats.dispatch.saved_state import MAX_TOKENS
from hetis.formats.errors import DocumentError, Problem
from hetis.formats.fields import Document, DocumentPart, Title, duplicates, entries, plain
from hetis.formats.kinds import kind_of
from hetis.solver.dispatch.dispatch_problem import Requests


class NewRequestPart(DocumentPart):
    """A new request: tokens of context after its prefill, and expected output tokens, for which memory is reserved."""

    id: Title
    context_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    output_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequests:
    """New requests in their order of admission."""

    requests: tuple[NewRequestPart, ...]

    def to_solver(self) -> Requests:
        """Return the same as arrays."""
        return Requests(
            ids=tuple(request.id for request in self.requests),
            context_tokens=np.array([request.context_tokens for request in self.requests], np.int64),
            growth_tokens=np.array([request.output_tokens for request in self.requests], np.int64),
        )


class DispatchRequestsDocument(Document):
    """New requests in order of admission: if memory is short, the later ones wait."""

    kind: Literal["DispatchRequests"]
    requests: list[NewRequestPart]


DISPATCH_REQUESTS = kind_of(
    DispatchRequestsDocument,
    NewRequests,
    to_value=lambda document: NewRequests(requests=tuple(document.requests)),
    to_data=plain,
    check=lambda data: duplicates(("requests",), entries(data.get("requests")), "id", "request"),
)


load_requests = DISPATCH_REQUESTS.load


def requests_from_words(words: Iterable[str], taken: Collection[str] = ()) -> NewRequests:
    """Return requests written as ``CONTEXT/OUTPUT``, named ``new-0``, ``new-1``, ... avoiding the names in ``taken``.
    Raises DocumentError with every word that is not a pair of this form.
    """
    found, problems = list[NewRequestPart](), list[Problem]()
    names = (name for n in range(2**31) if (name := f"new-{n}") not in taken)
    for word in words:
        match = re.fullmatch(r"(\d{1,10})/(\d{1,10})", word)
        context, output = (int(match[1]), int(match[2])) if match else (0, 0)
        if 1 <= context <= MAX_TOKENS >= output:
            found.append(NewRequestPart(id=next(names), context_tokens=context, output_tokens=output))
        else:
            message = f"{word[:80]!r} is not a pair of context and expected output tokens such as 8000/300"
            problems.append(Problem(file="request", message=message))
    if problems:
        raise DocumentError(problems)
    return NewRequests(requests=tuple(found))
