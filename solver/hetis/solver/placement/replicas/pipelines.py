"""The enumeration of every pipeline that an engine runs: few stages of one TP size, without copies (`EngineRules`).

There are few ways in which such a replica may use the fleet: a number of TP groups of each device class, called a
*composition*, optionally with attention workers of one class, equally many for every stage. For each of them the
quickest split of layers is found over all iteration mixes, and the best becomes a column of the master
(`enumeration.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.kinds import kind_of, least_nodes_of, nodes_of_groups
from hetis.solver.placement.replicas.stage_cost import ROUNDING, stage_roles
from hetis.solver.placement.replicas.stage_times import (
    EXACT,
    Shape,
    StageTimes,
    Workers,
    shortest_fractional_s,
    stage_times,
    sweep_of,
)
from hetis.solver.placement.replicas.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template, TemplateStage, gpus_of, interval_of
from hetis.solver.plan import Role

NUM_ROLES = 4
MOST_COMPOSITIONS = 400_000  # limit per TP size and depth
SPLITS_AT_ONCE = 4096  # splits of layers that are tried together


def shortest_with(costs: CostTables, shape: Shape, counts: IntArray, mixes: IntArray, workers: Workers) -> FloatArray:
    """Return lower bounds on the interval of each composition with these workers, whatever share they take; [C, X].

    Attention takes its minimum over all numbers of head groups, and memory is ignored; inf beyond the latency limits.
    """
    t, at = costs.scopes[shape.scope].tables, np.ix_(mixes, shape.ranks)
    entries = t.least_pool_start[shape.ranks, workers.device_class] + workers.size
    layer_s = t.layer_s[at] + t.least_pool_s[np.ix_(mixes, entries)]
    prefix_s = t.prefix_layers * (layer_s + t.prefix_delta_s[at])
    beside_s = t.step_s[at] + t.plugin_step_s[mixes, None] + np.minimum(t.hop_s[at], prefix_s)
    found_s = shortest_fractional_s(t.num_layers, counts, layer_s, beside_s)
    return np.where(found_s > t.t_cap[mixes, shape.in_flight_index] * (1.0 + EXACT), np.inf, found_s)


def split_layers(
    num_layers: int, layer_s: FloatArray, fixed_s: FloatArray, most: IntArray, least: IntArray
) -> tuple[FloatArray, IntArray]:
    """Distribute all layers over the D stages of N replicas so that the slowest stage is as fast as possible.

    A stage takes ``layer_s`` per layer and ``fixed_s`` besides, and holds ``least`` to ``most`` layers, [N, D] each.
    Return the time of the slowest stage [N], inf if the layers do not fit, and the layers [N, D].

    With fractional layers all stages that are not full end at the same time. Each stage then starts with no more
    layers than it has in the best split, or its least. Missing layers are added one by one to the stage that ends first
    with them, and surplus layers are taken from the stages that end last.
    """
    is_out = np.any(most < least, axis=1) | (most.sum(axis=1) < num_layers)
    per_s, full_s, is_open = 1.0 / layer_s, most * layer_s + fixed_s, np.ones(layer_s.shape, dtype=bool)
    shortest_s, left = np.zeros(len(layer_s)), np.full(len(layer_s), float(num_layers))
    while True:
        share = np.where(is_open, per_s, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            even_s = (left + (share * fixed_s).sum(axis=1)) / share.sum(axis=1)
        shortest_s = np.where(is_open.any(axis=1), even_s, shortest_s)
        is_full = is_open & (full_s < shortest_s[:, None])
        if not is_full.any():
            break
        left, is_open = left - np.where(is_full, most, 0).sum(axis=1), is_open & ~is_full
    carried = np.floor((shortest_s[:, None] - fixed_s) * per_s * (1.0 - EXACT)).astype(np.int64)
    layers = np.where(is_open, np.maximum(least, np.minimum(most, carried)), most)
    missing = np.where(is_out, 0, num_layers - layers.sum(axis=1))
    while len(rows := np.flatnonzero(missing)):
        step = np.sign(missing[rows])[:, None]
        may = np.where(step > 0, layers[rows] < most[rows], layers[rows] > least[rows])
        ends_s = (layers[rows] + (step > 0)) * layer_s[rows] + fixed_s[rows]
        chosen = np.where(may, step * ends_s, np.inf).argmin(axis=1)
        is_stuck = ~may[np.arange(len(rows)), chosen]
        is_out[rows], missing[rows] = is_stuck, np.where(is_stuck, 0, missing[rows] - step[:, 0])
        layers[rows, chosen] += step[:, 0]
    return np.where(is_out, np.inf, (layers * layer_s + fixed_s).max(axis=1)), layers


class Ends(NamedTuple):
    """The rank types of a first and a last stage that compositions of a depth may have, as columns of counts; [E]."""

    first: IntArray
    last: IntArray

    @classmethod
    def of(cls, num_ranks: int, depth: int) -> Ends:
        """Return all choices; a single stage is both."""
        each = np.arange(num_ranks)
        if depth == 1:
            return cls(each, each)
        return cls(np.repeat(each, num_ranks), np.tile(each, num_ranks))

    def are_in(self, counts: IntArray, depth: int) -> BoolArray:
        """Return whether compositions [C, R] have these stages; [C, E]."""
        needed = 1 + ((self.first == self.last) & (depth > 1))
        return np.asarray((counts[:, self.first] >= needed) & (counts[:, self.last] >= 1))

    def besides(self, fixed: FloatArray) -> FloatArray:
        """Return what ends add to a sum over plain stages of values by role, given all [X, R, 4]; [X, E]."""
        more = fixed - fixed[:, :, [PLAIN]]
        if len(self.first) == fixed.shape[1] and np.array_equal(self.first, self.last):
            return np.asarray(more[:, :, BOTH])
        return np.asarray(more[:, self.first, FIRST] + more[:, self.last, LAST])


def lined_up(counts: IntArray, first: IntArray, last: IntArray) -> tuple[IntArray, IntArray]:
    """Return compositions [N, R] of equally many stages as sequences of them, and their roles; [N, D]."""
    num, depth, each = len(counts), int(counts[0].sum()), np.arange(len(counts))
    if depth == 1:
        return first[:, None], np.full((num, 1), BOTH)
    plain = counts.copy()
    plain[each, first] -= 1
    plain[each, last] -= 1
    between = np.repeat(np.tile(np.arange(counts.shape[1]), num), plain.ravel()).reshape(num, depth - 2)
    roles = np.tile(stage_roles(depth), (num, 1))
    return np.concatenate([first[:, None], between, last[:, None]], axis=1), roles


def intervals_of(
    num_layers: int,
    counts: IntArray,
    times: StageTimes,
    row: IntArray,
    first: IntArray,
    last: IntArray,
    least: IntArray,
) -> FloatArray:
    """Return the interval of each composition [N, R] at a row of the sweep with these ends, inf if it has no room."""
    stages, roles = lined_up(counts, first, last)
    at = row[:, None], stages
    slowest_s, _ = split_layers(
        num_layers, times.layer_s[at], times.fixed_s[*at, roles], times.most[*at, roles], least[roles]
    )
    return slowest_s


def best_splits(
    num_layers: int, counts: IntArray, times: StageTimes, lower_s: FloatArray, longest_s: FloatArray, least: IntArray,
    best_s: FloatArray,
) -> tuple[FloatArray, IntArray]:  # fmt: skip
    """Return the shortest interval of every composition [C] and how it is reached, [C, 3]: row of the sweep, ends.

    Only intervals below ``best_s`` [C] count, otherwise that is returned with -1. ``lower_s`` [C, X] are lower bounds
    and ``longest_s`` [X] limits of the sweep's rows. ``counts`` [C, R] are compositions of equally many stages.

    With fractional layers and without limits on memory, ends and mix give a closed form. Splits are tried in its order,
    since a short interval excludes most of the others.
    """
    best_s, found, depth = best_s.copy(), np.full((len(counts), 3), -1, dtype=np.int64), int(counts[0].sum())
    longest_s = longest_s * (1.0 + EXACT)
    ends, per_s, num = Ends.of(counts.shape[1], depth), 1.0 / times.layer_s, counts.astype(float)
    fixed = times.fixed_s * per_s[:, :, None]
    base, layers_per_s = num_layers + num @ fixed[:, :, PLAIN].T, num @ per_s.T
    bounds_s = (base[:, :, None] + ends.besides(fixed)) / layers_per_s[:, :, None] * (1.0 - EXACT)  # [C, X, E]
    may = (lower_s < np.minimum(best_s[:, None], longest_s))[:, :, None] & ends.are_in(counts, depth)[:, None, :]
    bounds_s = np.where(may, bounds_s, np.inf)
    first_s = bounds_s.min(axis=(1, 2))
    number = 0
    while True:
        which, row, end = np.nonzero(bounds_s < np.minimum(best_s[:, None], longest_s)[:, :, None])
        if not len(which):
            return best_s, found
        at_once = len(counts) if number == 0 else SPLITS_AT_ONCE
        if len(which) > at_once:
            ratio = bounds_s[which, row, end] / first_s[which]
            chosen = np.sort(np.argpartition(ratio, at_once - 1)[:at_once])
            which, row, end = which[chosen], row[chosen], end[chosen]
        number, bounds_s[which, row, end] = number + 1, np.inf
        first, last = ends.first[end], ends.last[end]
        slowest_s = intervals_of(num_layers, counts[which], times, row, first, last, least)
        slowest_s = np.where(slowest_s < np.minimum(best_s[which], longest_s[row]), slowest_s, np.inf)
        best = np.lexsort((slowest_s, which))
        best = best[np.flatnonzero(np.diff(which[best], prepend=-1))]
        best = best[np.isfinite(slowest_s[best])]
        best_s[which[best]] = slowest_s[best]
        found[which[best]] = np.stack([row[best], first[best], last[best]], axis=1)


def shapes_of(costs: CostTables) -> list[Shape]:
    """Return the compositions of every scope, TP size and depth that fit the fleet and have room for the model.

    Raises:
        InvalidProblemError: there are too many to list.
    """
    family, found, mixtures = costs.problem.family, list[Shape](), cache(_mixtures)  # zones often need the same ones
    engine, least = family.engine, least_layers(costs)
    assert engine is not None, "other families have replicas that are not listed"
    for number in range(len(costs.scopes)):
        for tp, dp in sorted({(tp, dp) for (_, tp), dp in zip(costs.ranks, costs.rank_dp, strict=True)}):
            ranks = _ranks_of(costs, number, tp, dp)
            deepest = engine.max_stages if engine.max_gpus is None else min(engine.max_stages, engine.max_gpus // tp)
            deepest = min(deepest, 1) if dp > 1 else deepest
            for depth in range(1, deepest + 1 if ranks else 1):
                if least[FIRST] + (depth - 1) * least[PLAIN] > costs.scopes[number].tables.num_layers:
                    break
                if family.mixed_types and math.comb(len(ranks) + depth - 1, depth) > MOST_COMPOSITIONS:
                    raise InvalidProblemError(
                        f"{len(ranks)} kinds of GPUs in a zone make too many pipelines of {depth} stages "
                        f"({MOST_COMPOSITIONS:,} are listed at most): allow fewer stages"
                    )
                pure = depth * np.eye(len(ranks), dtype=np.int64)
                counts = mixtures(len(ranks), depth) if family.mixed_types else pure
                counts = _with_room(costs, number, ranks, counts)
                if len(counts):
                    found.append(Shape(number, depth, np.array(ranks, dtype=np.int64), counts))
    return found


def _ranks_of(costs: CostTables, scope: int, tp: int, dp: int) -> list[int]:
    here, available = costs.scopes[scope], costs.scopes[scope].tables.available
    return [
        s
        for s, (g, size) in enumerate(costs.ranks)
        if (size, costs.rank_dp[s]) == (tp, dp)
        and available[g] >= tp
        and costs.classes[g].zone in here.zones
        and here.computes_on(g)
    ]


def _mixtures(num_ranks: int, depth: int) -> IntArray:
    """Return every choice of ``depth`` stages as numbers of each rank type; [C, ranks]."""
    chosen = np.array(list(itertools.combinations_with_replacement(range(num_ranks), depth)), dtype=np.int64)
    return np.stack([(chosen == i).sum(axis=1) for i in range(num_ranks)], axis=1)


def _with_room(costs: CostTables, scope: int, ranks: list[int], counts: IntArray) -> IntArray:
    """Return the rows of ``counts`` [C, ranks] that fit the fleet and have room for the model."""
    t = costs.scopes[scope].tables
    layers = np.clip(
        (t.room_bytes[ranks] - t.act_bytes[:, :, ranks].min(axis=(0, 1))) / t.layer_bytes[ranks], 0.0, None
    )
    fits = counts @ np.minimum(np.floor(layers + ROUNDING), t.num_layers) >= t.num_layers
    counts = counts[fits]
    most = [int(t.available[g]) // tp for g, tp in (costs.ranks[s] for s in ranks)]
    fits = np.all(counts <= most, axis=1)
    fits &= np.all(counts @ costs.group_use[ranks] <= costs.resources.limits, axis=1)
    return np.asarray(counts[fits])


def is_run_by_engine(costs: CostTables, template: Template) -> bool:
    """Return whether the family's engine can run a replica, judging by its shape; True if there is no engine."""
    rules, mix = costs.problem.family.engine, costs.mixes[template.mix]
    if rules is None:
        return True
    depth = len(template.stages)
    workers = {stage.pool_class for stage in template.stages}
    pools = {(stage.pool_class, stage.pool_cards, stage.pool_groups) for stage in template.stages}
    zones = {costs.classes[costs.ranks[stage.rank][0]].zone for stage in template.stages}
    sizes = {costs.ranks[stage.rank][1] for stage in template.stages}
    computes_on = costs.scopes[template.scope].computes_on
    gpus = sum(gpus_of(costs, template).values())
    least = least_layers(costs)
    return (
        depth == int(costs.scopes[template.scope].tables.in_flight[template.in_flight_index])
        and depth <= (rules.stages_of(mix.role, costs.problem.model) if workers == {-1} else rules.max_pooled_stages)
        and len(sizes) == len(zones) == len(pools) == 1
        and all(computes_on(costs.ranks[stage.rank][0]) for stage in template.stages)
        and (workers == {-1} or mix.role is Role.UNIFIED)
        and (rules.max_gpus is None or gpus <= rules.max_gpus)
        and (rules.max_nodes is None or least_nodes_of(costs.classes, kind_of(costs, template)) <= rules.max_nodes)
        and all(stage.layers >= least[FIRST if index == 0 else PLAIN] for index, stage in enumerate(template.stages))
    )


