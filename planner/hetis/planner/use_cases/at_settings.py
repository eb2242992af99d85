"""A plan whose engines are started with other settings than it has: its replicas, and what the cost model says of them.

GPUs, layers and head groups stay. Every replica gets the seats, the chunk and the KV blocks that are given, and the
rate, latencies and KV room that the plan checker derives for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetis.planner.use_cases.grouping import group_replicas
from hetis.simulator.simulate import batch_with_room, check_simulable
from hetis.solver.check.fleet import Fleet, ReplicaShape, replica_shape
from hetis.solver.check.rederive import Rederivation
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role
from hetis.solver.problem import EngineSettings, PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAtSettings:
    """The plan and the problem at the given settings, and sentences about what became of the plan's own."""

    plan: Plan
    problem: PlacementProblem
    changes: tuple[str, ...]


def one_chunk_settings(
    *, max_num_seqs: int | None, chunk_tokens: int | None, kv_blocks: int | None
) -> EngineSettings:  # fmt: skip
    """Return the settings that an engine is started with, which has one size of chunks."""
    chunks = () if chunk_tokens is None else (chunk_tokens,)
    return EngineSettings(max_num_seqs=max_num_seqs, chunk_tokens=chunks, kv_blocks=kv_blocks)


def at_settings(plan: Plan, problem: PlacementProblem, settings: EngineSettings) -> PlanAtSettings:
    """Return the plan with its engines started with these settings, where they are given.

    A replica with M micro-batches in flight of which only N may have a request each has N of them in flight. Copies
    that share experts are engines of their own, so that the settings are those of each. Seats that micro-batches cannot
    share evenly stay empty, as the simulated micro-batches are equally large. Where KV has no room for all seats, the
    rate is that of the most requests for which it has. Routes of KV carry no more than before. Without settings nothing
    changes.

    Raises:
        InvalidProblemError: there are several sizes of chunks, where an engine has one; or the plan cannot be
            simulated.
    """
    if not settings:
        return PlanAtSettings(plan=plan, problem=problem, changes=())
    if len(settings.chunk_tokens) > 1:
        raise InvalidProblemError(f"chunk_tokens has {len(settings.chunk_tokens)} sizes, an engine is started with one")
    before = problem.family.engine_settings
    merged = EngineSettings(
        max_num_seqs=settings.max_num_seqs or before.max_num_seqs,
        chunk_tokens=settings.chunk_tokens or before.chunk_tokens,
        kv_blocks=settings.kv_blocks or before.kv_blocks,
    )
    at = replace(problem, family=replace(problem.family, engine_settings=merged))
    fleet = Fleet.of(problem.cluster)
    for number, one in enumerate(plan.replicas):
        check_simulable(one, number, problem, fleet)
    old, new = Rederivation(problem), Rederivation(at)
    replicas, changes = list(plan.replicas), dict[str, None]()
    for group in group_replicas(plan.replicas):
        first = plan.replicas[group.numbers[0]]
        shape = replica_shape(first, problem, fleet)
        claimed = min(1.0, first.rate * old.of(shape).t_s)  # the search may have charged slower links
        for number in group.numbers:
            replicas[number] = _at(replicas[number], shape, settings, new, claimed)
        changes |= dict.fromkeys(_changes(first, replicas[group.numbers[0]], settings))
    routes = tuple(_route(route, plan, replicas) for route in plan.kv_routes)
    return PlanAtSettings(
        plan=replace(plan, replicas=tuple(replicas), kv_routes=routes), problem=at, changes=tuple(changes)
    )


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
    )


def _route(route: KvRoute, plan: Plan, replicas: list[ReplicaPlan]) -> KvRoute:
    """Return a route with as much of its rate as both of its replicas still have."""
    left = (replicas[number].rate / plan.replicas[number].rate for number in (route.prefill, route.decode))
    return replace(route, rate=route.rate * min(1.0, *left))


def _changes(old: ReplicaPlan, new: ReplicaPlan, settings: EngineSettings) -> list[str]:
    """Return what differs between a planned replica and the same at the settings, in a few words each."""
    found, role = [], "" if old.role is Role.UNIFIED else f" of {old.role} replicas"
    if settings.max_num_seqs is not None:
        seats = [max(1, one.micro_batch) * one.in_flight // one.attention_dp for one in (old, new)]
        beside = "" if seats[1] == settings.max_num_seqs or not new.micro_batch else f" of {settings.max_num_seqs}"
        found.append(f"{seats[1]}{beside} requests at once{role} (planned: {seats[0]})")
    if settings.chunk_tokens and old.chunk_tokens:
        found.append(f"chunks of {new.chunk_tokens} tokens{role} (planned: {old.chunk_tokens})")
    if settings.kv_blocks is not None:
        found.append(f"room for KV of {new.kv_tokens} tokens{role} (planned: {old.kv_tokens})")
    return found
