"""The enumeration of every pipeline that an engine runs: few stages of one TP size, without copies (`EngineRules`).

There are few ways in which such a replica may use the fleet: a number of TP groups of each device class, called a
*composition*, optionally with attention workers of one class, equally many for every stage. For each of them the
quickest split of layers is found over all iteration mixes, and the best becomes a column of the master
(`enumeration.py`). Equal stages of one GPU type are the family of `uniform`, and the first columns of other searches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from hetis.solver.cost import UNEVENNESS_STEP, Regime
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.nodes import kind_of, least_nodes_of, nodes_of_groups
from hetis.solver.placement.stage_cost import ROUNDING, FixedTimes, fill_fixed, iterations_of, layers_on_rank, stretch
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, CostTables, FloatArray, Tables
from hetis.solver.placement.template import Template, TemplateStage, gpus_of, interval_of
from hetis.solver.plan import Role

NUM_ROLES = 4
MOST_COMPOSITIONS = 400_000  # limit per TP size and depth
MOST_EQUAL = 2_000  # choices of the nodes of equal stages with different explicit links
SPLITS_AT_ONCE = 4096  # splits of layers that are tried together
EXACT = 1e-12  # ratio by which rounding may affect a bound on an interval


@dataclass(frozen=True, slots=True)
class Workers:
    """The attention workers of every stage of a replica: a device class and their number."""

    device_class: int
    size: int  # index of the number of cards in `CostTables.pool_sizes`


@dataclass(frozen=True, slots=True)
class Shape:
    """Replicas of one scope, kind of rank and depth, with the same attention workers at every stage, or none.

    ``ranks`` are the rank types that stages may have; ``counts`` [C, ranks] are the compositions.
    """

    scope: int
    depth: int
    ranks: IntArray
    counts: IntArray

    @property
    def in_flight_index(self) -> int:
        return self.depth - 1


@dataclass(frozen=True, slots=True)
class MixSweep:
    """Settings with which replicas of a shape are tried, one per row.

    Rows have a mix [X] and the head groups of every rank that workers take [X], 0 without workers. ``least_slack`` and
    ``unevenness`` [X] are those of the regime.
    """

    mixes: IntArray
    groups: IntArray
    least_slack: FloatArray
    unevenness: FloatArray


def sweep_of(costs: CostTables, depth: int, mixes: IntArray, groups: IntArray) -> MixSweep:
    """Return every mix with every given number of head groups."""
    # Deeper pipelines have as many micro-batches as stages; a single stage waits only for its own copies.
    kinds = [(costs.mixes[x].role, costs.mixes[x].attention_dp) for x in mixes.tolist()]
    of_kind = {
        kind: costs.regime_together(x) if depth == 1 else costs.regimes(kind[0])[1]
        for kind, x in zip(kinds, mixes.tolist(), strict=True)
    }
    each = len(groups)
    return MixSweep(
        mixes=np.repeat(mixes, each),
        groups=np.tile(groups, len(mixes)),
        least_slack=np.repeat([of_kind[kind].least for kind in kinds], each),
        unevenness=np.repeat([of_kind[kind].unevenness for kind in kinds], each),
    )


class StageTimes(NamedTuple):
    """Stages of rank types R under the X rows of a sweep, including slack.

    Seconds per repeated layer [X, R], seconds besides layers [X, R, 4] by role, and the most repeated layers that fit
    in memory and in a round trip with a chunk [X, R, 4].
    """

    layer_s: FloatArray
    fixed_s: FloatArray
    most: IntArray

    def of_rows(self, rows: IntArray) -> StageTimes:
        """Return those of some rows of the sweep."""
        return StageTimes(self.layer_s[rows], self.fixed_s[rows], self.most[rows])

    def shortest_s(self, num_layers: int, counts: IntArray) -> FloatArray:
        """Return lower bounds on each composition's interval, from fractional layers and the cheapest role; [C, X].

        The bound is inf if the stages have no room for all layers.
        """
        room = counts.astype(float) @ self.most.max(axis=2).T.astype(float)  # numpy multiplies integers slowly
        return np.where(room < num_layers, np.inf, _shortest_s(num_layers, counts, self.layer_s, self.fixed_s.min(2)))


def stage_times(costs: CostTables, shape: Shape, sweep: MixSweep, workers: Workers | None) -> StageTimes:
    """Compute what `options.list_options` does for single copies, for a whole sweep; workers need unified mixes."""
    t, f, s, x = costs.scopes[shape.scope].tables, shape.in_flight_index, shape.ranks, sweep.mixes
    at = np.ix_(x, s)
    groups, given = t.rank_groups[s], sweep.groups[:, None]
    kv_bytes = t.kv_group_bytes * t.kv_tokens[x, f, 0][:, None]
    if workers is None:
        kept = x[:, None], s[None, :], groups[None, :]
        attention_s, chunk_attention_s = t.own_s[kept], t.chunk.own_s[kept]
        state = t.state_bytes[x, f, 0][:, None] / t.state_ranks[s]
        kept, on_cards = groups * kv_bytes + state, np.full((len(x), len(s)), np.inf)
    else:
        entries = t.pool_start[s, workers.device_class] + (given - 1) * len(t.pool_sizes) + workers.size
        attention_s, chunk_attention_s = t.pool_s[x[:, None], entries], t.chunk.pool_s[x[:, None], entries]
        prompt_bytes = t.kv_group_bytes * t.prompt_tokens[x, f, 0][:, None]
        kept = (groups - given) * kv_bytes + given * prompt_bytes
        requests = (shape.depth * t.micro_batch[x])[:, None]
        pairs = np.ceil(requests * given * t.rank_tp[s] / t.pool_sizes[workers.size] - ROUNDING)
        on_cards = t.worker_room_bytes[workers.device_class] / (pairs / requests * kv_bytes) + ROUNDING
    compute_s, chunk_s = t.layer_s[at] + attention_s, t.chunk.layer_s[at] + chunk_attention_s
    layer_s = np.maximum(compute_s, t.wire_s[at])
    prefix_s = t.prefix_layers * np.maximum(compute_s + t.prefix_delta_s[at], t.wire_s[at])
    fixed_s = _by_role(t.step_s[at], t.hop_s[at], prefix_s, t.last_s[at])
    most = np.minimum(_layers_that_fit(costs, shape, x, kept), on_cards[:, :, None])
    if workers is not None:
        most[:, :, [FIRST, BOTH]] = np.minimum(most[:, :, [FIRST, BOTH]], on_cards[:, :, None] - t.prefix_layers)
    chunk_cap_s = (t.trip_cap[x, f] / shape.depth)[:, None, None]
    if np.isfinite(chunk_cap_s).any():
        chunk_prefix_s = t.prefix_layers * (chunk_s + t.chunk.prefix_delta_s[at])
        beside_s = _by_role(t.chunk.step_s[at], t.chunk.hop_s[at], chunk_prefix_s, t.chunk.last_s[at])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            in_time = (chunk_cap_s - beside_s) / chunk_s[:, :, None] + ROUNDING
        most = np.where(np.isfinite(chunk_cap_s), np.minimum(most, in_time), most)
    longer = 1.0 + _slack(costs, shape, sweep, layer_s, chunk_s)
    return StageTimes(
        layer_s=layer_s * longer, fixed_s=fixed_s * longer[:, :, None], most=np.maximum(0.0, most).astype(np.int64)
    )


def _shortest_s(num_layers: int, counts: IntArray, layer_s: FloatArray, beside_s: FloatArray) -> FloatArray:
    per_s, stages = 1.0 / layer_s, counts.astype(float)
    found: FloatArray = (num_layers + stages @ (beside_s * per_s).T) / (stages @ per_s.T)
    return found * (1.0 - EXACT)


def shortest_with(costs: CostTables, shape: Shape, counts: IntArray, mixes: IntArray, workers: Workers) -> FloatArray:
    """Return lower bounds on the interval of each composition with these workers, whatever share they take; [C, X].

    Attention takes its minimum over all numbers of head groups, and memory is ignored; inf beyond the latency limits.
    """
    t, at = costs.scopes[shape.scope].tables, np.ix_(mixes, shape.ranks)
    entries = t.least_pool_start[shape.ranks, workers.device_class] + workers.size
    layer_s = t.layer_s[at] + t.least_pool_s[np.ix_(mixes, entries)]
    prefix_s = t.prefix_layers * (layer_s + t.prefix_delta_s[at])
    beside_s = t.step_s[at] + np.minimum(t.hop_s[at], prefix_s)
    found_s = _shortest_s(t.num_layers, counts, layer_s, beside_s)
    return np.where(found_s > t.t_cap[mixes, shape.in_flight_index] * (1.0 + EXACT), np.inf, found_s)


def _layers_that_fit(costs: CostTables, shape: Shape, mixes: IntArray, kept: FloatArray) -> FloatArray:
    """Return the repeated layers that fit in a rank's memory, [X, R, 4]; ``kept`` [X, R] is KV bytes of one layer."""
    t, s = costs.scopes[shape.scope].tables, shape.ranks
    at, f = np.ix_(mixes, s), shape.in_flight_index
    room = (t.room_bytes[s] - t.act_bytes[:, f][at])[:, :, None].repeat(NUM_ROLES, axis=2)
    room[:, :, [FIRST, BOTH]] -= (t.first_bytes[s] + t.prefix_layers * kept)[:, :, None]
    room[:, :, [LAST, BOTH]] -= (t.last_bytes[s] + t.logit_bytes[:, f][at] + t.draft_layers * kept)[:, :, None]
    room[:, :, BOTH] += t.tied_bytes[s]
    return np.minimum(room / (t.layer_bytes[s] + kept)[:, :, None] + ROUNDING, float(t.num_layers))


