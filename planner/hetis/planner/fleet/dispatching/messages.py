"""Messages of dispatch: validation, which reports all invalid fields at once, declared states, and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

from hetis.planner.convert.stages import StageTerms, owners_of
from hetis.planner.failures import invalid_field, invalid_fields
from hetis.planner.fleet.dispatching.replica import Home, ReplicaDispatch, RunningRequest
from hetis.planner.fleet.dispatching.stage_copy import Newcomer, StageCopy
from hetis.solver.dispatch.problem import MOST_BLOCKS
from hetis.solver.errors import InvalidProblemError
from hetis.v1 import dispatch_service_pb2 as pb2
from hetis.v1 import failure_pb2, head_map_pb2, report_pb2

MOST_TOKENS = 2**24  # most tokens of a context, and of an expected output
MOST_NAME_BYTES = 128  # longest name of a request
MOST_VIOLATIONS = 100  # violations reported per call; a nonsensical batch needs no complete list
_STATUSES = (report_pb2.DEVICE_STATUS_OK, report_pb2.DEVICE_STATUS_DRAINING, report_pb2.DEVICE_STATUS_LOST)

Place = tuple[int, int]  # stage and copy
Violations = Iterator[failure_pb2.FieldViolation]


def declared(state: pb2.DispatchState, terms: dict[Place, StageTerms], state_id: str) -> ReplicaDispatch:
    """Return the dispatch state that the engine declares.

    Args:
        terms: the terms of every copy of every stage of the replica.

    Raises:
        ServiceError: INVALID_FIELD, with all invalid fields.
    """
    _require_none(_violations(state, terms))
    copies, maps, problems = dict[Place, StageCopy](), dict[Place, head_map_pb2.HeadMap](), []
    for m, head_map in enumerate(state.head_maps):
        place = head_map.stage, head_map.copy
        try:
            copies[place], maps[place] = StageCopy(*place, terms[place], head_map), head_map
        except InvalidProblemError as error:
            problems.append(_violation(f"dispatch_state.head_maps[{m}]", str(error)))
    if problems:
        raise invalid_fields(problems)
    num_stages = 1 + max((stage for stage, _ in terms), default=-1)
    stages = [[copies[place] for place in sorted(copies) if place[0] == s] for s in range(num_stages)]
    on: dict[str, dict[int, StageCopy]] = {}
    numbers: dict[str, head_map_pb2.RunningRequest] = {}
    for place in sorted(maps):
        for request in maps[place].requests:
            if request.id in copies[place].state:
                on.setdefault(request.id, {})[place[0]] = copies[place]
                numbers[request.id] = request
    running = dict[str, RunningRequest]()
    for name, by_stage in on.items():
        request = numbers[name]
        newcomer = Newcomer(
            id=name,
            incarnation=request.incarnation,
            context_tokens=request.context_tokens,
            growth_tokens=request.remaining_tokens,
        )
        running[name] = RunningRequest(
            admitted=newcomer, copies=tuple(by_stage[s] for s in range(num_stages) if s in by_stage)
        )
    replica = ReplicaDispatch(state_id, stages, running)
    # A request that lost its KV on one stage has to be prefilled again on all stages.
    replica.finish([name for name, by_stage in on.items() if len(by_stage) < num_stages])
    return replica


def _violations(state: pb2.DispatchState, terms: dict[Place, StageTerms]) -> Violations:
    path = "dispatch_state.head_maps"
    seen = dict[Place, int]()
    for m, head_map in enumerate(state.head_maps):
        place = head_map.stage, head_map.copy
        if place not in terms:
            yield _violation(f"{path}[{m}].stage", f"the replica has no copy {place[1]} of a stage {place[0]}")
        elif place in seen:
            yield _violation(
                f"{path}[{m}].stage", f"head_maps[{seen[place]}] already has the same copy of the same stage"
            )
        else:
            seen[place] = m
            yield from _in_map(f"{path}[{m}]", head_map, terms[place])
    for stage, copy in sorted(terms.keys() - seen.keys()):
        yield _violation(path, f"the head map of stage {stage}, copy {copy} is missing")
    yield from _across_stages(path, state.head_maps, 1 + max((stage for stage, _ in terms), default=-1))


def _in_map(path: str, head_map: head_map_pb2.HeadMap, terms: StageTerms) -> Violations:
    names = set[str]()
    for d, device in enumerate(head_map.devices):
        where = f"{path}.devices[{d}]"
        if device.name not in terms.index:
            yield _violation(f"{where}.name", f"{device.name!r} is not one of {', '.join(terms.stage.devices)}")
        elif device.name in names:
            yield _violation(f"{where}.name", f"{device.name} is listed twice")
        names.add(device.name)
        if device.total_blocks > MOST_BLOCKS:
            yield _violation(f"{where}.total_blocks", f"is {device.total_blocks}, must be at most {MOST_BLOCKS}")
        if device.status not in _STATUSES:
            yield _violation(f"{where}.status", "required; OK, DRAINING or LOST")
    if not head_map.devices:
        yield _violation(f"{path}.devices", "required")
    ids = set[str]()
    for r, request in enumerate(head_map.requests):
        where = f"{path}.requests[{r}]"
        yield from name_violations(f"{where}.id", request.id, ids)
        yield from token_violations(f"{where}.context_tokens", request.context_tokens, least=1)
        yield from token_violations(f"{where}.remaining_tokens", request.remaining_tokens)
        yield from _in_owners(f"{where}.owners", request.owners, terms, len(head_map.devices))
    owners = {request.id: request.owners for request in head_map.requests}
    index = {device.name: d for d, device in enumerate(head_map.devices)}
    for n, one in enumerate(head_map.moves):
        yield from _in_move(f"{path}.moves[{n}]", one, owners, index)


def _in_owners(path: str, owners: Sequence[int], terms: StageTerms, num_devices: int) -> Violations:
    num = terms.stage.heads.head_groups
    if len(owners) != num:
        yield _violation(path, f"has {len(owners)} entries, must have one for each of {num} head groups")
    elif owners and max(owners) >= num_devices:
        yield _violation(path, f"{max(owners)} is not an index into a list of {num_devices} devices")


def _in_move(
    path: str, one: head_map_pb2.MoveInFlight, owners: Mapping[str, Sequence[int]], index: Mapping[str, int]
) -> Violations:
    move = one.move
    if not one.change_id:
        yield _violation(f"{path}.change_id", "required")
    for field in ("source", "target"):
        if getattr(move, field) not in index:
            yield _violation(f"{path}.move.{field}", f"{getattr(move, field)!r} is not a device of the map")
    of_request = owners.get(move.request)
    if of_request is None:
        yield _violation(f"{path}.move.request", f"{move.request!r} is not running")
    elif not move.head_groups:
        yield _violation(f"{path}.move.head_groups", "required")
    else:
        wrong = [g for g in move.head_groups if g >= len(of_request) or of_request[g] != index.get(move.source)]
        if wrong or len(set(move.head_groups)) < len(move.head_groups):
            yield _violation(
                f"{path}.move.head_groups", f"{wrong or list(move.head_groups)}: not on {move.source}, or listed twice"
            )


def _across_stages(path: str, head_maps: Sequence[head_map_pb2.HeadMap], num_stages: int) -> Violations:
    """Check that each request is on one copy of every stage, with equal numbers on all of them."""
    first: dict[str, tuple[str, head_map_pb2.RunningRequest]] = {}
    stages: dict[str, set[int]] = {}
    for m, head_map in enumerate(head_maps):
        for r, request in enumerate(head_map.requests):
            where = f"{path}[{m}].requests[{r}]"
            before, other = first.setdefault(request.id, (where, request))
            for field in ("incarnation", "context_tokens", "remaining_tokens"):
                if getattr(request, field) != getattr(other, field):
                    there = getattr(other, field)
                    yield _violation(f"{where}.{field}", f"is {getattr(request, field)}, but {there} at {before}")
            if head_map.stage in stages.setdefault(request.id, set()) and other is not request:
                yield _violation(f"{where}.id", f"{request.id} is also on another copy of stage {head_map.stage}")
            stages[request.id].add(head_map.stage)
    for name, on in stages.items():
        if missing := sorted(set(range(num_stages)) - on):
            yield _violation(f"{first[name][0]}.id", f"{name} is not on stage {missing[0]}")


def name_violations(path: str, name: str, seen: set[str]) -> Violations:
    """Yield the violations of a request's name, and add it to ``seen``, the earlier names."""
    num_bytes = len(name.encode())
    if not 1 <= num_bytes <= MOST_NAME_BYTES:
        yield _violation(path, f"has {num_bytes} bytes, must have 1 to {MOST_NAME_BYTES}")
    elif name in seen:
        yield _violation(path, f"{name} is listed twice")
    seen.add(name)