def least_nodes(costs: CostTables, shape: Shape, workers: Workers | None, places: Sequence[int]) -> IntArray:
    """Return the fewest nodes that a replica of each composition occupies, whatever else is on them; [C].

    ``places`` are equal for device classes whose GPUs may be in one node (`shared_places`).
    """
    counts, tp = shape.counts, costs.ranks[int(shape.ranks[0])][1]
    groups = {costs.ranks[int(s)][0]: counts[:, i] for i, s in enumerate(shape.ranks)}
    cards = dict.fromkeys(groups, 0)
    if workers is not None:
        cards[workers.device_class] = shape.depth * costs.pool_sizes[workers.size]
    taken = dict[int, IntArray]()
    for g, single in cards.items():
        of_class = groups.get(g, np.zeros(len(counts), dtype=np.int64))
        here = nodes_of_groups(of_class, tp, of_class * tp + single, costs.classes[g].gpus_per_node)
        taken[places[g]] = np.maximum(taken.get(places[g], 0), here)
    return np.asarray(sum(taken.values()))


def least_layers(costs: CostTables) -> IntArray:
    """Return the fewest repeated layers of a stage by role; leading dense layers are the first stage's own; [4]."""
    engine, prefix = costs.problem.family.engine, costs.problem.model.prefix_layers
    least = np.full(NUM_ROLES, 1 if engine is None else engine.min_layers, dtype=np.int64)
    least[[FIRST, BOTH]] = np.maximum(1, least[[FIRST, BOTH]] - prefix)
    return least


