"""Exact search for small fleets: the best replica of every sub-fleet, then the best packing of sub-fleets, proven.

`solve_exactly` sweeps all configurations repeatedly, each time with a narrower tolerance. After a pass, the master over
the rates found gives an incumbent, and duals scaled to fit every sub-fleet give a bound. A replica whose rate falls
short of its price by more than the distance between the two cannot be part of anything better, so the next pass does
not look for it (`needed_rates`).

Prefill and decode replicas have frontiers of their own over the same sub-fleets: the best rate of each role on each.
They lie in one zone, as device classes do, so a sub-fleet determines the zone. Places beside whole zones (`fleet.py`)
have frontiers of their own. The master joins them by their flows.

The first pass over the whole family takes longest, because no bound is known and there are many ways to build a stage.
If a pass has not ended after a share of the time (`MAIN`), the smaller families inside are searched, which is cheap in
comparison. The search of the whole family then resumes where it stopped and uses their results. A search that ends
early therefore pays nothing for the smaller families, no work is lost, and a search that is cut short is at least as
good as what these families offered within their time (`generation.INSIDE`).

Only HiGHS's own verdict that nothing can be chosen proves that no plan exists. A packing that HiGHS's time limit cut
short is solved again when there is more time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.cost import Mix, Regime
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.fleet import UNIFIED, IntArray, Valuation
from hetis.solver.placement.frontier import (
    Entries,
    Lattice,
    entries_of,
    entry_layers,
    explore,
    explore_sequential,
    lattice_of,
    reach,
    sequential_stages,
    stages_from,
)
from hetis.solver.placement.generation import LEAST_MILP_SECONDS, MILP_SECONDS, NO_LINKS, Pool, parts_inside
from hetis.solver.placement.master import UNDECIDED, Columns, LpSolution, Master, MilpSolution, Verdict
from hetis.solver.placement.options import EVERYTHING, Options, TimeLimits, list_options, stage_rows
from hetis.solver.placement.outcome import Outcome, rate_bound, sound_bound
from hetis.solver.placement.pricing import FamilyPart, whole
from hetis.solver.placement.stage_cost import chunk_cap, interval_cap
from hetis.solver.placement.tables import BoolArray, CostTables, FloatArray
from hetis.solver.placement.template import Configuration, Template, configurations, template_of
from hetis.solver.plan import Role

MAX_GPUS = 24
MAX_PAIRS = 60_000  # pairs of (usage, smaller usage) that one dynamic program visits at worst
TOLERANCES = (0.2, 0.01, 1e-7)
PIN_ROUNDING = 1e-6  # ratio to the relaxation's value up to which its duals may be wrong


def is_small(costs: CostTables) -> bool:
    """Return whether the fleet has few enough usage vectors for the exact search."""
    sizes = costs.resources.limits.astype(float) + 1.0
    gpus = sum(c.available for c in costs.classes)
    return bool(gpus <= MAX_GPUS and np.prod(sizes * (sizes + 1.0) / 2.0) <= MAX_PAIRS)


class FrontierKind(IntEnum):
    """The kinds of replicas that have a frontier each."""

    UNIFIED = 0
    LOCAL_PREFILL = 1  # sends KV only to its own zone
    PREFILL = 2  # may send KV to all zones
    DECODE = 3


class FrontierKey(NamedTuple):
    """What has a frontier of its own: replicas of a kind in whole zones (-1), or in a place beside them, by number."""

    of: FrontierKind
    beside: int = -1

    @property
    def role(self) -> Role:
        return ROLES[self.of]


ROLES = {
    FrontierKind.UNIFIED: Role.UNIFIED,
    FrontierKind.LOCAL_PREFILL: Role.PREFILL,
    FrontierKind.PREFILL: Role.PREFILL,
    FrontierKind.DECODE: Role.DECODE,
}


def frontier_kind(mix: Mix) -> FrontierKind:
    if mix.role is Role.PREFILL:
        return FrontierKind.PREFILL if mix.sends_afar else FrontierKind.LOCAL_PREFILL
    return FrontierKind[mix.role.name]


def speed_bounds(costs: CostTables, lattice: Lattice) -> tuple[FloatArray, FloatArray]:
    """Return upper bounds on replicas' rates per scope, mix and sub-fleet from dense work alone; [scopes, X, V] each.

    A GPU of class g that spends all its time on repeated layers, without attention, serves at most ``1 / (n w)``
    layers per second for the best TP size n, and a replica needs all layers from its GPUs. With a single micro-batch
    in flight its GPUs work in turn, none faster than the fastest, which gives the second bound.
    """
    bounds, sequential = [], []
    present = (lattice.digits > 0).T
    for scope in costs.scopes:
        t = scope.tables
        speeds, fastest = np.zeros((2, len(costs.mixes), len(costs.resources.rows)))
        for s, (device_class, tp) in enumerate(costs.ranks):
            if t.available[device_class] > 0:
                row = costs.resources.rows.index((device_class, 1))
                speeds[:, row] = np.maximum(speeds[:, row], 1.0 / (tp * t.layer_s[:, s]))
                fastest[:, row] = np.maximum(fastest[:, row], 1.0 / np.maximum(t.layer_s[:, s], t.wire_s[:, s]))
        bounds.append(speeds @ lattice.digits.T / t.num_layers)
        sequential.append((fastest[:, :, None] * present).max(axis=1) / t.num_layers)
    return np.array(bounds), np.minimum(bounds, sequential)


@dataclass(slots=True)
class Frontier:
    """The best rate [V] of each sub-fleet, where it was found, and a bound on further replicas."""

    rate: FloatArray
    tag: IntArray  # index of the configuration
    interval_s: FloatArray
    bound: FloatArray
    templates: dict[int, Template] = field(default_factory=dict)

    def ceiling(self, tolerance: float) -> FloatArray:
        """Return rates per sub-fleet that no replica exceeds, apart from those that `needed_rates` ruled out."""
        return np.maximum(self.bound, self.rate * (1.0 + tolerance))


Rates = Mapping[FrontierKey, FloatArray]  # [V] each


@dataclass(slots=True)
class Sweep:
    """The state of one pass over the configurations of a part of the family.

    Rates below ``needed`` are not searched for. ``bounds`` are what the configurations in ``swept`` may hold beyond the
    rates found (`Frontier`).
    """

    part: FamilyPart
    tolerance: float
    needed: Rates
    bounds: Rates
    swept: set[int] = field(default_factory=set)


class ExactSearch:
    """The exact search of one problem; ``usage_costs`` [V] are what the master minimises if it has a demand."""

    def __init__(self, costs: CostTables, master: Master) -> None:
        self.costs, self.master = costs, master
        self.counts_gpus = master.pins is not None and master.pins.ask_for_gpus
        self.lattice = lattice_of(costs.resources.limits, inherits=not self.counts_gpus)
        self.usage_costs = self.lattice.digits @ master.row_costs
        self.whole = whole(costs.problem.family)
        self._free = np.zeros(len(costs.ranks)), np.zeros(len(costs.classes))
        self.configurations = configurations(costs)
        self.kinds = [self._kind(c.scope, c.mix) for c in self.configurations]
        self.speed_bound, self.sequential_bound = speed_bounds(costs, self.lattice)
        self.zones = self._zones()
        self._options: dict[tuple[object, ...], tuple[Options, Entries]] = {}
        count = len(self.lattice.digits)
        self.frontiers = {
            kind: Frontier(np.zeros(count), np.full(count, -1), np.zeros(count), np.zeros(count))
            for kind in sorted(set(self.kinds))
        }
        self._roomy: dict[tuple[FrontierKey, FamilyPart], BoolArray] = {}

    def _kind(self, scope: int, mix: int) -> FrontierKey:
        routes, here, kind = self.costs.routes, self.costs.scopes[scope], frontier_kind(self.costs.mixes[mix])
        if here.place.blocks is None:
            return FrontierKey(kind)
        return FrontierKey(kind, routes.place(here.place, here.build) - len(routes.whole_zones))

    def _zones(self) -> IntArray:
        """Return the zone of every sub-fleet, numbered as in `Routes`, or -1 if it has several or none; [V]."""
        routes, zones = self.costs.routes, np.full(len(self.lattice.digits), -1)
        row_zones = [routes.zones.index(self.costs.classes[g].zone) for g, _ in self.costs.resources.rows]
        for v, digits in enumerate(self.lattice.digits):
            found = {row_zones[row] for row in np.flatnonzero(digits)}
            if len(found) == 1:
                zones[v] = found.pop()
        return zones

    def _sides(self, kind: FrontierKey) -> IntArray:
        """Return the master's side for replicas of a kind, or -1 if they cannot be on that sub-fleet; [V]."""
        if kind.of is FrontierKind.UNIFIED:
            return np.full(len(self.zones), UNIFIED)
        routes = self.costs.routes
        first = routes.side(kind.role, sends_afar=kind.of is FrontierKind.PREFILL)
        if kind.beside < 0:
            return np.where(self.zones >= 0, first + self.zones, -1)
        place, _ = routes.beside[kind.beside]
        inside = np.array([place.has(self.costs.classes[g]) for g, _ in self.costs.resources.rows])
        is_there = (self.zones >= 0) & ~np.any(self.lattice.digits[:, ~inside], axis=1)
        return np.where(is_there, first + len(routes.whole_zones) + kind.beside, -1)

    def roomy(self, kind: FrontierKey, part: FamilyPart) -> BoolArray:
        """Return which sub-fleets have memory for a replica of some configuration of a part; [V].

        A replica with fewer requests takes less memory. Chunks have no such order: a longer one takes memory itself
        but ends prefill sooner.
        """
        if (kind, part) in self._roomy:
            return self._roomy[kind, part]
        roomy = np.zeros(len(self.lattice.digits), dtype=bool)
        family, mixes = self.costs.problem.family, self.costs.mixes
        of_kind = [x for x, mix in enumerate(mixes) if frontier_kind(mix) is kind.of]
        batch, in_flight = min(mixes[x].micro_batch for x in of_kind), min(family.in_flight)
        f = family.in_flight.index(in_flight)
        for number, scope in enumerate(self.costs.scopes):
            for x in (x for x in of_kind if mixes[x].micro_batch == batch and scope.serves(mixes[x])):
                if self._kind(number, x) != kind:
                    continue
                side = self.costs.side_of(number, x)
                any_pipeline = Configuration(number, x, f, in_flight, 0, Regime(0.0, 0.0), side)
                options, entries = self.options_of(any_pipeline, part)
                layers, _ = entry_layers(scope.tables, options, entries, np.inf)
                roomy |= reach(scope.tables, self.lattice, entries, layers, 0).closing >= 0
        self._roomy[kind, part] = roomy
        return roomy

    def options_of(self, c: Configuration, part: FamilyPart | None = None) -> tuple[Options, Entries]:
        """Return the options of a part of the family, by default the whole of it."""
        a, part = self.costs, part or self.whole
        tables = a.scopes[c.scope].tables
        # Without a limit on copies, options are limited by memory alone.
        chunk_cap_s = chunk_cap(tables, c.mix, c.in_flight_index, c.max_copies) if c.max_copies else np.inf
        sizes = part.max_copies, part.max_pool
        key = (c.scope, c.mix, c.in_flight_index, c.regime, chunk_cap_s, c.unevenness, sizes)
        if key not in self._options:
            limits = TimeLimits(*c.regime, chunk_cap_s, c.unevenness)
            options = list_options(tables, c.mix, c.in_flight_index, *sizes, limits, EVERYTHING, *self._free)
            self._options[key] = (options, entries_of(self.lattice, options, a.group_use, a.card_use))
        return self._options[key]

    def sweep(self, needed: Rates, tolerance: float, budget: Budget) -> bool:
        """Sweep all configurations of the family once; return False if the budget ran out first."""
        return self.go_on(self.begin(needed, tolerance, self.whole), budget)

    def begin(self, needed: Rates, tolerance: float, part: FamilyPart) -> Sweep:
        """Return a pass that has not examined anything yet."""
        bounds = {kind: np.zeros(len(f.rate)) for kind, f in self.frontiers.items()}
        return Sweep(part, tolerance, needed, bounds)

    def go_on(self, sweep: Sweep, budget: Budget) -> bool:
        """Resume a pass, perhaps after passes over other parts; return False if the budget ran out first."""
        part, tolerance = sweep.part, sweep.tolerance
        for kind, frontier in self.frontiers.items():
            frontier.bound = sweep.bounds[kind]
        for tag in self._order():
            c, kind = self.configurations[tag], self.kinds[tag]
            if tag in sweep.swept or kind.role not in part.roles:
                continue
            if budget.is_spent():
                return False
            sweep.swept.add(tag)
            f, wanted = self.frontiers[kind], sweep.needed[kind]
            tables = self.costs.scopes[c.scope].tables
            cap = interval_cap(tables, c.mix, c.in_flight_index, c.unevenness)
            speed = self.sequential_bound if c.is_sequential else self.speed_bound
            ceiling = speed[c.scope, c.mix] / (1.0 + c.regime.least)
            if ceiling[-1] == 0.0 or ceiling[-1] * cap < 1.0:
                continue
            if not np.any(self.roomy(kind, part) & (ceiling > np.maximum(wanted, f.rate))):
                continue
            if c.is_sequential and tolerance < TOLERANCES[0]:
                continue  # solved exactly in the first pass
            options, entries = self.options_of(c, part)
            if c.is_sequential:
                explore_sequential(
                    tables, self.lattice, options, entries, cap, wanted, f.rate, f.tag, f.interval_s, tag
                )  # fmt: skip
            else:
                explore(
                    tables, self.lattice, options, entries, cap, c.max_copies, wanted, tolerance, f.rate,
                    f.tag, f.interval_s, tag, f.bound,
                )  # fmt: skip
        return True

    def _order(self) -> list[int]:
        """Return configurations with the best rates first, then pipelined ones: they rule out most others."""
        best = np.zeros(len(self.configurations))
        for f in self.frontiers.values():
            np.maximum.at(best, f.tag[f.tag >= 0], f.rate[f.tag >= 0])
        return sorted(range(len(best)), key=lambda tag: (-best[tag], self.configurations[tag].is_sequential))

    def rates(self, part: FamilyPart | None = None) -> Rates:
        """Return the best rates found for replicas of a part's roles."""
        return {kind: f.rate for kind, f in self._of(part)}

    def ceilings(self, tolerance: float, part: FamilyPart | None = None) -> Rates:
        """Return rates that replicas of the part swept with this tolerance cannot exceed (`Frontier.ceiling`)."""
        return {kind: f.ceiling(tolerance) for kind, f in self._of(part)}

    def _of(self, part: FamilyPart | None) -> list[tuple[FrontierKey, Frontier]]:
        roles = (part or self.whole).roles
        return [(kind, f) for kind, f in self.frontiers.items() if kind.role in roles]

    def columns(self, rates: Rates, *, every: bool = False) -> tuple[list[tuple[FrontierKey, int]], Columns]:
        """Return, per kind, sub-fleets whose rate no smaller one reaches, as the master's columns; all if ``every``."""
        chosen = [(kind, int(v)) for kind in rates for v in self._worth_having(kind, rates[kind], every)]
        vs = np.array([v for _, v in chosen], dtype=np.int64)
        columns = Columns(
            rates=np.array([rates[kind][v] for kind, v in chosen]),
            costs=self.usage_costs[vs].astype(float),
            uses=self.lattice.digits[vs],
            sides=np.array([self._sides(kind)[v] for kind, v in chosen], dtype=np.int64),
            links=np.array([self._link_use(v) for v in vs]),
        )
        return chosen, columns

    def _worth_having(self, kind: FrontierKey, rates: FloatArray, every: bool) -> IntArray:
        candidates = (rates > 0) & (self._sides(kind) >= 0)
        if every or self.counts_gpus:  # a smaller vector may have the same rate but use too few GPUs for the pins
            return np.flatnonzero(candidates)
        digits, strides = self.lattice.digits, self.lattice.strides
        below = np.zeros(len(rates))
        for v in range(len(rates)):
            for row, stride in enumerate(strides):
                if digits[v, row]:
                    below[v] = max(below[v], below[v - stride], rates[v - stride])
        return np.flatnonzero(candidates & (rates > below))

    def _link_use(self, v: int) -> FloatArray:
        """Return the link capacity that a replica on a sub-fleet takes between its zones."""
        routes, rows = self.costs.routes, self.costs.resources.rows
        if not routes.has_links:
            return NO_LINKS
        classes = {rows[row][0] for row in np.flatnonzero(self.lattice.digits[v])}
        return routes.link_use([routes.zones.index(self.costs.classes[g].zone) for g in classes])

    def pack(self, rates: Rates, time_limit_s: float, seed: int) -> tuple[list[tuple[FrontierKey, int]], Verdict]:
        """Return the best packing of sub-fleets at these rates."""
        chosen, columns = self.columns(rates)
        return chosen, self.master.decide(columns, time_limit_s=time_limit_s, seed=seed)

    def prices(self, rates: Rates) -> LpSolution | None:
        """Solve the relaxation of the packing."""
        chosen, columns = self.columns(rates)
        return self.master.solve_lp(columns) if chosen else None

    def needed_rates(self, ceilings: Rates, incumbent: float) -> Rates:
        """Return, per kind and sub-fleet, the rate below which a replica cannot be part of a better packing.

        With ``price(v) = cost(v) + y v`` and rate prices a such that ``a rate <= price`` for all replicas, any packing
        that holds a replica of rate r on v is bounded by D minus ``price(v) - a r``, where D is the dual bound
        (`Routes`). It beats the incumbent only if ``a r > price(v) - |D - incumbent|``.
        """
        nothing = {kind: np.zeros(len(rates)) for kind, rates in ceilings.items()}
        if self.master.pins is not None:
            return self._needed_with_pins(ceilings, incumbent) or nothing
        found = self.prices(ceilings)
        if found is None:
            return nothing
        rows = np.maximum(found.row_prices, 1e-9 * (found.row_prices.max(initial=0.0) + 1e-12))
        price = self.lattice.digits @ rows + self.usage_costs
        theta = np.zeros(self.costs.routes.num_sides)
        for kind, rates in ceilings.items():
            sides = self._sides(kind)
            here = (sides >= 0) & (rates > 0)
            np.maximum.at(theta, sides[here], rates[here] / price[here])
        routes, worth = self.costs.routes, float(rows @ self.master.limits)
        if self.master.demand is None:
            proof: Valuation | None = routes.highest_rate(theta, worth)
        else:
            proof = routes.least_cost(theta, worth, self.master.demand)
        if proof is None:
            return nothing
        distance = abs(proof.value - incumbent) * (1.0 + 1e-12)
        return {kind: self._least_rates(kind, proof.scale * price - distance, proof.rate_prices) for kind in ceilings}

    def _least_rates(self, kind: FrontierKey, worth: FloatArray, rate_prices: FloatArray) -> FloatArray:
        """Return the rates whose value is ``worth`` on each sub-fleet's side, inf where no replica can be; [V]."""
        sides = self._sides(kind)
        with np.errstate(divide="ignore", invalid="ignore"):
            least = np.maximum(0.0, worth) / rate_prices[sides]
        return np.where(sides >= 0, np.nan_to_num(least, nan=0.0, posinf=np.inf), np.inf)

    def _needed_with_pins(self, ceilings: Rates, incumbent: float) -> Rates | None:
        """Return the needed rates if pins have prices, which rules out scaling, from the relaxation's duals instead.

        A pin's price has either sign, so a replica must make up for the distance to the relaxation.
        """
        chosen, columns = self.columns(ceilings)
        found = self.master.solve_lp(columns, pinned=True) if chosen and self.master.pins is not None else None
        if found is None or self.master.pins is None or self.costs.routes.has_links:
            return None
        price = self.lattice.digits @ found.row_prices + self.usage_costs
        price = price + self.master.pins.coefficients(self.lattice.digits) @ found.pin_prices
        distance = abs(found.value - incumbent) + PIN_ROUNDING * abs(found.value)
        return {kind: self._least_rates(kind, price - distance, found.rate_prices) for kind in ceilings}

    def template(self, kind: FrontierKey, v: int) -> Template:
        """Return the replica behind a frontier's rate of a sub-fleet, at its exact interval."""
        f = self.frontiers[kind]
        if v not in f.templates:
            c = self.configurations[int(f.tag[v])]
            tables = self.costs.scopes[c.scope].tables
            options, entries = self.options_of(c)
            if c.is_sequential:
                stages = sequential_stages(tables, self.lattice, options, entries, v, f.interval_s[v])
            else:
                layers, option = entry_layers(tables, options, entries, f.interval_s[v])
                total = int(self.lattice.limits.sum())
                counted = c.max_copies if c.max_copies < total else 0
                r = reach(tables, self.lattice, entries, layers, counted)
                stages = stages_from(tables, entries, layers, option, r, v, counted > 0)
            f.templates[v] = template_of(self.costs, c, stage_rows(options, stages))
        return f.templates[v]


