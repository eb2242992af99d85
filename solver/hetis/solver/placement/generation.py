"""Column generation: fleets of any size, a bound from every round of pricing, whole counts at the end.

Given row prices y, let theta be the highest ``rate / (cost + use y)`` of any replica of the family (`pricing.py` bounds
it). Then theta y is dual feasible where the rate is maximised, and 1/theta is a feasible price of demand where cost is
minimised, so that

    rate <= theta y limits              cost >= demand / theta - y limits

hold for every plan of the family, whatever columns have been seen. y wanders between the relaxation's duals and the
prices of the best bound so far (Wentges smoothing), which keeps it from swinging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.master import Columns, LpSolution, Master, MilpSolution
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.pricing import Pricer
from hetis.solver.placement.tables import Atlas, FloatArray
from hetis.solver.placement.template import Template, use_of

SMOOTHING = 0.5  # weight of the best bound's prices
PRICE_FLOOR = 1e-5  # of the mean price of a row's unit: no row is free, or a replica could be infinitely good
MAX_ROUNDS = 60
RATIO_TOLERANCE, FINEST_TOLERANCE = 2e-4, 1e-6  # intervals narrower than this are not halved further in pricing
MILP_SECONDS = 4.0
KEEP = 0.97  # columns this close to the best of a round are worth keeping


@dataclass(slots=True)
class Pool:
    """The columns seen so far, without repetition."""

    atlas: Atlas
    row_costs: FloatArray
    templates: list[Template] = field(default_factory=list)
    uses: list[IntArray] = field(default_factory=list)
    _seen: set[tuple[object, ...]] = field(default_factory=set)

    def add(self, templates: Sequence[Template]) -> int:
        """Adds new templates that fit in the fleet; returns how many were new."""
        before = len(self.templates)
        for template in templates:
            key = (template.scope, template.mix, template.in_flight_index, template.stages)
            use = use_of(self.atlas, template)
            if key not in self._seen and np.all(use <= self.atlas.resources.limits):
                self._seen.add(key)
                self.templates.append(template)
                self.uses.append(use)
        return len(self.templates) - before

    def columns(self) -> Columns:
        uses = np.array(self.uses, dtype=np.int64).reshape(len(self.uses), -1)
        return Columns(np.array([t.rate for t in self.templates]), uses @ self.row_costs, uses)


@dataclass(slots=True)
class Bound:
    """The best bound so far and the prices that gave it, scaled to be dual feasible."""

    value: float
    row_prices: FloatArray


class ColumnGeneration:
    """One problem's column generation: `run` for one family after another, `choose` whole counts, `outcome`."""

    def __init__(self, atlas: Atlas, master: Master, row_costs: FloatArray, *, budget: Budget, report: Report) -> None:
        self.atlas, self.master, self.row_costs = atlas, master, row_costs
        self.budget, self.report = budget, report
        self.pool = Pool(atlas, row_costs)
        self.bound = Bound(np.inf if master.maximises else 0.0, self._first_prices())
        self.incumbent: MilpSolution | None = None
        self.may_have_plan = True  # until a complete pricing finds nothing at all
        self.is_whole_family = False  # whether the bound speaks of the whole family yet

    def _first_prices(self) -> FloatArray:
        """A GPU is worth about its memory bandwidth."""
        types = self.atlas.problem.cluster.gpu_types
        worth = np.array([types[self.atlas.classes[g].gpu].mem_bytes_per_s for g, _ in self.atlas.resources.rows])
        first = np.array([1.0 if p == 1 else 0.0 for _, p in self.atlas.resources.rows])
        return np.asarray(worth / worth.max() * first)

    def solve(
        self, seeds: Sequence[Template], *, threads: int, gap_target: float, seed: int
    ) -> Outcome | None:  # fmt: skip
        """Generates columns, chooses whole counts, and adds columns for them while the gap asks for it.

        None if no plan was found.
        """
        self.generate(seeds, threads=threads, gap_target=gap_target, choose_seed=seed)
        self.choose(gap=gap_target / 10, seed=seed)
        return self.outcome()

    def generate(
        self, seeds: Sequence[Template], *, threads: int, gap_target: float, choose_seed: int | None = None
    ) -> None:  # fmt: skip
        """Runs the relaxation to its end: first without stage copies and attention workers, then with them.

        The first part is the family of `hexgen`, solved as that strategy would be, so that the full family, which goes
        on from its columns and its choice, is never worse.
        """
        self.pool.add(seeds)
        family = self.atlas.problem.family
        is_larger = family.max_copies > 1 or family.max_pool > 0
        self.is_whole_family = not is_larger
        self.run(max_copies=1, max_pool=0, threads=threads, target_gap=gap_target / 2)
        if is_larger:
            if choose_seed is not None:
                self.choose(gap=gap_target / 10, seed=choose_seed)
            self.is_whole_family = True
            self.run(
                max_copies=family.max_copies, max_pool=family.max_pool, threads=threads, target_gap=gap_target / 2
            )  # fmt: skip

    def run(self, *, max_copies: int, max_pool: int, threads: int, target_gap: float) -> bool:
        """Prices and solves the relaxation in turn until the bound is within ``target_gap`` of it.

        Returns whether it converged; the bound is valid for templates with at most ``max_copies`` copies per stage and
        ``max_pool`` attention workers per copy.
        """
        pricer = Pricer(
            self.atlas,
            self.row_costs,
            max_copies=max_copies,
            max_pool=max_pool,
            threads=threads,
            tolerance=min(RATIO_TOLERANCE, max(FINEST_TOLERANCE, target_gap / 2)),
        )
        self.bound = Bound(dense_work_bound(self.atlas) if self.master.maximises else 0.0, self.bound.row_prices)
        prices, floor, smooth = self.bound.row_prices, 0.0, True
        lp = self._relaxation()
        for _ in range(MAX_ROUNDS):
            if lp is not None:
                prices = self._smoothed(lp) if smooth else lp.row_prices
                # No column seen has a ratio above one (1 / demand price) at the relaxation's prices, and none at all at
                # the bound's: columns below one at prices in between improve neither.
                floor = (1.0 - 1e-6) * self._scale(lp)
            priced = pricer.price(self._lifted(prices), floor, KEEP, self.budget)
            self._improve_bound(self._lifted(prices), priced.ratio_bound)
            added = self.pool.add(priced.templates)
            self.may_have_plan = priced.ratio_bound > floor or lp is not None or not priced.complete
            if not priced.complete:
                return False
            lp = self._relaxation()
            if lp is None:
                if not added:
                    return False
                continue
            gap = abs(self.bound.value - lp.value) / max(abs(lp.value), 1e-12)
            self._tell(f"column generation, {len(self.pool.templates)} columns")
            if gap <= target_gap:
                return True
            if not added and not smooth:
                return True  # nothing improves on the relaxation: what is left of the gap is the pricing's tolerance
            smooth = added > 0
        return False

    def _relaxation(self) -> LpSolution | None:
        return self.master.solve_lp(self.pool.columns()) if self.pool.templates else None

    def _scale(self, lp: LpSolution) -> float:
        return 1.0 if self.master.maximises else 1.0 / max(lp.demand_price, 1e-300)

    def _smoothed(self, lp: LpSolution) -> FloatArray:
        if not np.isfinite(self.bound.value) or self.bound.value <= 0:
            return lp.row_prices
        return SMOOTHING * self.bound.row_prices + (1.0 - SMOOTHING) * lp.row_prices

    def _lifted(self, prices: FloatArray) -> FloatArray:
        """Prices with a floor under those of GPUs, where nothing else makes them dear."""
        limits = self.atlas.resources.limits
        unit = np.array([1.0 if p == 1 else 0.0 for _, p in self.atlas.resources.rows])
        total = float(prices @ limits) + (0.0 if self.master.maximises else float(self.row_costs @ limits))
        floor = PRICE_FLOOR * total / max(1.0, float(unit @ limits))
        return np.maximum(prices, floor * unit)

    def _improve_bound(self, prices: FloatArray, ratio: float) -> None:
        if ratio <= 0:
            return
        limits = self.master.limits
        if self.master.demand is None:
            value, scaled = ratio * float(prices @ limits), ratio * prices
            if value < self.bound.value:
                self.bound = Bound(value, scaled)
        else:
            value = self.master.demand / ratio - float(prices @ limits)
            if value > self.bound.value:
                self.bound = Bound(value, prices)

    def choose(self, *, gap: float, seed: int) -> MilpSolution | None:
        """Whole counts over all columns seen; never worse than an earlier choice."""
        if not self.pool.templates:
            return None
        start = None
        if self.incumbent is not None:
            start = np.zeros(len(self.pool.templates), dtype=np.int64)
            start[: len(self.incumbent.counts)] = self.incumbent.counts
        found = self.master.solve_milp(
            self.pool.columns(),
            time_limit_s=max(0.5, min(MILP_SECONDS, self.budget.remaining_s())),
            gap=gap,
            start=start,
            seed=seed,
        )
        if found is not None:
            self.incumbent = found
            self._tell("whole counts")
        return self.incumbent

    def gap(self) -> float:
        """Between the incumbent and the bound."""
        if self.incumbent is None:
            return np.inf
        return abs(self.bound.value - self.incumbent.value) / max(abs(self.incumbent.value), 1e-12)

    def outcome(self) -> Outcome | None:
        """The incumbent as an outcome."""
        if self.incumbent is None:
            return None
        counts = self.incumbent.counts
        chosen = tuple((self.pool.templates[k], int(n)) for k, n in enumerate(counts) if n)
        reduced = [
            (t.rate - float(self.bound.row_prices @ use), t)
            for t, use, n in zip(self.pool.templates, self.pool.uses, self._padded(counts), strict=True)
            if n == 0
        ]
        reduced.sort(key=lambda item: -item[0])
        value = self.incumbent.value
        return Outcome(
            chosen=chosen,
            value=value,
            bound=sound_bound(self.bound.value, value, maximises=self.master.maximises),
            row_prices=self.bound.row_prices,
            runners_up=tuple(t for _, t in reduced[:5]),
            interrupted=self.budget.cancelled.is_set(),
        )

    def _padded(self, counts: IntArray) -> IntArray:
        return np.concatenate([counts, np.zeros(len(self.pool.templates) - len(counts), dtype=np.int64)])

    def _tell(self, phase: str) -> None:
        known = self.is_whole_family and np.isfinite(self.bound.value)
        self.report(
            Progress(
                phase=phase,
                elapsed_s=self.budget.elapsed_s(),
                incumbent=self.incumbent.value if self.incumbent is not None else None,
                bound=self.bound.value if known else None,
                gap=self.gap() if known and self.incumbent is not None else None,
            )
        )


def dense_work_bound(atlas: Atlas) -> float:
    """A bound on the total rate from dense work alone, before any search.

    A GPU that gives all its time to repeated layers, without attention, serves at most ``1 / (n w)`` layers per second
    for the best mix and TP size n, and every request needs all layers.
    """
    total = 0.0
    for g, c in enumerate(atlas.classes):
        speeds = [
            float(1.0 / (tp * scope.tables.layer_s[:, s].min()))
            for scope in atlas.scopes[:1]
            for s, (device_class, tp) in enumerate(atlas.ranks)
            if device_class == g
        ]
        total += c.available * max(speeds, default=0.0)
    return total / atlas.scopes[0].tables.num_layers
