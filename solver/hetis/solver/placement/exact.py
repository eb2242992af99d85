"""Exact search for small fleets: the best replica of every sub-fleet, then the best packing of sub-fleets, proven.

`passes.py` sweeps all configurations repeatedly, each time with a narrower tolerance. After a pass, the master over the
rates found gives an incumbent, and duals scaled to fit every sub-fleet give a bound. A replica whose rate falls short
of its price by more than the distance between the two cannot be part of anything better, so the next pass does not look
for it (`needed_rates`).

Prefill and decode replicas have frontiers of their own over the same sub-fleets: the best rate of each role on each.
They lie in one zone, as device classes do, so a sub-fleet determines the zone. The master joins them by their flows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.cost import Mix, Regime
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.configurations import Configuration, configurations
from hetis.solver.placement.frontier import entry_layers, explore, reach, stages_from
from hetis.solver.placement.frontier_sequential import explore_sequential, sequential_stages
from hetis.solver.placement.lattice import Entries, Lattice, entries_of, lattice_of
from hetis.solver.placement.master import Columns, LpSolution, Master, Verdict
from hetis.solver.placement.options import EVERYTHING, Options, chunk_cap, interval_cap, list_options, stage_rows
from hetis.solver.placement.parts import Part, whole
from hetis.solver.placement.pool import NO_LINKS
from hetis.solver.placement.routes import UNIFIED, Valuation
from hetis.solver.placement.tables import BoolArray, CostTables, FloatArray
from hetis.solver.placement.template import Template, template_of
from hetis.solver.plan import Role

MAX_GPUS = 24
MAX_PAIRS = 60_000  # of (usage, smaller usage) that one dynamic program visits at worst
TOLERANCES = (0.2, 0.01, 1e-7)
PIN_ROUNDING = 1e-6  # ratio to the relaxation's value by which its duals may be wrong


def is_small(costs: CostTables) -> bool:
    """Return whether the fleet has few enough usage vectors for the exact search."""
    sizes = costs.resources.limits.astype(float) + 1.0
    gpus = sum(c.available for c in costs.classes)
    return bool(gpus <= MAX_GPUS and np.prod(sizes * (sizes + 1.0) / 2.0) <= MAX_PAIRS)


class Kind(IntEnum):
    """The kinds of replicas that have a frontier each."""

    UNIFIED = 0
    LOCAL_PREFILL = 1  # sends KV to its own zone only
    PREFILL = 2  # may send KV to all zones
    DECODE = 3


ROLES = {
    Kind.UNIFIED: Role.UNIFIED,
    Kind.LOCAL_PREFILL: Role.PREFILL,
    Kind.PREFILL: Role.PREFILL,
    Kind.DECODE: Role.DECODE,
}


def kind_of(mix: Mix) -> Kind:
    if mix.role is Role.UNIFIED:
        return Kind.UNIFIED
    if mix.role is Role.DECODE:
        return Kind.DECODE
    return Kind.PREFILL if mix.sends_afar else Kind.LOCAL_PREFILL


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

    lattice: Lattice
    rate: FloatArray
    tag: IntArray  # configuration
    interval_s: FloatArray
    bound: FloatArray
    templates: dict[int, Template] = field(default_factory=dict)

    def ceiling(self, tolerance: float) -> FloatArray:
        """Return rates per sub-fleet that no replica exceeds, apart from those that `needed_rates` ruled out."""
        return np.maximum(self.bound, self.rate * (1.0 + tolerance))


Rates = Mapping[Kind, FloatArray]  # [V] each


@dataclass(slots=True)
class Sweep:
    """The state of one pass over the configurations of a part of the family.

    Rates below ``needed`` are not looked for. ``bounds`` are what the configurations in ``swept`` may hold beyond the
    rates found (`Frontier`).
    """

    part: Part
    tolerance: float
    needed: Rates
    bounds: Rates
    swept: set[int] = field(default_factory=set)


class ExactSearch:
    """The exact search of one problem; ``usage_costs`` [V] are what the master minimises if it has a demand."""

    def __init__(self, costs: CostTables, master: Master, row_costs: FloatArray) -> None:
        self.costs, self.master = costs, master
        self.counts_gpus = master.pins is not None and master.pins.ask_for_gpus
        self.lattice = lattice_of(costs.resources.limits, inherits=not self.counts_gpus)
        self.usage_costs = self.lattice.digits @ row_costs
        self.whole = whole(costs.problem.family)
        self._free = np.zeros(len(costs.ranks)), np.zeros(len(costs.classes))
        self.configurations = configurations(costs)
        self.kinds = [kind_of(costs.mixes[c.mix]) for c in self.configurations]
        self.speed_bound, self.sequential_bound = speed_bounds(costs, self.lattice)
        self.zones = self._zones()
        self._options: dict[tuple[object, ...], tuple[Options, Entries]] = {}
        count = len(self.lattice.digits)
        self.frontiers = {
            kind: Frontier(self.lattice, np.zeros(count), np.full(count, -1), np.zeros(count), np.zeros(count))
            for kind in sorted(set(self.kinds))
        }
        self._roomy: dict[tuple[Kind, Part], BoolArray] = {}

    def _zones(self) -> IntArray:
        """Return the zone of every sub-fleet, numbered as in `Routes`, or -1 if it has several or none; [V]."""
        routes, zones = self.costs.routes, np.full(len(self.lattice.digits), -1)
        row_zones = [routes.zones.index(self.costs.classes[g].zone) for g, _ in self.costs.resources.rows]
        for v, digits in enumerate(self.lattice.digits):
            found = {row_zones[row] for row in np.flatnonzero(digits)}
            if len(found) == 1:
                zones[v] = found.pop()
        return zones

    def _sides(self, kind: Kind) -> IntArray:
        """Return the master's side for replicas of a kind, or -1 if they cannot be on that sub-fleet; [V]."""
        if kind is Kind.UNIFIED:
            return np.full(len(self.zones), UNIFIED)
        role = Role.DECODE if kind is Kind.DECODE else Role.PREFILL
        first = self.costs.routes.side(role, sends_afar=kind is Kind.PREFILL)
        return np.where(self.zones >= 0, first + self.zones, -1)

    def roomy(self, kind: Kind, part: Part) -> BoolArray:
        """Return which sub-fleets have memory for a replica of some configuration of a part; [V].

        A replica with fewer requests takes less memory. Chunks have no such order: a longer one takes memory itself
        but ends prefill sooner.
        """
        if (kind, part) not in self._roomy:
            self._roomy[kind, part] = self._find_roomy(kind, part)
        return self._roomy[kind, part]

    def _find_roomy(self, kind: Kind, part: Part) -> BoolArray:
        roomy = np.zeros(len(self.lattice.digits), dtype=bool)
        family, mixes = self.costs.problem.family, self.costs.mixes
        of_kind = [x for x, mix in enumerate(mixes) if kind_of(mix) is kind]
        batch, in_flight = min(mixes[x].micro_batch for x in of_kind), min(family.in_flight)
        f = family.in_flight.index(in_flight)
        for number, scope in enumerate(self.costs.scopes):
            for x in (x for x in of_kind if mixes[x].micro_batch == batch and scope.serves(mixes[x])):
                side = self.costs.side_of(number, x)
                any_pipeline = Configuration(number, x, f, in_flight, 0, Regime(0.0, 0.0), side)
                options, entries = self.options_of(any_pipeline, part)
                layers, _ = entry_layers(scope.tables, options, entries, np.inf)
                roomy |= reach(scope.tables, self.lattice, entries, layers, 0).closing >= 0
        return roomy

    def options_of(self, c: Configuration, part: Part | None = None) -> tuple[Options, Entries]:
        """Return the options of a part of the family, by default the whole of it."""
        a, part = self.costs, part or self.whole
        tables = a.scopes[c.scope].tables
        # Without limits on copies, whatever fits in memory counts.
        chunk_cap_s = chunk_cap(tables, c.mix, c.in_flight_index, c.max_copies) if c.max_copies else np.inf
        sizes = part.max_copies, part.max_pool
        key = (c.scope, c.mix, c.in_flight_index, c.regime, chunk_cap_s, c.unevenness, sizes)
        if key not in self._options:
            limits = (*c.regime, chunk_cap_s, c.unevenness)
            options = list_options(tables, c.mix, c.in_flight_index, *sizes, *limits, EVERYTHING, *self._free)
            self._options[key] = (options, entries_of(self.lattice, options, a.group_use, a.card_use))
        return self._options[key]

    def sweep(self, needed: Rates, tolerance: float, budget: Budget) -> bool:
        """Sweep all configurations of the family once; return False if the budget ran out first."""
        return self.go_on(self.begin(needed, tolerance, self.whole), budget)

    def begin(self, needed: Rates, tolerance: float, part: Part) -> Sweep:
        """Return a pass that has not looked at anything yet."""
        bounds = {kind: np.zeros(len(f.rate)) for kind, f in self.frontiers.items()}
        return Sweep(part, tolerance, needed, bounds)

    def go_on(self, sweep: Sweep, budget: Budget) -> bool:
        """Resume a pass; return False if the budget ran out first, after which the next call resumes there.

        Passes over other parts may come in between; the higher rates that they find only rule out more.
        """
        part, tolerance = sweep.part, sweep.tolerance
        for kind, frontier in self.frontiers.items():
            frontier.bound = sweep.bounds[kind]
        for tag in self._order():
            c, kind = self.configurations[tag], self.kinds[tag]
            if tag in sweep.swept or ROLES[kind] not in part.roles:
                continue
            if budget.is_spent():
                return False
            sweep.swept.add(tag)
            f, wanted = self.frontiers[kind], sweep.needed[kind]
            tables = self.costs.scopes[c.scope].tables
            cap = interval_cap(tables, c.mix, c.in_flight_index, c.unevenness)
            speed = self.sequential_bound if c.is_sequential else self.speed_bound
            ceiling = speed[c.scope, c.mix] / (1.0 + c.regime.least)
            if (
                ceiling[-1] == 0.0
                or ceiling[-1] * cap < 1.0
                or not np.any(self.roomy(kind, part) & (ceiling > np.maximum(wanted, f.rate)))
            ):
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

    def rates(self, part: Part | None = None) -> Rates:
        """Return the best rates found for replicas of a part's roles."""
        return {kind: f.rate for kind, f in self._of(part)}

    def ceilings(self, tolerance: float, part: Part | None = None) -> Rates:
        """Return rates that replicas of the part swept with this tolerance cannot exceed (`Frontier.ceiling`)."""
        return {kind: f.ceiling(tolerance) for kind, f in self._of(part)}

    def _of(self, part: Part | None) -> list[tuple[Kind, Frontier]]:
        roles = (part or self.whole).roles
        return [(kind, f) for kind, f in self.frontiers.items() if ROLES[kind] in roles]

    def columns(self, rates: Rates, *, every: bool = False) -> tuple[list[tuple[Kind, int]], Columns]:
        """Return, per kind, sub-fleets whose rate no smaller one reaches as columns of the master; all if ``every``."""
        worth = self._of_any_worth if every else self._worth_having
        chosen = [(kind, int(v)) for kind in rates for v in worth(kind, rates[kind])]
        vs = np.array([v for _, v in chosen], dtype=np.int64)
        columns = Columns(
            rates=np.array([rates[kind][v] for kind, v in chosen]),
            costs=self.usage_costs[vs].astype(float),
            uses=self.lattice.digits[vs],
            sides=np.array([self._sides(kind)[v] for kind, v in chosen], dtype=np.int64),
            links=np.array([self._link_use(v) for v in vs]),
        )
        return chosen, columns

    def _worth_having(self, kind: Kind, rates: FloatArray) -> IntArray:
        digits, strides = self.lattice.digits, self.lattice.strides
        below = np.zeros(len(rates))
        for v in range(len(rates)):
            for row, stride in enumerate(strides):
                if digits[v, row]:
                    below[v] = max(below[v], below[v - stride], rates[v - stride])
        better = rates > below
        if self.counts_gpus:
            better[:] = True  # a smaller vector may have the same rate but use too few GPUs for the pins
        return np.flatnonzero((rates > 0) & better & (self._sides(kind) >= 0))

    def _of_any_worth(self, kind: Kind, rates: FloatArray) -> IntArray:
        return np.flatnonzero((rates > 0) & (self._sides(kind) >= 0))

    def _link_use(self, v: int) -> FloatArray:
        """Return the link capacity that a replica on a sub-fleet takes between its zones."""
        routes, rows = self.costs.routes, self.costs.resources.rows
        if not routes.has_links:
            return NO_LINKS
        classes = {rows[row][0] for row in np.flatnonzero(self.lattice.digits[v])}
        return routes.link_use([routes.zones.index(self.costs.classes[g].zone) for g in classes])

    def pack(self, rates: Rates, time_limit_s: float, seed: int) -> tuple[list[tuple[Kind, int]], Verdict]:
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
        price = self.lattice.digits @ rows + (0.0 if self.master.maximises else self.usage_costs)
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
        needed = {}
        for kind in ceilings:
            sides = self._sides(kind)
            with np.errstate(divide="ignore", invalid="ignore"):
                least = np.maximum(0.0, proof.scale * price - distance) / proof.rate_prices[sides]
            needed[kind] = np.where(sides >= 0, np.nan_to_num(least, nan=0.0, posinf=np.inf), np.inf)
        return needed

    def _needed_with_pins(self, ceilings: Rates, incumbent: float) -> Rates | None:
        """Return the needed rates if pins have prices, to which scaling does not apply, from the relaxation's duals.

        A pin's price has either sign, so a replica must make up for the distance to the relaxation.
        """
        chosen, columns = self.columns(ceilings)
        found = self.master.solve_lp(columns, pinned=True) if chosen and self.master.pins is not None else None
        if found is None or self.master.pins is None or self.costs.routes.has_links:
            return None
        price = self.lattice.digits @ found.row_prices + (0.0 if self.master.maximises else self.usage_costs)
        price = price + self.master.pins.coefficients(self.lattice.digits) @ found.pin_prices
        distance = abs(found.value - incumbent) + PIN_ROUNDING * abs(found.value)
        needed = {}
        for kind in ceilings:
            sides = self._sides(kind)
            with np.errstate(divide="ignore", invalid="ignore"):
                least = np.maximum(0.0, price - distance) / found.rate_prices[sides]
            needed[kind] = np.where(sides >= 0, np.nan_to_num(least, nan=0.0, posinf=np.inf), np.inf)
        return needed

    def template(self, kind: Kind, v: int) -> Template:
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