def _by_role(step_s: FloatArray, hop_s: FloatArray, prefix_s: FloatArray, last_s: FloatArray) -> FloatArray:
    """Return the seconds of stages besides their repeated layers; [X, S, 4]."""
    fixed_s = np.empty((*step_s.shape, NUM_ROLES))
    fixed_s[:, :, PLAIN] = step_s + hop_s
    fixed_s[:, :, FIRST] = step_s + prefix_s
    fixed_s[:, :, LAST] = step_s + hop_s + last_s
    fixed_s[:, :, BOTH] = step_s + prefix_s + last_s
    return fixed_s


def _slack(costs: CostTables, shape: Shape, sweep: MixSweep, request_s: FloatArray, chunk_s: FloatArray) -> FloatArray:
    """Return `options.stretch` minus 1; [X, R]. ``request_s`` and ``chunk_s`` are those of a repeated layer."""
    t, x, f = costs.scopes[shape.scope].tables, sweep.mixes, shape.in_flight_index
    least, unevenness = sweep.least_slack[:, None], sweep.unevenness[:, None]
    iterations, nc, none = t.iterations[x][:, None], t.chunk_iterations[x][:, None], t.without_chunk[x, f][:, None]
    plain = iterations - nc
    with np.errstate(divide="ignore", invalid="ignore"):
        plain_s = (request_s - nc * chunk_s) / plain
        longest_s = chunk_s - (chunk_s - plain_s) * none
        uneven = unevenness * (longest_s * iterations / request_s - 1.0)
    applies = (unevenness > 0.0) & (plain > 0.0) & (nc > 0.0)
    return np.where(applies, np.maximum(least, uneven), least)


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
    roles = np.tile([FIRST, *[PLAIN] * (depth - 2), LAST], (num, 1))
    return np.concatenate([first[:, None], between, last[:, None]], axis=1), roles


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
        stages, roles = lined_up(counts[which], first, last)
        at = row[:, None], stages
        slowest_s, _ = split_layers(
            num_layers, times.layer_s[at], times.fixed_s[*at, roles], times.most[*at, roles], least[roles]
        )
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
    groups, workers = sum(stage.copies for stage in template.stages), {stage.pool_class for stage in template.stages}
    pools = {(stage.pool_class, stage.pool_cards, stage.pool_groups) for stage in template.stages}
    zones = {costs.classes[costs.ranks[stage.rank][0]].zone for stage in template.stages}
    sizes = {costs.ranks[stage.rank][1] for stage in template.stages}
    computes_on = costs.scopes[template.scope].computes_on
    gpus = sum(gpus_of(costs, template).values())
    least = least_layers(costs)
    return (
        depth == groups == int(costs.scopes[template.scope].tables.in_flight[template.in_flight_index])
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
    parts = tuple(
        TemplateStage(int(shape.ranks[s]), 1, int(n), *pool) for s, n in zip(stages[0], layers[0], strict=True)
    )
    template = Template(shape.scope, x, shape.in_flight_index, parts, np.inf)
    return replace(template, interval_s=interval_of(costs, template))


# --- equal stages of one GPU type


@kernel
def _equal_layers(num_layers: int, num_stages: int, role: int) -> int:
    """Return the layers of a stage; the remainder goes to plain stages first, then to the first, then to the last."""
    each, spare = num_layers // num_stages, num_layers % num_stages
    if role == FIRST:
        return each + (1 if spare > max(0, num_stages - 2) else 0)
    if role == PLAIN:
        return each + (1 if spare > 0 else 0)  # the larger number among plain stages
    return each


@kernel
def best_equal_split(
    t: Tables, mixes: IntArray, s: int, num_stages: int, full: Regime, tight: Regime, together: Regime,
    depth_in_flight: bool,
) -> tuple[float, int, int]:  # fmt: skip
    """Return the shortest interval of ``num_stages`` equal stages of rank type s, with its mix and in-flight index.

    The mix is one of ``mixes``. The interval is inf if nothing fits in memory or meets the limits.
    """
    best, best_x, best_f = np.inf, -1, -1
    kinds = 1 if num_stages == 1 else (2 if num_stages == 2 else 3)
    groups, fixed_s, chunk_fixed_s = t.rank_groups[s], np.empty(4), np.empty(4)
    # The remainder goes to plain stages first, and may be less than their number.
    many_plain = 0 < t.num_layers % num_stages < num_stages - 2
    for x in mixes:
        compute_s = t.layer_s[x, s] + t.own_s[x, s, groups]
        w = max(compute_s, t.wire_s[x, s])
        chunk_w = t.chunk.layer_s[x, s] + t.chunk.own_s[x, s, groups]
        times = FixedTimes(t.hop_s[x, s], t.step_s[x, s], t.last_s[x, s], t.prefix_delta_s[x, s])
        chunk_times = FixedTimes(
            t.chunk.hop_s[x, s], t.chunk.step_s[x, s], t.chunk.last_s[x, s], t.chunk.prefix_delta_s[x, s]
        )
        fill_fixed(fixed_s, t.prefix_layers, compute_s, t.wire_s[x, s], times)
        fill_fixed(chunk_fixed_s, t.prefix_layers, chunk_w, 0.0, chunk_times)
        for f in range(t.in_flight.shape[0]):
            m = t.in_flight[f]
            if 1 < m < num_stages or (depth_in_flight and m != num_stages):
                continue
            if t.rank_dp[s] > 1 and (m > 1 or num_stages > 1):
                continue
            kept = groups * t.kv_group_bytes * t.kv_tokens[x, f, 0] + t.state_bytes[x, f, 0] / t.state_ranks[s]
            busiest, total, fits, chunk_s, uneven = 0.0, 0.0, True, 0.0, 1.0
            for kind in range(kinds):
                role = BOTH if num_stages == 1 else (FIRST, LAST, PLAIN)[kind]
                layers = _equal_layers(t.num_layers, num_stages, role)
                if layers < 1 or layers > layers_on_rank(t, x, f, s, kept, role):
                    fits = False
                    break
                fixed, chunk_fixed = fixed_s[role], chunk_fixed_s[role]
                chunk_s = max(chunk_s, layers * chunk_w + chunk_fixed)
                # Some plain stages may have one layer less, which gives the rest of the stage more weight.
                for n in range(max(1, layers - 1) if role == PLAIN and many_plain else layers, layers + 1):
                    uneven = max(uneven, (n * chunk_w + chunk_fixed) * t.iterations[x] / (n * w + fixed))
                busiest = max(busiest, layers * w + fixed)
                if role != PLAIN:
                    total += layers * w + fixed
                else:
                    first = _equal_layers(t.num_layers, num_stages, FIRST)
                    last = _equal_layers(t.num_layers, num_stages, LAST)
                    total += (t.num_layers - first - last) * w + (num_stages - 2) * fixed
            if not fits:
                continue
            if m == 1:
                interval = total
                if t.rank_dp[s] > 1:
                    interval *= stretch(iterations_of(t, x, f), w, chunk_w, together.least, together.unevenness)
            else:
                regime = full if m >= 2 * num_stages else tight
                interval = stretch(iterations_of(t, x, f), w, chunk_w, regime.least, regime.unevenness) * max(
                    busiest, total / m
                )
            if t.trip_cap[x, f] < np.inf:
                if m == 1 and num_stages > 1:
                    limit = UNEVENNESS_STEP ** np.ceil(np.log(uneven) / np.log(UNEVENNESS_STEP) - ROUNDING)
                    in_time = interval <= t.trip_cap[x, f] * t.iterations[x] / limit
                else:
                    copies = m // 2 if m >= 2 * num_stages else m
                    in_time = chunk_s * copies <= t.trip_cap[x, f]
                if not in_time:
                    continue
            if interval <= t.t_cap[x, f] and interval < best:
                best, best_x, best_f = interval, x, f
    return best, best_x, best_f


def uniform_templates(costs: CostTables) -> list[Template]:
    """Return the best replica of every rank type and number of equal stages that fits in the fleet, on every side."""
    found: list[Template] = []
    for scope, part in enumerate(costs.scopes):
        mixes_on: dict[int, list[int]] = {}
        for x in (x for x, mix in enumerate(costs.mixes) if part.serves(mix)):
            mixes_on.setdefault(costs.side_of(scope, x), []).append(x)
        for mixes in mixes_on.values():
            found.extend(_equal_stages(costs, scope, np.array(mixes, dtype=np.int64)))
    return found


def _equal_stages(costs: CostTables, scope: int, mixes: IntArray) -> Iterator[Template]:
    t, regimes = costs.scopes[scope].tables, costs.regimes(costs.mixes[mixes[0]].role)
    degrees = np.array([mix.attention_dp for mix in costs.mixes])[mixes]
    family = costs.problem.family
    most_stages = min(t.num_layers, max(family.in_flight))
    for ranks in _equal_ranks(costs, scope):
        own = mixes[degrees == costs.rank_dp[ranks[0]]]
        together = costs.regime_together(own[0])
        for counts in _counts_of_stages(
            [int(t.available[t.rank_class[s]] // t.rank_tp[s]) for s in ranks], most_stages
        ):
            placed = [s for s, count in zip(ranks, counts, strict=True) for _ in range(count)]
            slowest, num_stages = max(placed, key=lambda s: float(t.hop_s[:, s].sum())), len(placed)
            _, x, f = best_equal_split(t, own, slowest, num_stages, *regimes, together, family.engine is not None)
            if x < 0:
                continue
            each, spare = divmod(t.num_layers, num_stages)
            takers = [*range(1, num_stages - 1), 0, num_stages - 1][:spare] if num_stages > 1 else []
            stages = tuple(
                TemplateStage(rank=s, copies=1, layers=each + (1 if i in takers else 0)) for i, s in enumerate(placed)
            )
            cuts = np.cumsum([stage.layers for stage in stages])[:-1]
            if np.any(t.cut_floor[cuts] != cuts):
                continue  # the model does not allow these cuts
            template = Template(scope, x, f, stages, np.inf)
            if is_run_by_engine(costs, template):
                yield replace(template, interval_s=interval_of(costs, template))


def _equal_ranks(costs: CostTables, scope: int) -> list[list[int]]:
    """Return the rank types of a scope, together those of classes that differ only in their links to single nodes."""
    found = dict[Hashable, list[int]]()
    for s, (device_class, size) in enumerate(costs.ranks):
        if costs.scopes[scope].computes_on(device_class):
            c = costs.classes[device_class]
            alike = replace(c, block=0, node_links=(), groups=())
            found.setdefault((alike, size, costs.rank_dp[s]), []).append(s)
    return list(found.values())


def _counts_of_stages(most: Sequence[int], most_stages: int) -> Iterator[tuple[int, ...]]:
    """Yield how many equal stages are of each rank type: all choices, or with too many, those of a single type."""
    used = [i for i, count in enumerate(most) if count]
    several = math.prod(1 + min(most[i], most_stages) for i in used) <= MOST_EQUAL
    for counts in itertools.product(*(range(1 + (min(count, most_stages))) for count in most)) if several else ():
        if 0 < sum(counts) <= most_stages:
            yield counts
    for i in () if several else used:
        for count in range(1, 1 + min(most[i], most_stages)):
            yield tuple(count if i == j else 0 for j in range(len(most)))
