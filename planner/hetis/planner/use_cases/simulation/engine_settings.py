"""A plan whose engines are started with settings other than the planned ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from hetis.planner.use_cases.grouping import group_replicas
from hetis.simulator.simulate import batch_with_room, check_simulable
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, ReplicaShape, replica_shape
from hetis.solver.engine_rules import EngineSettings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAtSettings:
    """The plan and the problem at given settings, and sentences about what these change in the plan."""

    plan: Plan
    problem: PlacementProblem
    changes: tuple[str, ...]


def at_settings(plan: Plan, problem: PlacementProblem, settings: EngineSettings) -> PlanAtSettings:
    """Return the plan with its engines started with these settings, as far as they are specified.

    GPUs, layers and head groups stay. Every replica gets the specified seats, chunk and KV blocks, and the rate,
    latencies and KV room that the plan checker derives for them.

    A replica with M micro-batches in flight of which only N may have a request each has N of them in flight. Copies
    that share experts are engines of their own, so the settings apply to each. Seats that micro-batches cannot share
    evenly stay empty, since the simulated micro-batches are equally large. If KV has no room for all seats, the rate is
    that of the highest number of requests for which it has room. Routes of KV carry no more than before. Without
    settings nothing changes.

    Raises:
        InvalidProblemError: there are several chunk sizes, whereas an engine has one; KV has no room for a mean
            request; or the plan cannot be simulated.
    """
    if not settings:
        return PlanAtSettings(plan=plan, problem=problem, changes=())
    if len(settings.chunk_tokens) > 1:
        raise InvalidProblemError(f"chunk_tokens has {len(settings.chunk_tokens)} sizes, an engine accepts only one")
    before = problem.family.engine_settings
    merged = replace(before, **{name: value for name, value in asdict(settings).items() if value})
    at = replace(problem, family=replace(problem.family, engine_settings=merged))
    fleet = Fleet.of(problem.cluster)
    for number, one in enumerate(plan.replicas):
        check_simulable(one, number, problem, fleet)
    old, new = Rederivation(problem), Rederivation(at)
    replicas, changes = list(plan.replicas), dict[str, None]()
    for group in group_replicas(plan.replicas):
        first = plan.replicas[group.numbers[0]]
        shape = replica_shape(first, problem, fleet)
        claimed = _claimed(first, shape, old.serving(first.classes))
        for number in group.numbers:
            replicas[number] = _at(replicas[number], shape, settings, new.serving(first.classes), claimed)
        _check_room(replicas[group.numbers[0]], group.numbers[0], at.of_classes(first.classes))
        changes |= dict.fromkeys(_changes(first, replicas[group.numbers[0]], settings))
    routes = tuple(_route(route, plan, replicas) for route in plan.kv_routes)
    set_plan = replace(plan, replicas=tuple(replicas), kv_routes=routes)
    return PlanAtSettings(plan=set_plan, problem=at, changes=tuple(changes))


def _claimed(one: ReplicaPlan, shape: ReplicaShape, derivation: Rederivation) -> float:
    """Return the share of a replica's derived rate that the plan promises: the search may have charged slower links."""
    return min(1.0, one.rate * derivation.of(shape).t_s)


def _at(
    one: ReplicaPlan, shape: ReplicaShape, settings: EngineSettings, derivation: Rederivation, claimed: float
) -> ReplicaPlan:
    """Return a replica at the settings; ``claimed`` is the share of its derived rate that the plan promises."""
    most, b, m = settings.max_num_seqs, one.micro_batch, one.in_flight
    if most is not None and one.expert_parallel:
        b = most if b else 0
    elif most is not None:
        m = min(m, most)
        b = most // m if b else 0
    chunk = settings.chunk_tokens[0] if settings.chunk_tokens and one.chunk_tokens else one.chunk_tokens
    shape = replace(shape, micro_batch=b, in_flight=m, chunk_tokens=chunk)
    held = batch_with_room(shape, derivation) if b else 0
    derived = derivation.of(replace(shape, micro_batch=held))
    t_s = derived.t_s / claimed
    return replace(
        one,
        micro_batch=b,
        in_flight=m,
        chunk_tokens=chunk,
        rate=1.0 / t_s,
        ttft_s=derived.ttft_s(t_s),
        tpot_s=t_s * derived.tpot_per_t if derived.tpot_per_t else 0.0,
        kv_tokens=int(derivation.of(shape).kv_tokens),
        max_num_seqs=one.max_num_seqs if most is None else 0,
    )


def with_all_seats(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return the plan as its engines run it, with micro-batches of as many requests as each may run at once.

    Rates and latencies are those of the cost model at these sizes.
    """
    if not any(one.max_num_seqs for one in plan.replicas):
        return plan
    fleet, derivation, replicas = Fleet.of(problem.cluster), Rederivation(problem), list(plan.replicas)
    for number, one in enumerate(plan.replicas):
        if one.max_num_seqs:
            shape, most = replica_shape(one, problem, fleet), one.seats // one.attention_dp
            own = derivation.serving(one.classes)
            claimed = _claimed(one, shape, own)
            replicas[number] = _at(one, shape, EngineSettings(max_num_seqs=most), own, claimed)
    return replace(plan, replicas=tuple(replicas))


def _check_room(one: ReplicaPlan, number: int, problem: PlacementProblem) -> None:
    moments = problem.moments()
    tokens = moments.mean_prompt + moments.mean_output
    room = one.kv_tokens / min(stage.copies for stage in one.stages)  # a request is in one copy of each stage
    if one.micro_batch and room < problem.model.cached_tokens(tokens):
        raise InvalidProblemError(
            f"replica {number}: KV has room for {room:.0f} tokens, not for a single mean request of {tokens:.0f} tokens"
        )


def _route(route: KvRoute, plan: Plan, replicas: list[ReplicaPlan]) -> KvRoute:
    """Return a route with as much of its rate as both of its replicas still provide."""
    left = (replicas[number].rate / plan.replicas[number].rate for number in (route.prefill, route.decode))
    return replace(route, rate=route.rate * min(1.0, *left))


def _changes(old: ReplicaPlan, new: ReplicaPlan, settings: EngineSettings) -> list[str]:
    """Return the differences between a planned replica and the same one at the settings, in a few words each."""
    found, role = [], "" if old.role is Role.UNIFIED else f" of {old.role} replicas"
    if settings.max_num_seqs is not None:
        seats = [one.planned_seats // one.attention_dp for one in (old, new)]
        beside = "" if seats[1] == settings.max_num_seqs or not new.micro_batch else f" of {settings.max_num_seqs}"
        found.append(f"{seats[1]}{beside} requests at once{role} (planned: {seats[0]})")
    if settings.chunk_tokens and old.chunk_tokens:
        found.append(f"chunks of {new.chunk_tokens} tokens{role} (planned: {old.chunk_tokens})")
    if settings.kv_blocks is not None:
        found.append(f"room for KV of {new.kv_tokens} tokens{role} (planned: {old.kv_tokens})")
    return found
