"""Validation of batches of requests; every wrong field is reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from hetis.planner.failures import invalid_field, invalid_fields
from hetis.planner.fleet.dispatching.declaring import MOST_VIOLATIONS, name_violations, token_violations
from hetis.v1 import dispatch_service_pb2, failure_pb2

MOST_REQUESTS = 1024  # per call


def check_batch(num: int, violations: Iterator[failure_pb2.FieldViolation]) -> None:
    """Check the size and the fields of a batch.

    Raises:
        ServiceError: INVALID_FIELD.
    """
    if not 1 <= num <= MOST_REQUESTS:
        raise invalid_field("requests", f"are {num}, must be 1 to {MOST_REQUESTS}")
    if found := list(islice(violations, MOST_VIOLATIONS)):
        raise invalid_fields(found)


def check_step(request: dispatch_service_pb2.DispatchRequestsRequest) -> None:
    """Check all parts of a message of `DispatchRequests`.

    Raises:
        ServiceError: INVALID_FIELD.
    """
    parts: dict[str, Sequence[object]] = {
        "finished": request.finished,
        "grown": request.grown,
        "new_requests": request.new_requests,
    }
    if too_many := [field for field, found in parts.items() if len(found) > MOST_REQUESTS]:
        raise invalid_field(too_many[0], f"are {len(parts[too_many[0]])}, must be at most {MOST_REQUESTS}")
    violations = chain(
        names_violations("finished", request.finished),
        growth_violations("grown", request.grown),
        newcomer_violations("new_requests", request.new_requests),
    )
    if found := list(islice(violations, MOST_VIOLATIONS)):
        raise invalid_fields(found)


def names_violations(path: str, names: Iterable[str]) -> Iterator[failure_pb2.FieldViolation]:
    seen = set[str]()
    for n, one in enumerate(names):
        yield from name_violations(f"{path}[{n}]", one, seen)


def newcomer_violations(
    path: str, requests: Iterable[dispatch_service_pb2.NewRequest]
) -> Iterator[failure_pb2.FieldViolation]:
    seen = set[str]()
    for n, one in enumerate(requests):
        yield from name_violations(f"{path}[{n}].id", one.id, seen)
        yield from token_violations(f"{path}[{n}].context_tokens", one.context_tokens, least=1)
        yield from token_violations(f"{path}[{n}].growth_tokens", one.growth_tokens)


def growth_violations(
    path: str, requests: Iterable[dispatch_service_pb2.Growth]
) -> Iterator[failure_pb2.FieldViolation]:
    seen = set[str]()
    for n, one in enumerate(requests):
        yield from name_violations(f"{path}[{n}].id", one.id, seen)
        yield from token_violations(f"{path}[{n}].context_tokens", one.context_tokens, least=1)
        yield from token_violations(f"{path}[{n}].remaining_tokens", one.remaining_tokens)