def token_violations(path: str, tokens: int, *, least: int = 0) -> Violations:
    """Yield the violation of a number of tokens, if any."""
    if not least <= tokens <= MOST_TOKENS:
        yield _violation(path, f"is {tokens}, must be {least} to {MOST_TOKENS}")


def _violation(field: str, description: str) -> failure_pb2.FieldViolation:
    return failure_pb2.FieldViolation(field=field, description=description)


MOST_REQUESTS = 1024  # per call


def check_batch(num: int, violations: Violations) -> None:
    """Check the size and the fields of a batch. Raises INVALID_FIELD."""
    if not 1 <= num <= MOST_REQUESTS:
        raise invalid_field("requests", f"has {num} entries, must have 1 to {MOST_REQUESTS}")
    _require_none(violations)


def check_step(request: pb2.DispatchRequestsRequest) -> None:
    """Check all parts of a message of `DispatchRequests`. Raises INVALID_FIELD."""
    parts: dict[str, Sequence[object]] = {
        "finished": request.finished,
        "grown": request.grown,
        "new_requests": request.new_requests,
    }
    if too_many := [field for field, found in parts.items() if len(found) > MOST_REQUESTS]:
        raise invalid_field(too_many[0], f"has {len(parts[too_many[0]])} entries, must have at most {MOST_REQUESTS}")
    violations = chain(
        names_violations("finished", request.finished),
        request_violations("grown", request.grown, "remaining_tokens"),
        request_violations("new_requests", request.new_requests, "growth_tokens"),
    )
    _require_none(violations)