# --- passes over the whole family and, if time ends before a proof, over smaller families inside it


MAIN = 0.25  # share of the time for the whole family before its parts are searched
MOMENT = 1e-9  # seconds: avoids a division by zero, since a budget may end between two reads of it


def solve_exactly(costs: CostTables, master: Master, settings: SearchSettings) -> Outcome | None:
    """Return the proven optimum of a small fleet, or None if the family is empty or the budget ran out before a plan.

    If the budget runs out during a pass, the result carries the bound of the last full pass over the whole family.

    Raises:
        NoPlanFoundError: HiGHS, which has a clock of its own, stopped before it found a plan or proved there is none.
    """
    passes, budget, family = Passes(costs, master, settings), settings.budget, costs.problem.family
    everything, inside = whole(family), parts_inside(family)
    if not passes.over(everything, budget.share(MAIN) if inside else budget):
        rest_s = budget.remaining_s()
        for part, share in inside:
            if not budget.is_spent():
                passes.over(part, budget.share(min(1.0, share * rest_s / max(budget.remaining_s(), MOMENT))))
        if not budget.is_spent():
            passes.over(everything, budget)
    outcome = passes.outcome()
    if outcome is None and not passes.is_empty and not budget.is_spent():
        raise NoPlanFoundError(UNDECIDED)
    return outcome


