"""What may stand in a batch of requests; every wrong field is told at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from hetis.planner.failures import invalid_field, invalid_fields
from hetis.planner.fleet.dispatching.declaring import MOST_VIOLATIONS, name_violations, token_violations
from hetis.v1 import dispatch_service_pb2, failure_pb2

MOST_REQUESTS = 1024  # of one call


def check_batch(num: int, violations: Iterator[failure_pb2.FieldViolation]) -> None:
    if not 1 <= num <= MOST_REQUESTS:
        raise invalid_field("requests", f"are {num}, must be 1 to {MOST_REQUESTS}")
    if found := list(islice(violations, MOST_VIOLATIONS)):
        raise invalid_fields(found)


def newcomer_violations(
    requests: Iterable[dispatch_service_pb2.NewRequest],
) -> Iterator[failure_pb2.FieldViolation]:
    seen = set[str]()
    for n, one in enumerate(requests):
        yield from name_violations(f"requests[{n}].id", one.id, seen)
        yield from token_violations(f"requests[{n}].context_tokens", one.context_tokens, least=1)
        yield from token_violations(f"requests[{n}].growth_tokens", one.growth_tokens)


def growth_violations(requests: Iterable[dispatch_service_pb2.Growth]) -> Iterator[failure_pb2.FieldViolation]:
    seen = set[str]()
    for n, one in enumerate(requests):
        yield from name_violations(f"requests[{n}].id", one.id, seen)
        yield from token_violations(f"requests[{n}].context_tokens", one.context_tokens, least=1)
        yield from token_violations(f"requests[{n}].remaining_tokens", one.remaining_tokens)
