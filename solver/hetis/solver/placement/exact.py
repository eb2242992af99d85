"""Small fleets: the best replica of every sub-fleet, then the best packing of sub-fleets; a proof, not a gap.

Three passes over all configurations, each with a narrower tolerance. After a pass the master over the rates found
gives an incumbent, and duals scaled to fit every sub-fleet give a bound; a replica whose rate falls short of its
price by more than the distance between the two cannot be part of anything better, so the next pass does not look for
it (`needed_rates`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.frontier import entry_layers, explore, reach, stages_from
from hetis.solver.placement.frontier_sequential import explore_sequential, sequential_stages
from hetis.solver.placement.generation import dense_work_bound
from hetis.solver.placement.lattice import Entries, Lattice, entries_of, lattice_of
from hetis.solver.placement.master import Columns, Master, MilpSolution
from hetis.solver.placement.options import Options, list_options, stage_rows
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.tables import Atlas, BoolArray, FloatArray
from hetis.solver.placement.template import Configuration, Template, configurations, template_of

MAX_GPUS = 24
MAX_PAIRS = 60_000  # of (usage, smaller usage): what one dynamic program looks at, at worst
TOLERANCES = (0.2, 0.01, 1e-7)


def is_small(atlas: Atlas) -> bool:
    """Whether the fleet has few enough usage vectors for the exact search."""
    sizes = atlas.resources.limits.astype(float) + 1.0
    gpus = sum(c.available for c in atlas.classes)
    return bool(gpus <= MAX_GPUS and np.prod(sizes * (sizes + 1.0) / 2.0) <= MAX_PAIRS)


def speed_bounds(atlas: Atlas, lattice: Lattice) -> FloatArray:
    """Upper bounds on the rate of any replica, per scope, mix and sub-fleet, from dense work alone; [scopes, X, V].

    A GPU of class g that gives all its time to repeated layers, without attention, serves at most ``1 / (n w)``
    layers per second for the best TP size n; a replica needs all layers from the GPUs it has.
    """
    bounds = []
    for scope in atlas.scopes:
        t = scope.tables
        speeds = np.zeros((len(atlas.mixes), len(atlas.resources.rows)))
        for s, (device_class, tp) in enumerate(atlas.ranks):
            if t.available[device_class] > 0:
                row = atlas.resources.rows.index((device_class, 1))
                speeds[:, row] = np.maximum(speeds[:, row], 1.0 / (tp * t.layer_s[:, s]))
        bounds.append(speeds @ lattice.digits.T / t.num_layers)
    return np.array(bounds)


@dataclass(slots=True)
class Frontier:
    """Best rate [V] of each sub-fleet, where it was found, and what cannot be exceeded."""

    lattice: Lattice
    rate: FloatArray
    tag: IntArray  # configuration
    interval_s: FloatArray  # slack taken off, except for sequential replicas
    bound: FloatArray
    templates: dict[int, Template] = field(default_factory=dict)

    def ceiling(self, tolerance: float) -> FloatArray:
        """No replica outside what was ruled out by `needed_rates` has a higher rate, per sub-fleet."""
        return np.maximum(self.bound, self.rate * (1.0 + tolerance))


class ExactSearch:
    """The exact search of one problem. ``costs`` [V] are what the master minimises where it has a demand."""

    def __init__(self, atlas: Atlas, master: Master, row_costs: FloatArray) -> None:
        self.atlas, self.master = atlas, master
        self.lattice = lattice_of(atlas.resources.limits)
        self.costs = self.lattice.digits @ row_costs
        self.configurations = configurations(atlas)
        self.speed_bound = speed_bounds(atlas, self.lattice)
        self._options: dict[tuple[int, int, int], tuple[Options, Entries]] = {}
        self.roomy = self._roomy()
        count = len(self.lattice.digits)
        self.frontier = Frontier(
            self.lattice, np.zeros(count), np.full(count, -1), np.zeros(count), np.zeros(count)
        )  # fmt: skip

    def _roomy(self) -> BoolArray:
        """Sub-fleets with memory for a replica of some configuration; [V].

        The fewer requests a replica holds the less memory it takes, but there is no order among chunks: a longer one
        takes room itself, and ends prefill sooner.
        """
        roomy = np.zeros(len(self.lattice.digits), dtype=bool)
        family, mixes = self.atlas.problem.family, self.atlas.mixes
        batch, in_flight = min(mix.micro_batch for mix in mixes), min(family.in_flight)
        f = family.in_flight.index(in_flight)
        for scope, part in enumerate(self.atlas.scopes):
            for x in (x for x, mix in enumerate(mixes) if mix.micro_batch == batch):
                options, entries = self.options_of(Configuration(scope, x, f, in_flight, 1 << 20, 0.0))
                layers, _ = entry_layers(part.tables, options, entries, np.inf)
                roomy |= reach(part.tables, self.lattice, entries, layers, 0).closing >= 0
        return roomy

    def options_of(self, c: Configuration) -> tuple[Options, Entries]:
        key = (c.scope, c.mix, c.in_flight_index)
        if key not in self._options:
            a, family = self.atlas, self.atlas.problem.family
            tables = a.scopes[c.scope].tables
            options = list_options(tables, c.mix, c.in_flight_index, family.max_copies, family.max_pool)
            self._options[key] = (options, entries_of(self.lattice, options, a.group_use, a.card_use))
        return self._options[key]

    def sweep(self, needed: FloatArray, tolerance: float, budget: Budget) -> bool:
        """One pass over all configurations; False if the budget ran out on the way."""
        f = self.frontier
        f.bound[:] = 0.0
        for tag in self._order():
            if budget.is_spent():
                return False
            c = self.configurations[tag]
            tables = self.atlas.scopes[c.scope].tables
            cap = tables.t_cap[c.mix, c.in_flight_index]
            ceiling = self.speed_bound[c.scope, c.mix] / (1.0 + c.slack)
            if ceiling[-1] * cap < 1.0 or not np.any(self.roomy & (ceiling > np.maximum(needed, f.rate))):
                continue
            if c.is_sequential and tolerance < TOLERANCES[0]:
                continue  # found exactly by the first pass
            options, entries = self.options_of(c)
            if c.is_sequential:
                explore_sequential(
                    tables, self.lattice, options, entries, cap, needed, f.rate, f.tag, f.interval_s, tag
                )  # fmt: skip
            else:
                explore(
                    tables, self.lattice, options, entries, cap, c.slack, c.max_copies, needed, tolerance, f.rate,
                    f.tag, f.interval_s, tag, f.bound,
                )  # fmt: skip
        return True

    def _order(self) -> list[int]:
        """Pipelined configurations first, those of the best rates so far before all: they rule out most others."""
        best = np.zeros(len(self.configurations))
        np.maximum.at(best, self.frontier.tag[self.frontier.tag >= 0], self.frontier.rate[self.frontier.tag >= 0])
        return sorted(range(len(best)), key=lambda tag: (-best[tag], self.configurations[tag].is_sequential))

    def columns(self, rates: FloatArray) -> tuple[IntArray, Columns]:
        """Sub-fleets whose rate no smaller one reaches, as columns of the master."""
        digits, strides = self.lattice.digits, self.lattice.strides
        keep = rates > 0
        below = np.zeros(len(rates))
        for v in range(len(rates)):
            for row, stride in enumerate(strides):
                if digits[v, row]:
                    below[v] = max(below[v], below[v - stride], rates[v - stride])
        keep &= rates > below
        chosen = np.flatnonzero(keep)
        return chosen, Columns(rates[chosen], self.costs[chosen].astype(float), digits[chosen])

    def pack(self, rates: FloatArray, time_limit_s: float, seed: int) -> tuple[IntArray, MilpSolution | None]:
        chosen, columns = self.columns(rates)
        if not len(chosen):
            return chosen, None
        return chosen, self.master.solve_milp(columns, time_limit_s=time_limit_s, gap=0.0, seed=seed)

    def prices(self, rates: FloatArray) -> tuple[FloatArray, float] | None:
        """Row prices of the relaxation and the price of demand (1 where the rate is maximised)."""
        chosen, columns = self.columns(rates)
        lp = self.master.solve_lp(columns) if len(chosen) else None
        if lp is None:
            return None
        return lp.row_prices, 1.0 if self.master.maximises else lp.demand_price

    def needed_rates(self, ceiling: FloatArray, incumbent: float) -> FloatArray:
        """Per sub-fleet, the rate below which a replica on it cannot be part of a better packing.

        With ``price(v) = cost(v) + y v`` and a demand price pi such that ``pi rate <= price`` for all replicas, any
        packing that holds a replica of rate r on v is bounded by D less ``price(v) - pi r``, D the dual bound. It beats
        the incumbent only if ``pi r > price(v) - |D - incumbent|``.
        """
        found = self.prices(ceiling)
        if found is None:
            return np.zeros(len(ceiling))
        rows, _ = found
        floor = 1e-9 * (rows.max(initial=0.0) + 1e-12)
        price = self.lattice.digits @ np.maximum(rows, floor)
        if self.master.maximises:
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = float(np.nanmax(np.where(price > 0, ceiling / price, 0.0)))
            bound = scale * float(np.maximum(rows, floor) @ self.master.limits)
            needed: FloatArray = np.maximum(0.0, scale * price - (bound - incumbent) * (1.0 + 1e-12))
            return needed
        price = price + self.costs
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = float(np.nanmax(np.where(ceiling > 0, ceiling / price, 0.0)))
        if scale <= 0:
            return np.zeros(len(ceiling))
        assert self.master.demand is not None, "costs are minimised for a demand"
        bound = self.master.demand / scale - float(np.maximum(rows, floor) @ self.master.limits)
        distance = (incumbent - bound) * (1.0 + 1e-12)
        return np.asarray(np.maximum(0.0, scale * (price - distance)))

    def template(self, v: int) -> Template:
        """The replica behind the frontier's rate of a sub-fleet, at its exact interval."""
        f = self.frontier
        if v not in f.templates:
            c = self.configurations[int(f.tag[v])]
            tables = self.atlas.scopes[c.scope].tables
            options, entries = self.options_of(c)
            if c.is_sequential:
                stages = sequential_stages(tables, self.lattice, options, entries, v, f.interval_s[v])
            else:
                layers, option = entry_layers(tables, options, entries, f.interval_s[v])
                total = int(self.lattice.limits.sum())
                counted = c.max_copies if c.max_copies < total else 0
                r = reach(tables, self.lattice, entries, layers, counted)
                stages = stages_from(tables, entries, layers, option, r, v, counted > 0)
            f.templates[v] = template_of(self.atlas, c, stage_rows(options, stages))
        return f.templates[v]


