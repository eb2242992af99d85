"""Replicas of an engine's family that may join the master, evaluated on demand at the master's prices.

Every composition has a lower bound on its interval, which is cheap to compute, and a best replica, which takes a search
over mixes, ends and splits (`pipelines.py`). At the relaxation's prices a replica improves it only below some interval,
so compositions whose lower bound exceeds that are not evaluated. Results are kept, and shared by zones whose GPUs and
links are the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from hetis.solver.placement.columns import Columns
from hetis.solver.placement.constraint_rows import Pins
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.kinds import Kind, kind_of_parts, shared_places
from hetis.solver.placement.replicas.pipelines import (
    best_splits,
    intervals_of,
    least_layers,
    least_nodes,
    shapes_of,
    shortest_with,
    template_of_pipeline,
    workers_of,
)
from hetis.solver.placement.replicas.stage_times import (
    EXACT,
    FreeTimes,
    MixSweep,
    Shape,
    StageTimes,
    Workers,
    chunk_caps,
    free_times,
    stage_times,
    sweep_of,
)
from hetis.solver.placement.replicas.tables import BoolArray, CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template

TOGETHER = 256  # compositions that are evaluated together
MARGIN = 1.03  # ratio to the needed interval up to which replicas are kept for other zones and later prices
MOST_SHARED = 1_000_000  # lower bounds of an evaluator that are kept for other utilisations
EVERY_MIX = 1.0 + 1e-7  # ratio to the longest interval up to which a mix is tried


class Evaluator:
    """An evaluator of the best replica of every composition of a shape, all with the same attention workers or none.

    No replica of a composition has a shorter interval than ``shortest_s`` [C]. If ``is_known`` [C], the best replica
    has this interval and is described by ``found`` [C, 4]: number of the mix in ``mixes``, first and last stage, head
    groups given away. ``number`` is that of the shape.
    """

    def __init__(
        self, costs: CostTables, shape: Shape, mixes: IntArray, workers: Workers | None, number: int
    ) -> None:  # fmt: skip
        self.costs, self.shape, self.mixes, self.workers = costs, shape, mixes, workers
        self._key = "times", number, mixes.tobytes()
        self._earlier = list[tuple[_Known, bool]]()  # at other utilisations, and whether limits were no tighter there
        self._num_layers, self._least = costs.scopes[shape.scope].tables.num_layers, least_layers(costs)
        self.is_known = np.zeros(len(shape.counts), dtype=bool)
        self.found = np.full((len(shape.counts), 4), -1, dtype=np.int64)

    @cached_property
    def shortest_s(self) -> FloatArray:
        """Return lower bounds [C], computed on first use: a first plan needs none for replicas with workers."""
        found_s = np.asarray(self._shortest_s(self.shape.counts).min(axis=1))
        if self.workers is None:
            sweep, free = self._free
            longest_s, chunk_s = self._longest_s(sweep), self._chunk_caps_s
            self._earlier = [(one, one.is_looser(longest_s, chunk_s)) for one in free.known]
            for one, is_looser in self._earlier:
                if is_looser and one.has_limits(longest_s, chunk_s):
                    self.is_known, self.found = one.is_known, one.found
                    return one.shortest_s
                if is_looser:
                    np.maximum(found_s, one.shortest_s, out=found_s)
            free.known.append(_Known(longest_s, chunk_s, found_s, self.is_known, self.found))
        return found_s

    def _shortest_s(self, counts: IntArray) -> FloatArray:
        """Return lower bounds by composition and mix if there are workers, otherwise by row of the sweep."""
        if self.workers is not None:
            return shortest_with(self.costs, self.shape, counts, self.mixes, self.workers)
        sweep, times = self._without_workers
        found_s = np.where(times.have_room(self._num_layers, counts), self._fractional_s, np.inf)
        return np.where(found_s > self._longest_s(sweep) * EVERY_MIX, np.inf, found_s)

    def _longest_s(self, sweep: MixSweep) -> FloatArray:
        tables = self.costs.scopes[self.shape.scope].tables
        return np.asarray(tables.t_cap[sweep.mixes, self.shape.in_flight_index])

    @cached_property
    def _without_workers(self) -> tuple[MixSweep, StageTimes]:
        sweep, free = self._free
        return sweep, free.times.within(self._chunk_caps_s)

    @cached_property
    def _chunk_caps_s(self) -> FloatArray:
        return chunk_caps(self.costs, self.shape, self._free[0])

    @cached_property
    def _free(self) -> tuple[MixSweep, _Free]:
        """The sweep without workers, and what does not depend on limits on latency.

        That is the same at all utilisations, and in all tables in which these stages take the same times.
        """
        found: tuple[MixSweep, _Free] | None = self.costs.shared.get(self._key)
        if found is None:
            costs = self.costs.of_scope(self.shape.scope)
            sweep = sweep_of(costs, self.shape.depth, self.mixes, np.zeros(1, dtype=np.int64))
            times = free_times(self.costs, self.shape, sweep, None)
            arrays = self.shape.counts, self._least, *times
            key = self._num_layers, self.shape.counts.shape, sha256(b"".join(one.tobytes() for one in arrays)).digest()
            found = self.costs.shared[self._key] = sweep, self.costs.evaluated.setdefault(key, _Free(times))
        return found

    @property
    def _fractional_s(self) -> FloatArray:
        """Lower bounds on the interval of every composition [C, X], without limits on latency and workers."""
        free = self._free[1]
        if free.shortest_s is not None:
            return free.shortest_s
        everywhere = free.times.within(np.full(len(self.mixes), np.inf))
        found_s = everywhere.fractional_s(self._num_layers, self.shape.counts)
        if found_s.size <= MOST_SHARED:
            free.shortest_s = found_s
        return found_s

    def evaluate(self, which: IntArray, needed_s: FloatArray) -> None:
        """Find the best replica of compositions [W] whose interval may be shorter than needed [W]."""
        unknown = ~self.is_known[which] & (self.shortest_s[which] < needed_s)
        which, worse_s = which[unknown], needed_s[unknown] * MARGIN
        at, found, interval_s = self._kept_of_before(which, worse_s)
        kept, worse_s[at] = which[at], interval_s
        is_best = interval_s <= self.shortest_s[kept]  # shorter than under looser limits it cannot be
        self._know(kept[is_best], found[is_best], interval_s[is_best])
        rest = ~self.is_known[which]
        which, worse_s = which[rest], worse_s[rest]
        for begin in range(0, len(which), TOGETHER):
            self._evaluate(which[begin : begin + TOGETHER], worse_s[begin : begin + TOGETHER])
        is_best = ~self.is_known[kept]  # as nothing better was found
        self._know(kept[is_best], found[is_best], interval_s[is_best])

    def _know(self, which: IntArray, found: IntArray, interval_s: FloatArray) -> None:
        """Note the best replicas of compositions [W]."""
        self.shortest_s[which], self.found[which], self.is_known[which] = interval_s, found, True

    def _kept_of_before(self, which: IntArray, worse_s: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
        """Return which compositions [W] have a best replica at another utilisation that keeps the limits here with an
        interval below ``worse_s`` [W], the replicas, as in ``found``, and their intervals.

        If there are several such utilisations, the latest with looser limits counts.
        """
        found = np.full((len(which), 4), -1, dtype=np.int64)
        for one, _ in sorted(self._earlier, key=itemgetter(1)):
            is_known = one.is_known[which]
            found[is_known] = one.found[which[is_known]]
        some = np.flatnonzero(found[:, 0] >= 0)
        if not len(some):
            return some, found[some], worse_s[some]
        found, (sweep, times) = found[some], self._without_workers
        row, counts = found[:, 0], self.shape.counts[which[some]]
        longest_s = self._longest_s(sweep)[row] * (1.0 + EXACT)
        interval_s = intervals_of(self._num_layers, counts, times, row, found[:, 1], found[:, 2], self._least)
        keeps = interval_s < np.minimum(worse_s[some], longest_s)
        return some[keeps], found[keeps], interval_s[keeps]

    def _evaluate(self, which: IntArray, worse_s: FloatArray) -> None:
        """Find the best replica of compositions [W] whose interval is shorter than ``worse_s`` [W]."""
        counts = self.shape.counts[which]
        sweep, times = self._without_workers if self.workers is None else self._with_workers(counts, worse_s)
        longest_s = self._longest_s(sweep) * EVERY_MIX
        if self.workers is None:
            lower_s = np.where(times.have_room(self._num_layers, counts), self._fractional_s[which], np.inf)
        else:
            lower_s = times.shortest_s(self._num_layers, counts)
        some = np.flatnonzero(np.any(lower_s < np.minimum(worse_s[:, None], longest_s), axis=0))
        if not len(some):
            self.shortest_s[which] = np.maximum(self.shortest_s[which], worse_s)
            return
        best_s, best = best_splits(
            self._num_layers, counts, times.of_rows(some), lower_s[:, some], self._longest_s(sweep)[some], self._least,
            worse_s,
        )  # fmt: skip
        row, is_found = some[best[:, 0]], best[:, 0] >= 0
        self.shortest_s[which] = np.where(is_found, best_s, np.maximum(self.shortest_s[which], worse_s))
        mix = np.searchsorted(self.mixes, sweep.mixes[row])
        found = np.stack([mix, best[:, 1], best[:, 2], sweep.groups[row]], axis=1)
        self.found[which], self.is_known[which] = np.where(is_found[:, None], found, -1), is_found

    def _with_workers(self, counts: IntArray, worse_s: FloatArray) -> tuple[MixSweep, StageTimes]:
        """Return a sweep of the mixes that may be fast enough, with every number of head groups, and its times."""
        assert self.workers is not None, "there are none"
        promising = np.any(self._shortest_s(counts) < worse_s[:, None], axis=0)
        groups = int(self.costs.scopes[self.shape.scope].tables.rank_groups[self.shape.ranks].min())
        costs = self.costs.of_scope(self.shape.scope)
        sweep = sweep_of(costs, self.shape.depth, self.mixes[promising], np.arange(1, groups + 1))
        return sweep, stage_times(self.costs, self.shape, sweep, self.workers)


class _Known(NamedTuple):
    """What is known at a utilisation: the limits of every row of the sweep, and what an `Evaluator` found."""

    longest_s: FloatArray
    chunk_caps_s: FloatArray
    shortest_s: FloatArray
    is_known: BoolArray
    found: IntArray

    def is_looser(self, longest_s: FloatArray, chunk_caps_s: FloatArray) -> bool:
        """Return whether no limit was tighter, so that no interval is shorter under the given ones."""
        return bool(np.all(self.longest_s >= longest_s) and np.all(self.chunk_caps_s >= chunk_caps_s))

    def has_limits(self, longest_s: FloatArray, chunk_caps_s: FloatArray) -> bool:
        """Return whether the limits are the given ones, so that everything known holds there."""
        return np.array_equal(self.longest_s, longest_s) and np.array_equal(self.chunk_caps_s, chunk_caps_s)


@dataclass(slots=True)
class _Free:
    """Times of a sweep without limits on latency, what is known under some, and `Evaluator._fractional_s`."""

    times: FreeTimes
    known: list[_Known] = field(default_factory=list)
    shortest_s: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Replicas of a shape on one side of the master, one for each composition.

    ``fits`` [C]: whether the fleet has room for it; ``is_enumerated`` [C]: whether it is a column. ``key`` is the same
    in the candidates of the same tables at another utilisation.
    """

    costs: CostTables
    shape: Shape
    side: int
    workers: Workers | None
    evaluator: Evaluator
    fits: BoolArray
    is_enumerated: BoolArray
    key: Hashable

    @property
    def load(self) -> float:
        """The share of its rate that a replica may be sent, see `Lanes`."""
        return self.costs.problem.assumptions.lanes.load(self.costs.mixes[self.evaluator.mixes[0]].role)

    def worth(self, row_prices: FloatArray) -> FloatArray:
        """Return the value of the GPUs of every composition; [C]."""
        worth = self.shape.counts @ (self.costs.group_use[self.shape.ranks] @ row_prices)
        return np.asarray(worth + self._beside() @ row_prices)

    def _beside(self) -> IntArray:
        """Return how much of every row attention workers take; [rows]."""
        return _taken_by_workers(self.costs, self.shape, self.workers)

    def worth_evaluating(self, needed_s: FloatArray) -> IntArray:
        """Return compositions that fit, are not columns yet, and may have an interval below the needed one [C]."""
        return np.flatnonzero(self.fits & ~self.is_enumerated & (self.evaluator.shortest_s < needed_s))

    def found_among(self, which: IntArray, needed_s: FloatArray) -> IntArray:
        """Evaluate compositions [W]; return those whose best replica has an interval below the needed one [W]."""
        self.evaluator.evaluate(which, needed_s)
        return np.asarray(which[self.evaluator.is_known[which] & (self.evaluator.shortest_s[which] < needed_s)])

    def columns(self, which: IntArray, row_costs: FloatArray) -> Columns:
        """Return known replicas as columns."""
        uses = self.shape.counts[which] @ self.costs.group_use[self.shape.ranks] + self._beside()
        rates = self.load / self.evaluator.shortest_s[which]
        return Columns(rates, uses @ row_costs, uses, np.full(len(which), self.side))

    def kind(self, composition: int) -> Kind:
        """Return the GPUs that a replica takes."""
        counts = self.shape.counts[composition].tolist()
        parts = [(*self.costs.ranks[rank], count) for rank, count in zip(self.shape.ranks, counts, strict=True)]
        if self.workers is not None:
            cards = self.shape.depth * self.costs.pool_sizes[self.workers.size]
            parts.append((self.workers.device_class, 1, cards))
        return kind_of_parts(parts)

    def template(self, composition: int) -> Template:
        """Return a known replica."""
        counts, found = self.shape.counts[composition], self.evaluator.found[composition].copy()
        found[0] = self.evaluator.mixes[found[0]]
        return template_of_pipeline(self.costs, self.shape, counts, found, self.workers)