class Passes:
    """Passes over the parts of a family, each of which starts from what the others found."""

    def __init__(self, costs: CostTables, master: Master, settings: SearchSettings) -> None:
        self.search = ExactSearch(costs, master)
        self.whole = whole(costs.problem.family)
        self.settings, self.budget, self.seed = settings, settings.budget, settings.seed
        self.best: tuple[list[tuple[FrontierKey, int]], MilpSolution] | None = None  # sub-fleets and their packing
        self.is_empty = False  # proven: the whole family holds no plan
        self._begun: dict[FamilyPart, Sweep | None] = {}  # the pass under way over each part; None: all are finished
        self._is_packed = True  # all rates found so far have been packed
        self.proven = rate_bound(costs) if master.maximises else 0.0

    def over(self, part: FamilyPart, budget: Budget) -> bool:
        """Search a part; return whether it was finished within its budget. The next call resumes where this stopped.

        Only passes over the whole family improve the bound.
        """
        if part not in self._begun:
            nothing = {kind: np.zeros(len(f.rate)) for kind, f in self.search.frontiers.items()}
            self._begun[part] = self.search.begin(nothing, TOLERANCES[0], part)
        while (sweep := self._begun[part]) is not None:
            if budget.is_spent():
                return False
            self._is_packed = False
            if not self.search.go_on(sweep, budget) or not self._conclude(sweep, budget):
                return False
        return True

    def _conclude(self, sweep: Sweep, budget: Budget) -> bool:
        """Pack the replicas that a pass found, and its upper bounds on them; return False if that was cut short."""
        search, is_whole = self.search, sweep.part == self.whole
        packing = self._pack(search.rates(sweep.part), budget.remaining_s())
        if budget.is_spent():
            return False
        ceilings = search.ceilings(sweep.tolerance, sweep.part)
        _, above = search.pack(ceilings, budget.remaining_s(), self.seed)
        if is_whole and above.found is not None and packing.found is not None:
            self._improve_bound(above.found.bound)
        is_finest = sweep.tolerance == TOLERANCES[-1]
        # In the finest pass the ceilings exceed the rates by rounding only, so its packing proves emptiness as well.
        if above.proves_none or (is_finest and packing.proves_none):
            self.is_empty = self.is_empty or is_whole
            self._begun[sweep.part] = None
            return True
        if not (packing.is_settled and above.is_settled) and (is_finest or budget.is_spent()):
            return False  # repeated if there is more time: HiGHS has a clock of its own
        needed, number = sweep.needed, TOLERANCES.index(sweep.tolerance) + 1
        if is_finest:
            self._begun[sweep.part] = None
        if packing.found is not None:
            self._tell(sweep.part)
            if self.budget.is_spent():
                return False  # the report may have cancelled the search
            needed = search.needed_rates(ceilings, self._best_value())
        if not is_finest:
            self._begun[sweep.part] = search.begin(needed, TOLERANCES[number], sweep.part)
        return True

    def _improve_bound(self, bound: float) -> None:
        inner, outer = (min, max) if self.search.master.maximises else (max, min)
        self.proven = outer(self._best_value(), inner(self.proven, bound))

    def _best_value(self) -> float:
        assert self.best is not None, "asked after a packing"
        return self.best[1].value

    def _pack(self, rates: Rates, time_limit_s: float) -> Verdict:
        """Return the best packing at these rates, and keep it unless a better one is known."""
        chosen, packing = self.search.pack(rates, time_limit_s, self.seed)
        found = packing.found
        if found is not None and (self.best is None or not self._is_worse(found.value, self.best[1].value)):
            self.best = chosen, found
        self._is_packed = packing.is_settled and len(rates) == len(self.search.frontiers)
        return packing

    def _is_worse(self, value: float, than: float) -> bool:
        return value < than if self.search.master.maximises else value > than

    def _tell(self, part: FamilyPart) -> None:
        value, is_whole = self._best_value(), part == self.whole
        gap = abs(self.proven - value) / max(abs(value), 1e-12)
        phase = "sub-fleets" if is_whole else f"sub-fleets, {part.describe(self.whole)}"
        self.settings.tell(phase, value, *((self.proven, gap) if is_whole else ()))

    def outcome(self) -> Outcome | None:
        """Return the best packing as replicas at their exact rates, or None without one."""
        if not self._is_packed:  # a pass was cut short: what it found counts even if the budget is spent
            seconds = max(LEAST_MILP_SECONDS, min(MILP_SECONDS, self.budget.remaining_s()))
            self._pack(self.search.rates(), seconds)
        if self.best is None:
            return None
        search, (chosen, packing) = self.search, self.best
        costs, master = search.costs, search.master
        picked = [(search.template(*where), int(n)) for where, n in zip(chosen, packing.counts, strict=True) if n]
        pool = Pool(costs)
        pool.add([template for template, _ in picked])
        counts, columns = pool.counts_of(picked), pool.columns()
        flows = master.best_flows(columns, counts)
        value = master.served(columns, counts, flows) if master.maximises else packing.value
        duals = search.prices(search.rates())
        used = {where for where, n in zip(chosen, packing.counts, strict=True) if n}
        others = sorted((w for w in chosen if w not in used), key=lambda w: -search.frontiers[w[0]].rate[w[1]])
        rows, sides = len(costs.resources.rows), costs.routes.num_sides
        return Outcome(
            chosen=tuple(picked),
            value=value,
            bound=sound_bound(self.proven, value, maximises=master.maximises),
            row_prices=duals.row_prices if duals is not None else np.zeros(rows),
            rate_prices=duals.rate_prices if duals is not None else np.ones(sides),
            flows=flows,
            runners_up=tuple(search.template(*where) for where in others[:5]),
            interrupted=self.budget.cancelled.is_set(),
        )
