"""Pricing, compiled: the best column of every configuration at given prices of the master's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.compiled import compile_alike
from hetis.solver.placement.ceiling import (
    Ceiling,
    CeilingQueries,
    Limits,
    Lines,
    all_lines,
    ceilings,
    limits_of,
    queries_of,
    reach_of,
)
from hetis.solver.placement.cover import best_column
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.options import (
    NO_STAGES,
    TimeLimits,
    list_options,
    option_prices,
    overdrawn,
    selected,
    stage_rows,
)
from hetis.solver.placement.sequential import (
    best_fitting_sequential,
    best_sequential,
    best_within_cap,
    least_weighted,
    useful_options,
)
from hetis.solver.placement.stage_cost import interval_cap
from hetis.solver.placement.tables import BoolArray, CostTables, FloatArray, Tables, cover_tables
from hetis.solver.placement.template import Configuration, Template, configurations, template_of
from hetis.solver.plan import Role
from hetis.solver.problem import Family

BATCH = 32
# GPUs of a class: with fewer, a single replica may well need more than exist. In larger classes pricing does not
# exclude such replicas, which can only loosen the bound.
SCARCE = 256
RATIO_TOLERANCE, FINEST_TOLERANCE = 2e-4, 1e-6  # intervals narrower than this are not halved further
KERNELS = (all_lines, ceilings, list_options, best_column, useful_options, best_sequential, best_within_cap)
ROUNDING = 1e-9  # ratio by which a ceiling proved at other prices is widened


def compile_rest() -> None:
    """Compile the kernels that only some searches call; to be used once a search has compiled the others."""
    compile_alike(best_within_cap, best_sequential)


def best_replica(
    t: Tables, x: int, f: int, max_copies: int, max_pool: int, group_price: FloatArray, card_price: FloatArray,
    scarce: BoolArray, limits: Limits, proof: Ceiling, floor: float, tolerance: float,
) -> tuple[float, IntArray, float]:  # fmt: skip
    """Return the replica of a configuration with the best ``rate / price``, if it is above ``floor``.

    Returns (ratio, rows of its stages, bound): no replica that fits in the fleet is above ``max(bound, floor)``.

    This is not a kernel: a kernel's machine code contains that of the kernels it calls, and compiling it took a minute.
    """
    options = list_options(
        t, x, f, max_copies, max_pool,
        TimeLimits(limits.slack, limits.slack_unevenness, limits.chunk_cap_s, limits.unevenness),
        reach_of(t.num_layers, limits, proof, floor), group_price, card_price,
    )  # fmt: skip
    prices = option_prices(options, group_price, card_price)
    cap = interval_cap(t, x, f, limits.unevenness)
    if not len(prices):
        return 0.0, NO_STAGES, 0.0
    cover = cover_tables(t)
    if not limits.sequential:
        return best_column(cover, options, prices, cap, limits.copies, scarce, floor, tolerance)
    if floor > 0.0:
        kept = useful_options(cover, options, prices, limits.longest_s, floor)
        if not len(kept):
            return 0.0, NO_STAGES, 0.0
        options, prices = selected(options, kept), prices[kept]
    ratio, weight, bound = best_sequential(cover, options, prices, cap, floor)
    stages = np.empty((0, 2), np.int64)
    if ratio > floor:
        _, _, stages = least_weighted(cover, options, prices, 1.0, weight)
    if bound > max(floor, ratio) * (1.0 + tolerance):
        within, quick, exact = best_within_cap(cover, options, prices, cap, max(floor, ratio))
        if within > ratio:
            ratio, stages = within, quick
        if exact:
            bound = max(ratio, floor)
    if ratio > floor and overdrawn(cover, options, stages, scarce)[0] >= 0:
        ratio, stages, fitting_bound = best_fitting_sequential(cover, options, prices, cap, scarce)
        bound = min(bound, max(fitting_bound, ratio))
    return ratio, stage_rows(options, stages), bound


@dataclass(frozen=True, slots=True)
class Priced:
    """The result of one pricing: the columns found, and a bound on ``rate / price`` of any replica."""

    templates: tuple[Template, ...]
    ratio_bound: float
    complete: bool  # False if the budget ran out; the bound then uses ceilings, infinite at worst, for the rest


@dataclass(frozen=True, slots=True)
class FamilyPart:
    """Replicas of some roles, with limits on stage copies and on attention workers of one class per copy."""

    roles: tuple[Role, ...]
    max_copies: int
    max_pool: int

    def describe(self, family: FamilyPart) -> str:
        """Return a description of what the part excludes from a family."""
        copies, pool = self.max_copies < family.max_copies, self.max_pool < family.max_pool
        left_out = ["stage copies"] * copies + ["attention workers"] * pool
        roles = [f"{' and '.join(self.roles)} only"] if set(self.roles) != set(family.roles) else []
        return ", ".join([*roles, *([f"without {' and '.join(left_out)}"] if left_out else [])])


def whole(family: Family) -> FamilyPart:
    """Return the part that is the whole of a family."""
    return FamilyPart(family.roles, family.max_copies, family.max_pool)


class Pricer:
    """Prices configurations that are all on one side of the master.

    ``row_costs`` [rows] is the cost of a row's unit besides its dual. Intervals narrower than ``tolerance`` are not
    halved further, and the remaining uncertainty goes into the bound.
    """

    def __init__(
        self, costs: CostTables, every: list[Configuration], row_costs: FloatArray, *, max_copies: int, max_pool: int,
        threads: int, tolerance: float,
    ) -> None:  # fmt: skip
        self.costs, self.row_costs, self.configurations = costs, row_costs, every
        self.max_copies, self.max_pool, self.threads, self.tolerance = max_copies, max_pool, threads, tolerance
        self.scopes = np.array([c.scope for c in every], dtype=np.int64)
        self.mixes = np.array([c.mix for c in every], dtype=np.int64)
        self.in_flight = np.array([c.in_flight_index for c in every], dtype=np.int64)
        self.longest_s = np.array([self._longest_s(c) for c in every], dtype=float)
        self.scarce = np.array([c.available < SCARCE for c in costs.classes])
        self._proved = _Proved(len(every), len(row_costs))
        self._shares = [_Share(part) for part in _shares(self.scopes)]

    def price(
        self, row_prices: FloatArray, floor: float, keep: float, budget: Budget, *, rate_cap: float, ease: float = 0.0
    ) -> Priced:  # fmt: skip
        """Find the best column of every configuration whose ratio could exceed ``floor`` (inf: no configuration).

        Rates count only up to ``rate_cap``. Configurations that cannot exceed the floor by more than the ratio
        ``ease`` are skipped, and their ceilings go into the bound.

        Columns within ``keep`` of the best ratio found so far are returned. A configuration that cannot come that
        close is not searched, and its ceiling does not exceed the returned bound.
        """
        if not self.configurations or floor == np.inf:
            return Priced((), floor if self.configurations else 0.0, True)
        prices = row_prices + self.row_costs
        worth = self.costs.group_use @ prices, self.costs.card_use @ prices
        best, enough, complete = floor, floor * (1.0 + ease), True
        found: list[tuple[float, int, IntArray]] = []
        tables, counted = self._tables(rate_cap), self._counted(rate_cap)
        highest = self._proved.at(prices, rate_cap)

        def search(i: int) -> tuple[float, IntArray, float]:
            if budget.is_spent():
                return np.nan, NO_STAGES, 0.0
            c, share = self.configurations[i], float(counted[i])
            ratio, rows, left = best_replica(
                tables[i], c.mix, c.in_flight_index, self.max_copies, self.max_pool, *worth, self.scarce,
                limits_of(
                    tables[i], c.mix, c.in_flight_index, *c.regime, c.max_copies, c.unevenness, tables[i].t_floor
                ),
                Ceiling(*proofs[i]), threshold / share, self.tolerance,
            )  # fmt: skip
            return ratio * share, rows, left * share

        with ThreadPoolExecutor(self.threads) as workers:
            promising = np.flatnonzero(highest > enough)
            proofs = np.zeros((len(highest), 3))
            proofs[promising] = self._ceilings(promising, tables, *worth, enough / counted, workers, budget)
            highest[promising] = np.minimum(highest[promising], proofs[promising, 0] * counted[promising])
            self._proved.note(promising, highest[promising], prices, rate_cap)
            bound = max(floor, float(highest[highest <= enough].max(initial=0.0)))
            order = np.argsort(-highest, kind="stable")
            order = order[highest[order] > enough]
            # In batches: a batch's threshold depends only on earlier ones, so the number of threads changes nothing.
            for start in range(0, len(order), BATCH):
                threshold = max(floor, best * keep)
                batch = order[start : start + BATCH]
                bound = max(bound, min(threshold, float(highest[batch[0]])))
                batch = batch[highest[batch] > threshold]
                for i, (ratio, rows, left) in zip(batch, workers.map(search, batch), strict=True):
                    if np.isnan(ratio):
                        complete = False
                        bound = max(bound, float(highest[i]))
                        continue
                    bound = max(bound, left)
                    self._proved.note(i, min(highest[i], max(left, threshold)), prices, rate_cap)
                    if ratio > threshold:
                        found.append((ratio, int(i), rows))
                        best = max(best, ratio)
        found.sort(key=lambda one: -one[0])
        templates = tuple(
            template_of(self.costs, self.configurations[i], rows) for ratio, i, rows in found if ratio >= best * keep
        )
        return Priced(templates, float(bound), complete)

    def _longest_s(self, c: Configuration) -> float:
        """Return an interval that no replica of a configuration exceeds."""
        return interval_cap(self.costs.scopes[c.scope].tables, c.mix, c.in_flight_index, c.unevenness)

    def _counted(self, rate_cap: float) -> FloatArray:
        """Return, for each configuration, the share of its slowest allowed rate that counts."""
        shares = np.ones(len(self.configurations))
        if np.isfinite(rate_cap):
            possible = self.longest_s > 0.0  # other configurations have no replica at all
            shares[possible] = np.minimum(1.0, rate_cap * self.longest_s[possible])
        return shares

    def _tables(self, rate_cap: float) -> list[Tables]:
        """Return the tables of every configuration, with intervals no shorter than the cap on rates allows.

        If a latency limit requires shorter intervals, any interval within the limit is allowed. Such rates all count as
        the cap, which is a share of the slowest of them.
        """
        whole = {int(scope): self.costs.scopes[scope].tables for scope in np.unique(self.scopes)}
        made, found = dict[tuple[int, float], Tables](), []
        for c, longest_s in zip(self.configurations, self.longest_s.tolist(), strict=True):
            t_floor = max(whole[c.scope].t_floor, min(1.0 / rate_cap, longest_s))
            key = (c.scope, t_floor)
            if key not in made:
                made[key] = whole[c.scope]._replace(t_floor=t_floor)
            found.append(made[key])
        return found

    def _ceilings(
        self, which: IntArray, tables: Sequence[Tables], group_price: FloatArray, card_price: FloatArray,
        enough: FloatArray, workers: ThreadPoolExecutor, budget: Budget,
    ) -> FloatArray:  # fmt: skip
        """Return upper bounds on ratios with m and r [which, 3], as sharp as ``enough`` needs; inf if out of budget."""
        asked = np.zeros(len(self.configurations), dtype=bool)
        asked[which] = True
        t_floors = np.array([t.t_floor for t in tables])
        found = np.full((len(self.configurations), 3), np.inf)

        def bounds(share: _Share) -> None:
            if not asked[share.members].any() or budget.is_spent():
                return
            t, members = tables[int(share.members[0])], share.members
            if share.is_stale(t_floors[members]):
                share.tabulate(
                    t, self._queries(t, members, t_floors), t_floors[members], self.max_copies, self.max_pool
                )
            assert share.lines is not None, "tabulated"
            assert share.queries is not None, "tabulated"
            found[members] = ceilings(
                t.num_layers, share.queries, share.lines, share.begins, group_price, card_price, enough[members]
            )  # fmt: skip

        list(workers.map(bounds, self._shares))
        return found[which]

    def _queries(self, t: Tables, members: IntArray, t_floors: FloatArray) -> CeilingQueries:
        every = [self.configurations[i] for i in members]
        floors = t_floors[members].tolist()
        limits = [limits_of(t, c.mix, c.in_flight_index, *c.regime, c.max_copies, c.unevenness, floor)  # type: ignore[call-arg]
                  for c, floor in zip(every, floors, strict=True)]  # fmt: skip
        return queries_of(self.mixes[members], self.in_flight[members], limits)


STALE = 0.05  # ratio by which shortest intervals may grow before lines, which lose sharpness, are recomputed


class _Share:
    """Configurations of one scope, which one thread handles, and their lines once tabulated."""

    def __init__(self, members: IntArray) -> None:
        self.members = members
        self.t_floors = np.zeros(len(members))
        self.queries: CeilingQueries | None = None
        self.lines: Lines | None = None
        self.begins: IntArray = np.zeros(1, dtype=np.int64)

    def tabulate(
        self, t: Tables, queries: CeilingQueries, t_floors: FloatArray, max_copies: int, max_pool: int
    ) -> None:
        self.queries, self.t_floors = queries, t_floors
        self.lines, self.begins = all_lines(t, queries, max_copies, max_pool)

    def is_stale(self, t_floors: FloatArray) -> bool:
        """Return whether lines are missing, invalid (for shorter intervals) or not sharp (for much longer ones)."""
        if self.lines is None:
            return True
        return bool(np.any(t_floors < self.t_floors) or np.any(t_floors > (1.0 + STALE) * self.t_floors))


def tolerance_for(target_gap: float) -> float:
    """Return the tolerance of pricing that leaves the master within a gap."""
    return min(RATIO_TOLERANCE, max(FINEST_TOLERANCE, target_gap / 2))


def pricers_of(
    costs: CostTables, row_costs: FloatArray, part: FamilyPart, threads: int, tolerance: float
) -> list[Pricer]:
    """Return a pricer for each side of the master; sides of other roles have no configurations."""
    every = [c for c in configurations(costs) if costs.mixes[c.mix].role in part.roles]
    return [
        Pricer(
            costs, [c for c in every if c.side == side], row_costs, max_copies=part.max_copies, max_pool=part.max_pool,
            threads=threads, tolerance=tolerance,
        )
        for side in range(costs.routes.num_sides)
    ]  # fmt: skip


def _shares(scopes: IntArray) -> Iterator[IntArray]:
    """Yield parts of the configurations for one thread each, in order; each part lies within one scope."""
    for scope in np.unique(scopes):
        alike = np.flatnonzero(scopes == scope)
        for start in range(0, len(alike), 4 * BATCH):
            yield alike[start : start + 4 * BATCH]


class _Proved:
    """Ceilings proved at earlier prices, and what they imply at others.

    If ``y <= c y'`` in every row, no replica costs more at y than c times its price at y', so its ratio at y' is at
    most c times its ratio at y. A lower cap on rates can only lower the ratio.
    """

    def __init__(self, num_configurations: int, num_rows: int) -> None:
        self.ratios = np.full(num_configurations, np.inf)
        self.prices = np.zeros((num_configurations, num_rows))
        self.rate_caps = np.full(num_configurations, np.inf)

    def at(self, prices: FloatArray, rate_cap: float) -> FloatArray:
        """Return upper bounds on the ratio of replicas of each configuration, inf if unknown; [configurations]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            dearer = np.where(self.prices > 0.0, self.prices / prices, 0.0).max(axis=1, initial=0.0)
            known = np.where(self.ratios > 0.0, self.ratios * dearer * (1.0 + ROUNDING), 0.0)
        return np.where((rate_cap <= self.rate_caps) & np.isfinite(self.ratios), known, np.inf)

    def note(self, which: IntArray | int, ratios: FloatArray | float, prices: FloatArray, rate_cap: float) -> None:
        """Record ceilings proved at these prices."""
        self.ratios[which], self.prices[which], self.rate_caps[which] = ratios, prices, rate_cap