def candidates_of(costs: CostTables, pins: Pins | None = None) -> tuple[list[Candidates], Iterator[Candidates]]:
    """Return all replicas of an engine's family, unevaluated: those without attention workers, and those with.

    A replica that exceeds a pin's limit alone does not fit.

    Raises:
        InvalidProblemError: there are too many to list.
    """
    shapes, evaluators = shapes_of(costs), dict[Hashable, Evaluator]()
    scopes = {shape.scope for shape in shapes}
    kinds = dict(zip(scopes, _numbered([_kind_of_scope(costs, number) for number in scopes]), strict=True))
    compositions = _numbered([shape.counts.tobytes() for shape in shapes])
    uses = [shape.counts @ costs.group_use[shape.ranks] for shape in shapes]
    engine, places = costs.problem.family.engine, shared_places(costs.classes)
    assert engine is not None, "a search is for an engine"

    def made(number: int, side: int, mixes: IntArray, workers: Workers | None) -> Candidates:
        shape = shapes[number]
        place = None if workers is None else (_place_in_zone(costs, workers.device_class), workers.size)
        alike = kinds[shape.scope], shape.depth, _ranks(costs, shape), compositions[number], mixes.tobytes(), place
        if alike not in evaluators:
            evaluators[alike] = Evaluator(costs, shape, mixes, workers, number)
        taken = uses[number] + _taken_by_workers(costs, shape, workers)
        fits = np.all(taken <= costs.resources.limits, axis=1)
        if pins is not None:
            fits &= pins.allow_one(taken)
        if engine.max_nodes is not None:
            fits &= least_nodes(costs, shape, workers, places) <= engine.max_nodes
        is_enumerated, key = np.zeros(len(fits), dtype=bool), (number, side, workers)
        return Candidates(costs, shape, side, workers, evaluators[alike], fits, is_enumerated, key)

    mixes_of = {
        (number, dp): _mixes_by_side(costs, number, dp) for number in kinds for dp in sorted({1, *costs.rank_dp})
    }
    without = [
        made(number, side, mixes, None)
        for number, shape in enumerate(shapes)
        for side, mixes in mixes_of[shape.scope, _ranks(costs, shape)[1]].items()
        if shape.depth <= engine.stages_of(costs.mixes[mixes[0]].role, costs.problem.model)
    ]
    return without, (
        made(number, side, mixes_of[shape.scope, 1][side], workers)
        for number, shape in enumerate(shapes)
        if (side := costs.routes.unified(costs.scopes[shape.scope].number)) in mixes_of[shape.scope, 1]
        for workers in workers_of(costs, shape)
    )


