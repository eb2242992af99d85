"""DispatchRequests files: requests waiting to be placed on a stage. A bare list, or ``8000/300``, is also accepted."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from hetis.formats.dispatch_state_checks import check_requests
from hetis.formats.errors import DocumentError, Problem
from hetis.formats.fields import API_VERSION, DocumentPart, Title
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Path, Text
from hetis.solver.dispatch.problem import Requests

MAX_TOKENS = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A request waiting to be placed: its context after prefill, and the output tokens expected of it."""

    id: str
    context_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequests:
    """New requests in their order of admission."""

    requests: tuple[NewRequest, ...]

    def to_solver(self) -> Requests:
        """Return the same as arrays."""
        return Requests(
            ids=tuple(request.id for request in self.requests),
            context_tokens=np.array([request.context_tokens for request in self.requests], np.int64),
            growth_tokens=np.array([request.output_tokens for request in self.requests], np.int64),
        )


class NewRequestPart(DocumentPart):
    """A new request: tokens of context after its prefill, output tokens expected, which memory is kept for."""

    id: Title
    context_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    output_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0


class DispatchRequestsDocument(DocumentPart):
    """New requests in their order of admission: where memory is short, the later ones wait."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["DispatchRequests"]
    requests: list[NewRequestPart]


def load_requests(path: str | os.PathLike[str]) -> NewRequests:
    """Return the requests in a YAML or JSON file (``-``: standard input), a DispatchRequests document or only its list.

    Raises:
        DocumentError: with every problem of the file.
    """
    data, source = read_data(path)
    if isinstance(data, list):
        document = {"apiVersion": API_VERSION, "kind": "DispatchRequests", "requests": data}
        return parse_requests(document, _BareList(source))
    return parse_requests(data, source)


def parse_requests(data: Any, source: Text) -> NewRequests:
    """Return the requests in a document's plain data.

    Raises:
        DocumentError: with every problem of the document.
    """
    return validated(DispatchRequestsDocument, data, source, to_value=_to_requests, check=check_requests)


def requests_from_words(words: Iterable[str], taken: Collection[str] = ()) -> NewRequests:
    """Return requests written as ``CONTEXT/OUTPUT``, named ``new-0``, ``new-1``, ... avoiding the names in ``taken``.

    Raises:
        DocumentError: with every word that is not a pair of this form.
    """
    found, problems = list[NewRequest](), list[Problem]()
    names = (name for n in range(2**31) if (name := f"new-{n}") not in taken)
    for word in words:
        match = re.fullmatch(r"(\d{1,10})/(\d{1,10})", word)
        context, output = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= context <= MAX_TOKENS or output > MAX_TOKENS:
            message = f"{word[:80]!r} is not a pair of context and expected output tokens such as 8000/300"
            problems.append(Problem(file="request", message=message))
            continue
        found.append(NewRequest(id=next(names), context_tokens=context, output_tokens=output))
    if problems:
        raise DocumentError(problems)
    return NewRequests(requests=tuple(found))


def requests_to_data(requests: NewRequests) -> dict[str, Any]:
    """Return the document of new requests as plain data. Reading it again gives equal requests."""
    return {
        "apiVersion": API_VERSION,
        "kind": "DispatchRequests",
        "requests": [
            {"id": r.id, "context_tokens": r.context_tokens, "output_tokens": r.output_tokens}
            for r in requests.requests
        ],
    }


def _to_requests(document: DispatchRequestsDocument) -> NewRequests:
    return NewRequests(
        requests=tuple(
            NewRequest(id=part.id, context_tokens=part.context_tokens, output_tokens=part.output_tokens)
            for part in document.requests
        )
    )


@dataclass(slots=True, init=False)
class _BareList(Text):
    """The text of a document given as only its list: paths in problems omit the list's field."""

    def __init__(self, source: Text) -> None:
        Text.__init__(self, file=source.file, text=source.text, _root=source._root, problems=source.problems)

    def problem(self, path: Path, message: str) -> Problem:
        return Text.problem(self, path[1:], message)
