"""Pricing, compiled: the best column of every configuration at given prices of the master's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.placement.ceiling import Ceiling, Limits, ceilings, limits_of, within_reach
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.configurations import Configuration, configurations
from hetis.solver.placement.cover import best_column
from hetis.solver.placement.options import (
    NO_STAGES,
    Options,
    interval_cap,
    list_options,
    option_prices,
    selected,
    stage_rows,
)
from hetis.solver.placement.sequential import best_fitting_sequential, best_sequential, least_weighted, useful_options
from hetis.solver.placement.stages import overdrawn
from hetis.solver.placement.tables import Atlas, BoolArray, FloatArray, Tables
from hetis.solver.placement.template import Template, template_of
from hetis.solver.placement.within_cap import best_within_cap
from hetis.solver.plan import Role

BATCH = 32
SCARCE = 256
RATIO_TOLERANCE, FINEST_TOLERANCE = 2e-4, 1e-6  # intervals narrower than this are not halved further
ROUNDING = 1e-9  # share by which what is proved at other prices is widened


@kernel
def _useful(
    t: Tables, x: int, f: int, max_copies: int, max_pool: int, group_price: FloatArray, card_price: FloatArray,
    limits: Limits, proof: Ceiling, floor: float,
) -> tuple[Options, FloatArray]:  # fmt: skip
    """The options that a replica of ratio above ``floor`` can have a stage of, and their prices."""
    options = list_options(
        t, x, f, max_copies, max_pool, limits.slack, limits.slack_unevenness, limits.chunk_cap_s, limits.unevenness
    )
    prices = option_prices(t, options, group_price, card_price)
    if floor <= 0.0:
        return options, prices
    if limits.sequential:
        kept = useful_options(t, options, prices, limits.longest_s, floor)
    else:
        kept = within_reach(options, prices, t.num_layers, limits, proof, floor)
    return selected(options, kept), prices[kept]


@kernel
def best_replica(
    t: Tables, x: int, f: int, max_copies: int, max_pool: int, group_price: FloatArray, card_price: FloatArray,
    scarce: BoolArray, limits: Limits, proof: Ceiling, floor: float, tolerance: float,
) -> tuple[float, IntArray, float]:  # fmt: skip
    """The replica of a configuration with the best ``rate / price``, if any is above ``floor``.

    Returns (ratio, rows of its stages, bound): no replica that fits in the fleet is above ``max(bound, floor)``.
    """
    options, prices = _useful(t, x, f, max_copies, max_pool, group_price, card_price, limits, proof, floor)
    cap = interval_cap(t, x, f, limits.unevenness)
    if not limits.sequential:
        return best_column(t, options, prices, cap, limits.copies, scarce, floor, tolerance)
    ratio, weight, bound = best_sequential(t, options, prices, cap, floor)
    stages = np.empty((0, 2), np.int64)
    if ratio > floor:
        _, _, stages = least_weighted(t, options, prices, 1.0, weight)
    if bound > max(floor, ratio) * (1.0 + tolerance):
        within, quick, exact = best_within_cap(t, options, prices, cap, max(floor, ratio))
        if within > ratio:
            ratio, stages = within, quick
        if exact:
            bound = max(ratio, floor)
    if ratio > floor and overdrawn(t, options, stages, scarce)[0] >= 0:
        ratio, stages, fitting_bound = best_fitting_sequential(t, options, prices, cap, scarce)
        bound = min(bound, max(fitting_bound, ratio))
    return ratio, stage_rows(options, stages), bound


@dataclass(frozen=True, slots=True)
class Priced:
    """Outcome of one pricing: the columns found, and the highest ``rate / price`` any replica can have."""

    templates: tuple[Template, ...]
    ratio_bound: float
    complete: bool  # False: the budget ran out; ceilings, infinite at worst, stand in for what was not searched


class Pricer:
    """Prices some configurations, all on one side of the master.

    ``row_costs`` [rows] is what a row's unit costs beside its dual. Intervals narrower than ``tolerance`` are not
    halved further: what that leaves open goes into the bound.
    """

    def __init__(
        self,
        atlas: Atlas,
        every: list[Configuration],
        row_costs: FloatArray,
        *,
        max_copies: int,
        max_pool: int,
        threads: int,
        tolerance: float,
    ) -> None:
        self.atlas, self.row_costs = atlas, row_costs
        self.max_copies, self.max_pool, self.threads, self.tolerance = max_copies, max_pool, threads, tolerance
        self.configurations = every
        self.scopes = np.array([c.scope for c in every], dtype=np.int64)
        self.mixes = np.array([c.mix for c in every], dtype=np.int64)
        self.in_flight = np.array([c.in_flight_index for c in every], dtype=np.int64)
        self.regimes = np.array([c.regime for c in every], dtype=float).reshape(-1, 2)
        self.copies = np.array([c.max_copies for c in every], dtype=np.int64)
        self.unevenness = np.array([c.unevenness for c in every], dtype=float)
        self.longest_s = np.array([self._longest_s(c) for c in every], dtype=float)
        self.scarce = _scarce(atlas)
        self._proved = _Proved(len(every), len(row_costs))

    def price(
        self, row_prices: FloatArray, floor: float, keep: float, budget: Budget, *, rate_cap: float, ease: float = 0.0
    ) -> Priced:  # fmt: skip
        """Finds the best column of every configuration whose ratio could exceed ``floor`` (inf: of none).

        Rates count up to ``rate_cap`` only. With ``ease`` configurations are left alone that cannot exceed the floor by
        more than this share; what they may have goes into the bound.

        Columns within ``keep`` of the best ratio found so far are returned; a configuration that cannot come that
        close is not searched, and its ceiling does not exceed the bound returned.
        """
        if not self.configurations or floor == np.inf:
            return Priced((), floor if self.configurations else 0.0, True)
        prices = row_prices + self.row_costs
        worth = self.atlas.group_use @ prices, self.atlas.card_use @ prices
        best, enough, complete = floor, floor * (1.0 + ease), True
        found: list[tuple[float, int, IntArray]] = []
        tables = self._tables(rate_cap)
        counted = self._counted(rate_cap)
        highest = self._proved.at(prices, rate_cap)

        def search(i: int) -> tuple[float, IntArray, float]:
            if budget.is_spent():
                return np.nan, NO_STAGES, 0.0
            c, share = self.configurations[i], float(counted[i])
            ratio, rows, left = best_replica(
                tables[i], c.mix, c.in_flight_index, self.max_copies, self.max_pool, *worth, self.scarce,
                limits_of(tables[i], c.mix, c.in_flight_index, *c.regime, c.max_copies, c.unevenness),
                Ceiling(*proofs[i]), threshold / share, self.tolerance,
            )  # fmt: skip
            return ratio * share, rows, left * share

        with ThreadPoolExecutor(self.threads) as workers:
            promising = np.flatnonzero(highest > enough)
            proofs = np.zeros((len(highest), 3))
            proofs[promising] = self._ceilings(promising, tables, *worth, enough, workers, budget)
            highest[promising] = np.minimum(highest[promising], proofs[promising, 0] * counted[promising])
            self._proved.note(promising, highest[promising], prices, rate_cap)
            bound = max(floor, float(highest[highest <= enough].max(initial=0.0)))
            order = np.argsort(-highest, kind="stable")
            order = order[highest[order] > enough]
            # In batches: the threshold of a batch depends on those before it only, so that threads change nothing.
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
            template_of(self.atlas, self.configurations[i], rows) for ratio, i, rows in found if ratio >= best * keep
        )
        return Priced(templates, float(bound), complete)

    def _longest_s(self, c: Configuration) -> float:
        """No replica of a configuration has a longer interval."""
        longest_s: float = interval_cap(self.atlas.scopes[c.scope].tables, c.mix, c.in_flight_index, c.unevenness)
        return longest_s

    def _counted(self, rate_cap: float) -> FloatArray:
        """The share of its slowest allowed rate that counts, of every configuration."""
        shares = np.ones(len(self.configurations))
        if np.isfinite(rate_cap):
            possible = self.longest_s > 0.0  # others have no replica at all
            shares[possible] = np.minimum(1.0, rate_cap * self.longest_s[possible])
        return shares

    def _tables(self, rate_cap: float) -> list[Tables]:
        """The tables of every configuration, with intervals no shorter than a rate that counts.

        Where a latency limit asks for shorter ones, any that meets it will do: all of them count for the cap, a share
        of the slowest such rate.
        """
        whole = {int(scope): self.atlas.scopes[scope].tables for scope in np.unique(self.scopes)}
        made: dict[tuple[int, float], Tables] = {}
        found = []
        for c, longest_s in zip(self.configurations, self.longest_s.tolist(), strict=True):
            t_floor = max(whole[c.scope].t_floor, min(1.0 / rate_cap, longest_s))
            key = (c.scope, t_floor)
            if key not in made:
                made[key] = whole[c.scope]._replace(t_floor=t_floor)
            found.append(made[key])
        return found

    def _ceilings(
        self, which: IntArray, tables: Sequence[Tables], group_price: FloatArray, card_price: FloatArray,
        floor: float, workers: ThreadPoolExecutor, budget: Budget,
    ) -> FloatArray:  # fmt: skip
        """Upper bounds on the ratio of these configurations, no sharper than ``floor``, with m and r; [., 3].

        Those that the budget leaves no time for are infinite.
        """

        def bounds(part: IntArray) -> FloatArray:
            if budget.is_spent():
                return np.full((len(part), 3), np.inf)
            return ceilings(
                tables[int(part[0])], self.mixes[part], self.in_flight[part], self.regimes[part], self.copies[part],
                self.unevenness[part], self.max_copies, self.max_pool, group_price, card_price, floor,
            )  # fmt: skip

        return np.concatenate([np.zeros((0, 3)), *workers.map(bounds, _shares(which, tables))])


def pricers_of(
    atlas: Atlas, row_costs: FloatArray, roles: Sequence[Role], *, max_copies: int, max_pool: int, threads: int,
    target_gap: float,
) -> list[Pricer]:  # fmt: skip
    """One for every side of the master; those of other roles have nothing to price."""
    every = [c for c in configurations(atlas) if atlas.mixes[c.mix].role in roles]
    return [
        Pricer(
            atlas,
            [c for c in every if c.side == side],
            row_costs,
            max_copies=max_copies,
            max_pool=max_pool,
            threads=threads,
            tolerance=min(RATIO_TOLERANCE, max(FINEST_TOLERANCE, target_gap / 2)),
        )
        for side in range(atlas.routes.num_sides)
    ]


def _shares(which: IntArray, tables: Sequence[Tables]) -> Iterator[IntArray]:
    """Shares of the configurations for one thread each, in their order; those of a share have the same tables."""
    for _, members in groupby(which.tolist(), key=lambda i: id(tables[i])):
        alike = np.array(list(members), dtype=np.int64)
        for start in range(0, len(alike), 4 * BATCH):
            yield alike[start : start + 4 * BATCH]


class _Proved:
    """Ceilings proved at earlier prices, which say something at others.

    With ``y <= c y'`` in every row no replica is dearer at y than c times what it is at y', so that its ratio at y' is
    at most c times that at y. Rates that count up to less only lower it.
    """

    def __init__(self, num_configurations: int, num_rows: int) -> None:
        self.ratios = np.full(num_configurations, np.inf)
        self.prices = np.zeros((num_configurations, num_rows))
        self.rate_caps = np.full(num_configurations, np.inf)

    def at(self, prices: FloatArray, rate_cap: float) -> FloatArray:
        """No replica of a configuration has a ratio above this; inf: nothing is known; [configurations]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            dearer = np.where(self.prices > 0.0, self.prices / prices, 0.0).max(axis=1, initial=0.0)
            known = np.where(self.ratios > 0.0, self.ratios * dearer * (1.0 + ROUNDING), 0.0)
        return np.where((rate_cap <= self.rate_caps) & np.isfinite(self.ratios), known, np.inf)

    def note(self, which: IntArray | int, ratios: FloatArray | float, prices: FloatArray, rate_cap: float) -> None:
        """Ceilings proved at these prices."""
        self.ratios[which], self.prices[which], self.rate_caps[which] = ratios, prices, rate_cap


def _scarce(atlas: Atlas) -> BoolArray:
    """Classes of which a single replica may well ask for more GPUs than there are; [N].

    In larger classes such a replica is not ruled out while pricing: it can only loosen the bound.
    """
    return np.array([c.available < SCARCE for c in atlas.classes])
