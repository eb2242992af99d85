"""Pricing, compiled: the best column of every configuration at given prices of the master's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.placement.ceiling import Ceiling, Limits, ceilings, limits_of, within_reach
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.configurations import Configuration
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

BATCH = 32
SCARCE = 256


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
    complete: bool  # False: the budget ran out, and ceilings stand in for what was not searched


@dataclass(frozen=True, slots=True)
class _Part:
    """Configurations of one scope, in their order, as the arrays that `ceilings` reads."""

    scope: int
    mixes: IntArray
    in_flight: IntArray
    slacks: FloatArray
    copies: IntArray
    unevenness: FloatArray


def _parts(every: list[Configuration]) -> Iterator[_Part]:
    """Shares of the configurations for one thread each; those of a scope stand together."""
    for scope, members in groupby(every, key=lambda c: c.scope):
        of_scope = list(members)
        for start in range(0, len(of_scope), 4 * BATCH):
            part = of_scope[start : start + 4 * BATCH]
            yield _Part(
                scope,
                np.array([c.mix for c in part], dtype=np.int64),
                np.array([c.in_flight_index for c in part], dtype=np.int64),
                np.array([c.regime for c in part]),
                np.array([c.max_copies for c in part], dtype=np.int64),
                np.array([c.unevenness for c in part]),
            )


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
        self.parts = list(_parts(self.configurations))
        self.scarce = _scarce(atlas)

    def price(self, row_prices: FloatArray, floor: float, keep: float, budget: Budget, *, rate_cap: float) -> Priced:
        """Finds the best column of every configuration whose ratio could exceed ``floor`` (inf: of none).

        Rates count up to ``rate_cap`` only.

        Columns within ``keep`` of the best ratio found so far are returned; a configuration that cannot come that
        close is not searched, and its ceiling does not exceed the bound returned.
        """
        if not self.configurations or floor == np.inf:
            return Priced((), floor if self.configurations else 0.0, True)
        prices = row_prices + self.row_costs
        worth = self.atlas.group_use @ prices, self.atlas.card_use @ prices
        best, bound, complete = floor, floor, True
        found: list[tuple[float, int, IntArray]] = []
        tables = {part.scope: self._capped(part.scope, rate_cap) for part in self.parts}

        def search(i: int) -> tuple[float, IntArray, float]:
            if budget.is_spent():
                return np.nan, NO_STAGES, 0.0
            c = self.configurations[i]
            return best_replica(
                tables[c.scope], c.mix, c.in_flight_index, self.max_copies, self.max_pool, *worth, self.scarce,
                limits_of(tables[c.scope], c.mix, c.in_flight_index, *c.regime, c.max_copies, c.unevenness),
                Ceiling(*proofs[i]), threshold, self.tolerance,
            )  # fmt: skip

        with ThreadPoolExecutor(self.threads) as workers:
            proofs = self._ceilings(tables, *worth, floor, workers)
            highest = proofs[:, 0]
            order = np.argsort(-highest, kind="stable")
            order = order[highest[order] > floor]
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
                    if ratio > threshold:
                        found.append((ratio, int(i), rows))
                        best = max(best, ratio)
        found.sort(key=lambda one: -one[0])
        templates = tuple(
            template_of(self.atlas, self.configurations[i], rows) for ratio, i, rows in found if ratio >= best * keep
        )
        return Priced(templates, float(bound), complete)

    def _capped(self, scope: int, rate_cap: float) -> Tables:
        """The tables of a scope, with intervals no shorter than a rate that counts."""
        tables = self.atlas.scopes[scope].tables
        return tables._replace(t_floor=max(tables.t_floor, 1.0 / rate_cap))

    def _ceilings(
        self, tables: Mapping[int, Tables], group_price: FloatArray, card_price: FloatArray, floor: float,
        workers: ThreadPoolExecutor,
    ) -> FloatArray:  # fmt: skip
        """Upper bounds on the ratio of every configuration, no sharper than ``floor``, with m and r; [., 3]."""

        def bounds(part: _Part) -> FloatArray:
            return ceilings(
                tables[part.scope], part.mixes, part.in_flight, part.slacks, part.copies, part.unevenness,
                self.max_copies, self.max_pool, group_price, card_price, floor,
            )  # fmt: skip

        return np.concatenate(list(workers.map(bounds, self.parts)))


def _scarce(atlas: Atlas) -> BoolArray:
    """Classes of which a single replica may well ask for more GPUs than there are; [N].

    In larger classes such a replica is not ruled out while pricing: it can only loosen the bound.
    """
    return np.array([c.available < SCARCE for c in atlas.classes])