def _require_none(violations: Violations) -> None:
    if found := list(islice(violations, MOST_VIOLATIONS)):
        raise invalid_fields(found)


def names_violations(path: str, names: Iterable[str]) -> Violations:
    seen = set[str]()
    for n, one in enumerate(names):
        yield from name_violations(f"{path}[{n}]", one, seen)


def request_violations(path: str, requests: Iterable[pb2.NewRequest | pb2.Growth], tokens: str) -> Violations:
    """Yield the violations of new or growing requests; ``tokens`` is the field of the tokens still to come."""
    seen = set[str]()
    for n, one in enumerate(requests):
        yield from name_violations(f"{path}[{n}].id", one.id, seen)
        yield from token_violations(f"{path}[{n}].context_tokens", one.context_tokens, least=1)
        yield from token_violations(f"{path}[{n}].{tokens}", getattr(one, tokens))


def placement_to_proto(request: str, running: RunningRequest | None, homes: Sequence[Home] | None) -> pb2.Placement:
    """Return the placement of a request: where its call placed it, or else where it was already running."""
    if homes is not None:  # another call may have finished it since, and admitted it elsewhere
        owners = [(home.copy, owners_of(home.copy.terms.stage, home.groups)) for home in homes]
    else:
        owners = [(copy, copy.owners[request]) for copy in running.copies] if running else []
    return pb2.Placement(request=request, stages=[_stage_placement(copy, positions) for copy, positions in owners])


def _stage_placement(copy: StageCopy, owners: Sequence[int]) -> pb2.StagePlacement:
    used = sorted(set(owners))
    position = {device: n for n, device in enumerate(used)}
    return pb2.StagePlacement(
        stage=copy.stage,
        copy=copy.copy,
        devices=[copy.terms.stage.devices[device] for device in used],
        owners=[position[owner] for owner in owners],
    )