def solve_exactly(
    atlas: Atlas, master: Master, row_costs: FloatArray, *, budget: Budget, report: Report, seed: int
) -> Outcome | None:
    """Proven optimum of a small fleet; None if the family holds no plan (or the budget ran out before one was found).

    When the budget runs out during a pass, the result carries the bound of the last full pass.
    """
    search = ExactSearch(atlas, master, row_costs)
    count = len(search.lattice.digits)
    needed = np.zeros(count)
    best: tuple[IntArray, MilpSolution] | None = None
    proven = dense_work_bound(atlas) if master.maximises else 0.0
    for tolerance in TOLERANCES:
        finished = search.sweep(needed, tolerance, budget)
        chosen, packing = search.pack(search.frontier.rate, budget.remaining_s(), seed)
        if packing is not None:
            best = (chosen, packing)
        if not finished:
            break
        ceiling = search.frontier.ceiling(tolerance)
        _, optimistic = search.pack(ceiling, budget.remaining_s(), seed)
        if packing is None:
            if optimistic is None:
                break  # not even the ceilings meet the demand: proved
            continue  # this pass was too coarse to tell
        if optimistic is not None:
            outside = max if master.maximises else min
            proven = outside(packing.value, optimistic.bound)
        gap = abs(proven - packing.value) / max(abs(packing.value), 1e-12)
        report(
            Progress(
                phase="sub-fleets", elapsed_s=budget.elapsed_s(), incumbent=packing.value, bound=proven, gap=gap
            )
        )  # fmt: skip
        needed = search.needed_rates(ceiling, packing.value)
    if best is None:
        return None
    chosen, packing = best
    counts = [(search.template(int(v)), int(n)) for v, n in zip(chosen, packing.counts, strict=True) if n]
    value = float(sum(n * t.rate for t, n in counts)) if master.maximises else packing.value
    prices = search.prices(search.frontier.rate)
    used = {int(v) for v, n in zip(chosen, packing.counts, strict=True) if n}
    others = sorted((int(v) for v in chosen if int(v) not in used), key=lambda v: -search.frontier.rate[v])
    return Outcome(
        chosen=tuple(counts),
        value=value,
        bound=sound_bound(proven, value, maximises=master.maximises),
        row_prices=prices[0] if prices is not None else np.zeros(len(atlas.resources.rows)),
        runners_up=tuple(search.template(v) for v in others[:5]),
        interrupted=budget.cancelled.is_set(),
    )
