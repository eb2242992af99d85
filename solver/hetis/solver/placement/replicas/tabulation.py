"""All tables of a problem: its mixes, rank types and scopes, with the costs of stages in each (`stage_tables.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from hetis.solver import cost, mixes
from hetis.solver.constraints import DUTY_OF_ROLE, Duty
from hetis.solver.engine_rules import Family
from hetis.solver.mixes import Mix
from hetis.solver.model import ModelSpec
from hetis.solver.placement.fleet import (
    DeviceClass,
    Part,
    device_classes,
    parts_of,
    places_of,
    resources_of,
    routes_of,
    without_most,
)
from hetis.solver.placement.replicas.stage_tables import BuildClasses, StageTables
from hetis.solver.placement.replicas.tables import CostTables, Scope, scopes_of_ranges
from hetis.solver.plan import Role
from hetis.solver.problem import Build, PlacementProblem
from hetis.solver.workload import WorkloadMoments


def build_cost_tables(problem: PlacementProblem) -> CostTables:
    """Tabulate the cost model for every mix, rank type and pool of a problem's family, and range of its classes."""
    if not problem.workload.classes:
        return _tables_of_range(problem)
    ranges = [_tables_of_range(problem.of_classes(names), len(problem.ranges())) for names in problem.ranges()]
    scopes = scopes_of_ranges(ranges)
    return replace(ranges[0], problem=problem, scopes=scopes, ranges=tuple(ranges), shared={})


def _tables_of_range(problem: PlacementProblem, num_ranges: int = 1) -> CostTables:
    family, model = problem.family, problem.model
    moments = problem.workload.clipped_to(model.max_position).moments(block_tokens=problem.assumptions.block_tokens)
    classes = device_classes(problem.cluster, problem.constraint_index, problem.node_links)
    zones, builds = problem.cluster.zones(), _builds(problem, classes)
    num_kinds = 1 + max(build.kv for build in builds)
    # If KV is of several kinds, it is only handed over inside a zone.
    mixes = tuple(_mixes(family, model, moments, len(zones) if num_kinds == 1 else 1))
    sizes = [
        (i, tp)
        for i, c in enumerate(classes)
        for tp in family.tp_sizes
        if tp <= c.gpus_per_node and Duty.PRIMARY not in c.constraints.barred
    ]
    degrees = (1, *family.attention_dp_of(model))
    shaped = [
        (rank, dp)
        for dp in degrees
        for rank in sizes
        if rank[1] % dp == 0 and rank[1] // dp in family.tp_sizes
        if cost.rank_shape(model, rank[1] // dp, dp) is not None
    ]
    shaped.sort(key=lambda one: one[0][0])
    ranks, rank_dp = tuple(rank for rank, _ in shaped), tuple(dp for _, dp in shaped)
    resources, biggest = resources_of(classes, family.tp_sizes), max((c.available for c in classes), default=0)
    pool_sizes = tuple(p for p in family.pool_sizes() if p <= biggest)
    tabulation = StageTables(problem, moments, classes, mixes, ranks, rank_dp, pool_sizes)
    beside = [places_of(problem.cluster, zone, classes, problem.node_links) for zone in zones]
    places = [place for some in beside for place in without_most(some)] if family.splits_roles else []
    num_left_out = sum(map(len, beside)) - len(places) if family.splits_roles else 0
    return CostTables(
        problem=problem,
        moments=moments,
        classes=classes,
        resources=resources,
        mixes=mixes,
        ranks=ranks,
        rank_dp=rank_dp,
        group_use=np.array([resources.of_group(i, tp) for i, tp in ranks], dtype=np.int64).reshape(
            len(ranks), len(resources.rows)
        ),
        card_use=np.array([resources.of_group(i, 1) for i in range(len(classes))], dtype=np.int64),
        pool_sizes=pool_sizes,
        scopes=(*_scopes(family, zones, classes, builds, tabulation), *_scopes_of_places(places, builds, tabulation)),
        routes=routes_of(problem, moments, num_kinds, [place for place, _ in places], num_left_out, num_ranges),
    )


def _mixes(family: Family, model: ModelSpec, moments: WorkloadMoments, num_zones: int) -> Iterator[Mix]:
    """Yield the mixes of unified replicas (b, C), then those of prefill replicas (C), then of decode replicas (b).

    Prefill replicas that may send KV to other zones pay for the slowest link and have mixes of their own. Mixes of
    expert parallelism come last, in the same order.
    """
    for d in (1, *family.attention_dp_of(model)):
        if Role.UNIFIED in family.roles:
            for b in family.micro_batches:
                for c in family.chunk_tokens:
                    yield mixes.mix_of(model, moments, micro_batch=b, chunk_tokens=c, attention_dp=d)
        if family.splits_roles:
            for afar in (False, True)[: min(num_zones, 2)]:
                for c in family.chunk_tokens:
                    yield mixes.mix_of(model, moments, micro_batch=0, chunk_tokens=c, sends_afar=afar, attention_dp=d)
            for b in family.micro_batches:
                yield mixes.mix_of(model, moments, micro_batch=b, chunk_tokens=0, attention_dp=d)


def _scopes(
    family: Family, zones: tuple[str, ...], classes: tuple[DeviceClass, ...], builds: Sequence[BuildClasses],
    tabulation: StageTables,
) -> Iterator[Scope]:  # fmt: skip
    """Yield a scope per zone, set of its nodes and build."""
    problem = tabulation.problem
    for part in (part for zone in zones for part in parts_of(problem.cluster, (zone,), classes, problem.node_links)):
        yield from _scopes_of_part(part, None, family.roles, builds, tabulation)


def _scopes_of_places(
    places: Sequence[tuple[Part, list[Part]]], builds: Sequence[BuildClasses], tabulation: StageTables
) -> Iterator[Scope]:
    """Yield the scopes of prefill and decode replicas in the places beside whole zones."""
    for place, parts in places:
        for part in parts:
            yield from _scopes_of_part(part, place, [Role.PREFILL, Role.DECODE], builds, tabulation)


def _scopes_of_part(
    part: Part, place: Part | None, roles: Sequence[Role], builds: Sequence[BuildClasses], tabulation: StageTables
) -> Iterator[Scope]:
    """Yield the scopes of a part of the fleet, one for all roles that the same GPUs may have."""
    alike: dict[tuple[bool, ...], list[Role]] = {}
    for role in roles:
        may = tuple(DUTY_OF_ROLE[role] not in c.constraints.barred for c in tabulation.classes)
        alike.setdefault(may, []).append(role)
    for may, some in alike.items():
        for build in builds:
            tables = partial(tabulation.tables, build, part, place)
            whole = Scope(part, tuple(some), tables, primaries=build.primaries, kv=build.kv, place=place)
            yield whole if all(may) else whole.without(np.array([not each for each in may]))


def _builds(problem: PlacementProblem, classes: tuple[DeviceClass, ...]) -> tuple[BuildClasses, ...]:
    """Return the builds of the fleet."""
    alike: dict[Build, set[int]] = {}
    for i, c in enumerate(classes):
        alike.setdefault(problem.build_of(c.gpu), set()).add(i)
    if len(alike) < 2:
        return tuple(BuildClasses(build.model, None) for build in alike) or (BuildClasses(problem.model, None),)
    kinds = list(dict.fromkeys(map(problem.kv_of, alike)))
    return tuple(
        BuildClasses(build.model, frozenset(chosen), kinds.index(problem.kv_of(build)))
        for build, chosen in alike.items()
    )