def workers_of(costs: CostTables, shape: Shape) -> Iterator[Workers]:
    """Yield the attention workers that replicas of a shape may have."""
    family, t = costs.problem.family, costs.scopes[shape.scope].tables
    engine = family.engine
    if engine is None or shape.depth > engine.max_pooled_stages or Role.UNIFIED not in family.roles:
        return
    tp = int(t.rank_tp[shape.ranks[0]])
    for q in range(len(costs.classes)):
        if np.any(t.pool_start[shape.ranks, q] < 0) or costs.classes[q].zone not in costs.scopes[shape.scope].zones:
            continue
        for size, cards in enumerate(costs.pool_sizes):
            total = shape.depth * (cards + tp)
            if shape.depth * cards <= t.available[q] and (engine.max_gpus is None or total <= engine.max_gpus):
                yield Workers(q, size)


def template_of_pipeline(
    costs: CostTables, shape: Shape, counts: IntArray, found: IntArray, workers: Workers | None
) -> Template:
    """Return the replica behind a composition [R] and what an evaluator found for it, [4]; see `Evaluator`."""
    x, first, last, groups = found.tolist()
    stages, roles = lined_up(counts[None], np.array([first]), np.array([last]))
    times = stage_times(costs, shape, sweep_of(costs, shape.depth, np.array([x]), np.array([groups])), workers)
    _, layers = split_layers(
        costs.scopes[shape.scope].tables.num_layers, times.layer_s[0, stages], times.fixed_s[0, stages, roles],
        times.most[0, stages, roles], least_layers(costs)[roles],
    )  # fmt: skip
    pool = () if workers is None else (workers.device_class, costs.pool_sizes[workers.size], groups)
    parts = tuple(TemplateStage(int(shape.ranks[s]), int(n), *pool) for s, n in zip(stages[0], layers[0], strict=True))
    template = Template(shape.scope, x, shape.in_flight_index, parts, np.inf)
    return replace(template, interval_s=interval_of(costs, template))