def _numbered(values: Sequence[Hashable]) -> list[int]:
    """Return a number for each value, the same for equal ones."""
    numbers = dict[Hashable, int]()
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _taken_by_workers(costs: CostTables, shape: Shape, workers: Workers | None) -> IntArray:
    if workers is None:
        return np.zeros(len(costs.resources.rows), dtype=np.int64)
    cards = shape.depth * costs.pool_sizes[workers.size]
    return np.asarray(cards * costs.card_use[workers.device_class])


def _ranks(costs: CostTables, shape: Shape) -> tuple[int, int]:
    """Return the GPUs of a shape's ranks, and the number of copies among them that share their experts."""
    rank = int(shape.ranks[0])
    return costs.ranks[rank][1], costs.rank_dp[rank]


def _mixes_by_side(costs: CostTables, scope: int, attention_dp: int) -> dict[int, IntArray]:
    by_side: dict[int, list[int]] = {}
    for x, mix in enumerate(costs.mixes):
        if costs.scopes[scope].serves(mix) and mix.attention_dp == attention_dp:
            by_side.setdefault(costs.side_of(scope, x), []).append(x)
    return {side: np.array(mixes, dtype=np.int64) for side, mixes in by_side.items()}


def _place_in_zone(costs: CostTables, device_class: int) -> int:
    return sum(c.zone == costs.classes[device_class].zone for c in costs.classes[:device_class])


def _kind_of_scope(costs: CostTables, scope: int) -> Hashable:
    """Return a key, equal for scopes in which replicas of equal classes, in order, take equal times and memory."""
    here, t, cluster = costs.scopes[scope], costs.scopes[scope].tables, costs.problem.cluster
    inside = [g for g, c in enumerate(costs.classes) if here.part.has(c)]
    ranks = [s for s, (g, _) in enumerate(costs.ranks) if g in inside]
    gpus = [
        (c.gpu, c.gpus_per_node, c.reserved_bytes, c.intra, c.link_in(cluster, here.part), c.constraints, computes)
        for c, computes in ((costs.classes[g], here.computes_on(g)) for g in inside)
    ]
    arrays = (t.t_cap, t.trip_cap, t.wire_s[:, ranks], t.hop_s[:, ranks], t.pool_start[np.ix_(ranks, inside)])
    return here.number, here.roles, tuple(gpus), *(values.tobytes() for values in arrays)
