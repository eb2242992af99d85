"""Column generation for fleets of any size: a bound from every round of pricing, and whole counts at the end.

Given row prices y, let theta be the highest ``rate / (cost + use y)`` of any replica of the family (`pricing.py` bounds
it). Then theta y is dual feasible if the rate is maximised, and 1/theta is a feasible price of demand if cost is
minimised, so that

    rate <= theta y limits              cost >= demand / theta - y limits

hold for every plan of the family, whichever columns have been seen. y lies between the relaxation's duals and the
prices of the best bound so far (Wentges smoothing), which keeps it from oscillating.

With split roles a request's price is split between two replicas. Every side of the master (`Routes`) has a theta of
its own: theta_u for unified replicas, theta_p and theta_d for prefill and decode replicas. Row prices s y are dual
feasible if the flow rows have prices alpha <= s / theta_p and beta <= s / theta_d, where a request prefilled and
decoded on different replicas is worth alpha + beta >= 1 (less the price of a link between zones). In one zone the least
such s is known without an LP, with alpha + beta = 1 and both as large as allowed:

    s = max(theta_u, 1 / (1 / theta_p + 1 / theta_d))

The price of a request is that of its cheapest way through the fleet. The same holds if cost is minimised, with a price
of demand ``pi = min(1 / theta_u, 1 / theta_p + 1 / theta_d)``. Links between zones add a price that is also known in
closed form (`Routes.highest_rate`, `Routes.least_cost`). The links that replicas over several zones take could only
make them dearer, so omitting them from the dual row keeps the bound valid, if a little weaker. Once alpha is known, a
prefill replica of ratio ``<= 1 / alpha`` improves nothing, which gives the floor below which pricing need not look.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hetis.solver.budget import Budget, Progress, SearchSettings
from hetis.solver.placement.fleet import IntArray, Resources, Valuation
from hetis.solver.placement.master import Columns, LpSolution, Master, MilpSolution, padded, settled
from hetis.solver.placement.outcome import Outcome, rate_bound, relative_gap, sound_bound
from hetis.solver.placement.pricing import FamilyPart, Priced, Pricer, pricers_of, tolerance_for, whole
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.template import Template, use_of, zones_of
from hetis.solver.plan import ObjectiveKind, Role
from hetis.solver.problem import Family

PLAIN = ((Role.UNIFIED,), (Role.PREFILL, Role.DECODE))
SHARE = 0.5  # largest share of the time left for each of the contained parts
INSIDE = (1 / 3, 1 / 6, 1 / 12)  # shares of the exact search's time left: first part, second part, each wider part


def contained_parts(family: Family, roles: Collection[Role]) -> list[FamilyPart]:
    """Return the parts of a family to search before the whole, without any that equals the whole.

    Unified replicas without stage copies and attention workers are the family of `hexgen`; such prefill and decode
    replicas are that of `hexgen2`. ``roles`` are those of the search.
    """
    plain = [FamilyPart(part, 1, 0) for part in PLAIN if set(part) <= set(roles) and _has_plans(family, part, 0)]
    is_plain = family.max_copies == 1 and family.max_pool == 0
    return [part for part in plain if not (is_plain and len(part.roles) == len(roles))]


def parts_inside(family: Family) -> list[tuple[FamilyPart, float]]:
    """Return the parts that the exact search of a family turns to, each with its share of the time (`INSIDE`).

    The `contained_parts` come first, then all roles without stage copies, then all roles without attention workers.
    """
    roles = family.roles
    plain = contained_parts(family, roles)
    wider = [FamilyPart(roles, 1, family.max_pool), FamilyPart(roles, family.max_copies, 0)]
    found = [part for part in dict.fromkeys([*plain, *wider]) if part != whole(family)]
    found = [part for part in found if _has_plans(family, part.roles, part.max_pool)]
    shares = dict(zip(PLAIN, INSIDE, strict=False))
    return [(part, shares[part.roles] if part in plain else INSIDE[-1]) for part in found]


def _has_plans(family: Family, roles: Collection[Role], max_pool: int) -> bool:
    """Return whether a part may hold plans: decode replicas that keep no head groups need attention workers."""
    return max_pool > 0 or family.decode_keeps_heads or Role.DECODE not in roles


# --- the columns seen so far, the prices of a bound, and the floor under prices that keeps pricing finite


PRICE_FLOOR = 1e-5  # share of a row unit's mean price; on a free row a replica could be infinitely good
NO_LINKS = np.zeros((0, 0))  # for fleets where no links between zones carry KV


@dataclass(slots=True)
class Pool:
    """The columns seen so far, without repetition."""

    costs: CostTables
    row_costs: FloatArray | None = None  # None: columns cost nothing
    templates: list[Template] = field(default_factory=list)
    uses: list[IntArray] = field(default_factory=list)
    links: list[FloatArray] = field(default_factory=list)
    _place: dict[tuple[object, ...], int] = field(default_factory=dict)
    _built: Columns | None = None  # columns of all templates; None if templates were added since

    def add(self, templates: Sequence[Template]) -> int:
        """Add new templates that fit in the fleet; return how many were new."""
        before, routes = len(self.templates), self.costs.routes
        for template in templates:
            use = use_of(self.costs, template)
            if template.shape not in self._place and np.all(use <= self.costs.resources.limits):
                self._place[template.shape] = len(self.templates)
                self.templates.append(template)
                self.uses.append(use)
                self.links.append(routes.link_use(zones_of(self.costs, template)) if routes.has_links else NO_LINKS)
        if len(self.templates) > before:
            self._built = None
        return len(self.templates) - before

    def columns(self, rate_cap: float = np.inf) -> Columns:
        """Return all templates as columns, with rates counted only up to ``rate_cap``."""
        if self._built is None:
            uses = np.array(self.uses, dtype=np.int64).reshape(len(self.uses), -1)
            costs = np.zeros(len(uses)) if self.row_costs is None else uses @ self.row_costs
            sides = np.array([self.costs.side_of(t.scope, t.mix) for t in self.templates], dtype=np.int64)
            rates = np.array([t.rate for t in self.templates])
            self._built = Columns(rates, costs, uses, sides, np.array(self.links))
        return replace(self._built, rates=np.minimum(self._built.rates, rate_cap))

    def counts_of(self, chosen: Iterable[tuple[Template, int]]) -> IntArray:
        """Return the counts of columns that correspond to these replicas, all of which were added before."""
        counts = np.zeros(len(self.templates), dtype=np.int64)
        for template, count in chosen:
            counts[self._place[template.shape]] += count
        return counts


@dataclass(slots=True)
class Bound:
    """The best bound so far and the prices that gave it, scaled to be dual feasible."""

    value: float
    row_prices: FloatArray
    link_prices: FloatArray
    rate_prices: FloatArray


def lifted(prices: FloatArray, resources: Resources, total: float) -> FloatArray:
    """Return row prices with a floor for GPU rows; ``total`` is the worth of the whole inventory; [rows]."""
    gpus = resources.counts_gpus
    return np.maximum(prices, PRICE_FLOOR * total / max(1.0, float(gpus @ resources.limits)) * gpus)


def first_prices(costs: CostTables) -> FloatArray:
    """Return initial row prices, at which a GPU is worth about its memory bandwidth; [rows]."""
    types, rows = costs.problem.cluster.gpu_types, costs.resources.rows
    worth = np.array([types[costs.classes[g].gpu].mem_bytes_per_s for g, _ in rows])
    return np.asarray(worth / worth.max() * costs.resources.counts_gpus)


# --- column generation


SMOOTHING = 0.5  # weight of the prices of the best bound
MAX_ROUNDS = 60
MILP_SECONDS, LEAST_MILP_SECONDS = 4.0, 0.2  # the minimum applies even if the budget is spent: a plan is due
VARIETY = {Role.PREFILL: 0.8, Role.DECODE: 0.97}  # share of the best ratio that columns of other sizes must reach
EASE, MOST_EASE = 0.125, 0.01  # share of the gap, and largest ratio, that pricing may ignore while the gap is wide
SPREAD, MOST_SPREAD = 0.05, 1.0  # first and largest deviation of log prices at which columns are searched for
GENERATION = 0.85  # share of the time left for the whole family's relaxation; whole counts take the rest
MORE = 0.8  # share of the time left for more columns after that; replicas of one type per role take the rest
MOST_BARREN = 4  # attempts without an improvement before the search ends, if it has no time limit
KEEP = 0.97  # columns at least this close to the best of a round are kept


class ColumnGeneration:
    """Column generation for one problem: `run` each family, `choose`, then `outcome`; ``roles`` are the priced ones."""

    def __init__(
        self, costs: CostTables, master: Master, settings: SearchSettings, roles: tuple[Role, ...] | None = None
    ) -> None:
        self.costs, self.master, self.settings = costs, master, settings
        self.roles = costs.problem.family.roles if roles is None else roles
        self.pool = Pool(costs, master.row_costs)
        # Without the problem's constraints: pricing ignores them, and could then not improve on a bound that includes
        # them.
        self._dense = rate_bound(costs, self.roles, with_constraints=False) if master.maximises else 0.0
        self.bound = self._no_bound(first_prices(costs))
        self.incumbent: MilpSolution | None = None
        self._last_pricers: list[Pricer] = []  # pricers of the latest run, with the ceilings that they proved
        self.may_have_plan = True  # False once a complete pricing has found nothing at all
        self.is_whole_family = False  # whether the bound already holds for the whole family

    def _no_bound(self, row_prices: FloatArray) -> Bound:
        """Return the bound that is known before any pricing."""
        routes = self.costs.routes
        return Bound(self._dense, row_prices, np.zeros_like(routes.capacity), np.ones(routes.num_sides))

    @property
    def budget(self) -> Budget:
        return self.settings.budget

    def solve(self, seeds: Sequence[Template]) -> Outcome | None:
        """Generate columns and choose whole counts, again with other sizes if the gap is wide; None without a plan."""
        self.generate(seeds, chooses=True)
        self.choose()
        if self.gap() > self.settings.gap_target and not self.budget.is_spent():
            self.vary()
            self.choose()
            if self.costs.role_types is None:
                self.go_on()
        return self.outcome()

    def generate(self, seeds: Sequence[Template], *, chooses: bool = False) -> None:
        """Run the relaxation to its end, first for the families of other strategies, then for the whole family.

        Each of the `contained_parts` is solved as its strategy would be, with whole counts if it ``chooses``. The full
        family starts from their columns and choices, so it is never worse.
        """
        family = self.costs.problem.family
        for part in contained_parts(family, self.roles):
            self._start_from(part, seeds, chooses=chooses)
        self.pool.add(self._with_roles(self.roles, seeds))
        self.is_whole_family = True
        of_all, self.settings = self.settings, self.settings.within(GENERATION)
        try:
            self.run(whole(family))
        finally:
            self.settings = of_all

    def _start_from(self, part: FamilyPart, seeds: Sequence[Template], *, chooses: bool) -> None:
        """Solve a part of the family, and keep its columns and its choice."""
        settings = replace(self.settings.within(SHARE), report=self._report_of_part)
        begun = ColumnGeneration(self.costs, self.master, settings, part.roles)
        begun.pool.add(self._with_roles(part.roles, seeds))
        begun.run(part)
        if chooses and not begun.budget.is_spent():
            begun.choose()
        self.absorb(begun.pool, begun.incumbent)
        self.bound = self._no_bound(begun.bound.row_prices)

    def _report_of_part(self, progress: Progress) -> None:
        """Report the progress of a part, with the known incumbent unless the part's is better."""
        if self.incumbent is not None and (
            progress.incumbent is None or not self.master.prefers(progress.incumbent, self.incumbent)
        ):
            progress = replace(progress, incumbent=self.incumbent.value)
        self.settings.report(progress)

    def _with_roles(self, roles: tuple[Role, ...], templates: Sequence[Template]) -> list[Template]:
        return [t for t in templates if self.costs.mixes[t.mix].role in roles]

    def absorb(self, pool: Pool, choice: MilpSolution | None) -> None:
        """Take over the columns of another search, and its choice if that is better."""
        self.pool.add(pool.templates)
        if choice is not None and self.master.prefers(choice.value, self.incumbent):
            counts = self.pool.counts_of(zip(pool.templates, choice.counts, strict=False))
            self.incumbent = replace(choice, counts=counts)

    def run(self, part: FamilyPart) -> bool:
        """Alternate pricing and the relaxation until the bound is within half of the target gap.

        Return whether it converged. The bound holds for templates with the copies and attention workers of the part.
        """
        target_gap = self.settings.gap_target / 2
        pricers = self._last_pricers = pricers_of(
            self.costs, self.master.row_costs, replace(part, roles=self.roles), self.settings.threads,
            tolerance_for(target_gap),
        )  # fmt: skip
        self.bound = self._no_bound(self.bound.row_prices)
        prices, links, smooth = self.bound.row_prices, self.bound.link_prices, True
        floors = np.zeros(len(pricers))
        barren = np.zeros(len(pricers), dtype=bool)  # sides without a single replica
        cap, ease = self._rate_cap(), 0.0
        lp = self._relaxation(cap)
        for _ in range(MAX_ROUNDS):
            if cap <= 0.0:
                return True  # no replica serves anything
            if self.budget.is_spent():
                return False
            if lp is not None:
                prices, links = self._smoothed(lp) if smooth else (lp.row_prices, lp.link_prices)
                floors = self._floors(self._lifted(prices), links, lp.demand_price, cap)
            lifted = self._lifted(prices)
            floors[barren] = np.inf
            priced = self._priced(pricers, lifted, floors, cap, ease)
            complete = all(side.complete for side in priced)
            theta = np.array([side.ratio_bound for side in priced])
            barren |= (theta == 0.0) & complete
            theta[barren] = 0.0
            if complete or np.isfinite(theta).all():
                self._improve_bound(lifted, theta)
            added = self.pool.add([template for side in priced for template in side.templates])
            if not complete:
                return False
            last_cap, cap = cap, self._rate_cap()
            lp = self._relaxation(cap)
            if lp is None:
                if not added:
                    return False
                continue
            gap = abs(self.bound.value - lp.value) / max(abs(lp.value), 1e-12)
            self._tell(f"looking for better replicas, {len(self.pool.templates)} so far")
            if gap <= target_gap:
                return True
            if not added and not smooth and cap >= last_cap * (1.0 - target_gap):
                return True  # nothing improves the relaxation: the remaining gap is the pricing's tolerance
            smooth = added > 0
            ease = min(EASE * gap, MOST_EASE) if smooth else 0.0
        return False

    def _priced(
        self, pricers: Sequence[Pricer], prices: FloatArray, floors: FloatArray, rate_cap: float, ease: float
    ) -> list[Priced]:
        """Return the pricing of every side, fewest configurations first, since the budget may end during the others."""
        order = sorted(range(len(pricers)), key=lambda side: len(pricers[side].configurations))
        found = {
            side: pricers[side].price(prices, float(floors[side]), KEEP, self.budget, rate_cap=rate_cap, ease=ease)
            for side in order
        }
        return [found[side] for side in range(len(pricers))]

    def vary(self, factors: FloatArray | float = 1.0) -> None:
        """Add columns of several sizes: the best of nearly every configuration at the bound's prices.

        The relaxation needs only the best replicas, but whole counts need others. There are few prefill replicas, for
        example, and one that is slightly worse but half as large may leave fewer GPUs idle. This is cheap if no class
        is scarce. ``factors`` change the prices, row by row.
        """
        prices, cap = self._lifted(factors * self.bound.row_prices), self._rate_cap()
        for pricer, worth in zip(self._last_pricers, self.bound.rate_prices, strict=True):
            role = self.costs.mixes[pricer.configurations[0].mix].role if pricer.configurations else Role.UNIFIED
            if cap > 0.0 and worth > 0.0 and role in VARIETY and not self.budget.is_spent():
                share = VARIETY[role]
                self.pool.add(pricer.price(prices, share / worth, share, self.budget, rate_cap=cap).templates)

    def go_on(self) -> None:
        """Look for better whole counts in the time left, with columns that are good at other prices.

        Whole counts leave some GPUs idle and lack others; the replica that fits these is the best one at other prices.
        The bound's prices are multiplied by random factors, which spread further with each failure and return to near 1
        after an improvement. In every other attempt idle GPUs are cheap. Without a time limit the search ends after
        `MOST_BARREN` attempts without an improvement.
        """
        budget, random, barren = self.budget.share(MORE), np.random.default_rng(self.settings.seed), 0
        has_limit = bool(np.isfinite(budget.remaining_s()))
        while self.gap() > self.settings.gap_target and not budget.is_spent() and (has_limit or barren < MOST_BARREN):
            before, known = self.incumbent, len(self.pool.templates)
            spread = min(MOST_SPREAD, SPREAD * (1 + barren))
            factors = np.exp(random.normal(0.0, spread, len(self.master.limits)))
            if barren % 2 and before is not None:
                left = self.master.limits - before.counts @ np.array(self.pool.uses)[: len(before.counts)]
                factors[left > 0] *= random.uniform(0.01, 0.5)
            self.vary(factors)
            if len(self.pool.templates) > known:
                self.choose()
            barren = 0 if self.incumbent is not before else barren + 1

    def _rate_cap(self) -> float:
        """Return the most that one replica can serve in a plan: the bound on the rate, or the demand.

        A replica above the cap is worth no more than one at it. Without the cap the relaxation would take a fraction
        of a replica that is too large for the fleet, above all of prefill replicas, of which there are few.
        """
        return self.bound.value if self.master.demand is None else self.master.demand

    def _floors(
        self, prices: FloatArray, link_prices: FloatArray, demand_price: float, rate_cap: float
    ) -> FloatArray:  # fmt: skip
        """Return the ratio on every side below which a replica improves neither the relaxation nor the bound; [sides].

        No column seen has a ratio above 1 / rate price at the relaxation's prices, and no replica at all has one at the
        bound's, so columns below this ratio at prices in between improve neither. A side without columns has no floor.
        """
        columns, routes = self.pool.columns(rate_cap), self.costs.routes
        seen = np.zeros(routes.num_sides)
        np.maximum.at(seen, columns.sides, columns.rates / (columns.costs + columns.uses @ prices))
        rate_prices = routes.shared_out(seen, max(demand_price, 1e-300), link_prices)
        with np.errstate(divide="ignore"):
            floors: FloatArray = (1.0 - 1e-6) / rate_prices
        floors[1:][seen[1:] == 0.0] = 0.0
        return floors

    def _relaxation(self, rate_cap: float) -> LpSolution | None:
        """Solve the relaxation over the columns seen; return None as long as they serve nothing or too little."""
        lp = self.master.solve_lp(self.pool.columns(rate_cap)) if self.pool.templates else None
        return lp if lp is not None and lp.value > 0.0 else None

    def _smoothed(self, lp: LpSolution) -> tuple[FloatArray, FloatArray]:
        if not np.isfinite(self.bound.value) or self.bound.value <= 0:
            return lp.row_prices, lp.link_prices
        links = SMOOTHING * self.bound.link_prices + (1.0 - SMOOTHING) * lp.link_prices
        return SMOOTHING * self.bound.row_prices + (1.0 - SMOOTHING) * lp.row_prices, links

    def _lifted(self, prices: FloatArray) -> FloatArray:
        """Return prices with a floor for GPUs that no constraint makes expensive."""
        resources = self.costs.resources
        rent = float(self.master.row_costs @ resources.limits)
        return lifted(prices, resources, float(prices @ resources.limits) + rent)

    def _improve_bound(self, prices: FloatArray, theta: FloatArray) -> None:
        routes, worth = self.costs.routes, float(prices @ self.master.limits)
        found: Valuation | None
        if self.master.demand is None:
            found = routes.highest_rate(theta, worth)
            is_better = found.value < self.bound.value
            self.may_have_plan = found.value > 0.0
        else:
            found = routes.least_cost(theta, worth, self.master.demand)
            is_better = found is not None and found.value > self.bound.value
            self.may_have_plan = found is not None
        if found is not None and is_better:
            self.bound = Bound(found.value, found.scale * prices, found.link_prices, found.rate_prices)

    def choose(self) -> MilpSolution | None:
        """Choose whole counts over all columns seen, never worse than an earlier choice."""
        if not self.pool.templates:
            return None
        columns, start = self.pool.columns(), self.incumbent
        relaxed = self.master.solve_lp(columns) if self.master.pins is None else None
        (least,) = (settled([relaxed.counts]) if relaxed is not None else None) or (None,)
        if least is not None and start is not None and np.any(padded(start.counts, len(self.pool.templates)) < least):
            start = None
        if start is None and relaxed is not None and self.master.maximises:
            start = self.master.rounded_down(columns, relaxed.counts)
        limit_s = max(LEAST_MILP_SECONDS, min(MILP_SECONDS, self.budget.remaining_s()))
        found, _ = self.master.solve_milp(
            columns, time_limit_s=limit_s, gap=self.settings.gap_target / 10, seed=self.settings.seed, start=start,
            least=least,
        )  # fmt: skip
        if found is not None and found.value > 0.0 and self.master.prefers(found.value, self.incumbent):
            self.incumbent = found
            self._tell("whole counts")
        return self.incumbent

    def gap(self) -> float:
        """Return the relative gap between the incumbent and the bound."""
        if self.incumbent is None:
            return np.inf
        if self.costs.problem.objective.kind is ObjectiveKind.GPUS:  # the number of GPUs is whole
            return max(0.0, self.incumbent.value - float(np.ceil(self.bound.value - 1e-6))) / self.incumbent.value
        return relative_gap(self.incumbent, self.bound.value)

    def outcome(self) -> Outcome | None:
        """Return the incumbent as an outcome, or None if there is none or it serves nothing."""
        if self.incumbent is None or self.incumbent.value <= 0.0:
            return None
        templates, worth, value = self.pool.templates, self.bound.rate_prices, self.incumbent.value
        counts = padded(self.incumbent.counts, len(templates))
        reduced = [
            (worth[self.costs.side_of(t.scope, t.mix)] * t.rate - float(self.bound.row_prices @ use), t)
            for t, use, n in zip(templates, self.pool.uses, counts, strict=True)
            if n == 0
        ]
        reduced.sort(key=lambda item: -item[0])
        return Outcome(
            chosen=tuple((templates[k], int(n)) for k, n in enumerate(counts) if n),
            value=value,
            bound=sound_bound(self.bound.value, value, maximises=self.master.maximises),
            row_prices=self.bound.row_prices,
            rate_prices=worth,
            flows=self.incumbent.flows,
            runners_up=tuple(t for _, t in reduced[:5]),
            interrupted=self.budget.cancelled.is_set(),
        )

    def _tell(self, phase: str) -> None:
        known = self.is_whole_family and np.isfinite(self.bound.value)
        value = None if self.incumbent is None else self.incumbent.value
        gap = self.gap() if known and self.incumbent is not None else None
        self.settings.tell(phase, value, self.bound.value if known else None, gap)
