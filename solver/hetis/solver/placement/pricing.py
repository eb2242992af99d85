"""Pricing, compiled: the best column of every configuration at given prices of the master's rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.cover import best_column, fitting_cover
from hetis.solver.placement.options import Options, cheapest_per_shape, list_options, option_prices, selected
from hetis.solver.placement.sequential import (
    best_fitting_sequential,
    best_sequential,
    best_within_cap,
    least_weighted,
    overdrawn,
    useful_options,
)
from hetis.solver.placement.tables import Atlas, BoolArray, FloatArray, Tables
from hetis.solver.placement.template import Configuration, Template, configurations, template_of

Group = tuple[tuple[int, int, int], list[Configuration]]  # configurations that differ in their fill only

BATCH = 32
WITHIN_CAP, FITTING = -1.0, -2.0  # in place of a time weight: which program found a sequential replica
SCARCE = 256
RATIO_TOLERANCE = 2e-4  # intervals narrower than this are not halved further: what it leaves open goes into the bound


@kernel
def cheapest_layer(t: Tables, x: int, max_pool: int, group_price: FloatArray, card_price: FloatArray) -> float:
    """The least ``price x seconds`` of one repeated layer on any stage, copies and memory left aside.

    No replica of mix x has a rate per price above one over (layers times this): each stage pays its price for every
    second of the interval, and needs ``w`` of them per copy, request and layer.
    """
    least = np.inf
    for s in range(t.rank_class.shape[0]):
        if t.available[t.rank_class[s]] < t.rank_tp[s]:
            continue
        groups = t.rank_groups[s]
        base = t.layer_s[x, s]
        least = min(least, (base + t.own_s[x, s, groups]) * group_price[s])
        if base * group_price[s] >= least:
            continue
        for q in range(t.available.shape[0]):
            if t.pool_start[s, q] < 0:
                continue
            for k in range(groups):
                start = t.pool_start[s, q] + k * t.pool_sizes.shape[0]
                for size in range(t.pool_sizes.shape[0]):
                    price = group_price[s] + t.pool_sizes[size] * card_price[q]
                    if t.pool_sizes[size] > max_pool or base * price >= least:
                        break
                    least = min(least, (base + t.pool_s[x, start + size]) * price)
    return least


@kernel
def cheapest_memory(t: Tables, group_price: FloatArray) -> float:
    """A lower bound on the price of any replica: of GPUs with room for the weights of all repeated layers."""
    least = np.inf
    for s in range(t.rank_class.shape[0]):
        if t.available[t.rank_class[s]] >= t.rank_tp[s] and t.room_bytes[s] > 0.0:
            least = min(least, group_price[s] * t.layer_bytes[s] / t.room_bytes[s])
    return t.num_layers * least


@kernel
def _priced_options(
    t: Tables, x: int, f: int, max_copies: int, max_pool: int, group_price: FloatArray, card_price: FloatArray,
    scarce: BoolArray,
) -> tuple[Options, FloatArray]:  # fmt: skip
    options = list_options(t, x, f, max_copies, max_pool)
    prices = option_prices(t, options, group_price, card_price)
    if scarce.any():  # a dearer option that takes less of a scarce class may be the better one
        return options, prices
    kept = cheapest_per_shape(options, prices, t.num_layers)
    return selected(options, kept), prices[kept]


@kernel
def _best(
    t: Tables, x: int, f: int, family_copies: int, max_pool: int, group_price: FloatArray,
    card_price: FloatArray, scarce: BoolArray, slacks: FloatArray, copies: IntArray, floor: float, tolerance: float,
) -> FloatArray:  # fmt: skip
    """(ratio, parameter, bound) for each fill of one (mix, in-flight); shape [fills, 3]."""
    if t.t_floor > t.t_cap[x, f]:
        return np.zeros((slacks.shape[0], 3))
    options, prices = _priced_options(t, x, f, family_copies, max_pool, group_price, card_price, scarce)
    out = np.zeros((slacks.shape[0], 3))
    if t.in_flight[f] == 1 and floor > 0.0:
        useful = useful_options(t, options, prices, t.t_cap[x, f], floor)
        options, prices = selected(options, useful), prices[useful]
    for i in range(slacks.shape[0]):
        if t.in_flight[f] == 1:
            ratio, weight, bound = best_sequential(t, options, prices, t.t_cap[x, f], floor)
            stages = np.empty((0, 2), np.int64)
            if bound > max(floor, ratio) * (1.0 + tolerance):
                within, stages, exact = best_within_cap(t, options, prices, t.t_cap[x, f], max(floor, ratio))
                if within > ratio:
                    ratio, weight = within, WITHIN_CAP
                if exact:
                    bound = max(ratio, floor)
            if ratio > floor and weight >= 0.0:
                _, _, stages = least_weighted(t, options, prices, 1.0, weight)
            if ratio > floor and overdrawn(t, options, stages, scarce)[0] >= 0:
                ratio, stages, fitting_bound = best_fitting_sequential(t, options, prices, t.t_cap[x, f], scarce)
                weight, bound = FITTING, min(bound, max(fitting_bound, ratio))
            out[i, 0], out[i, 1], out[i, 2] = ratio, weight, bound
        else:
            out[i, :] = best_column(t, options, prices, t.t_cap[x, f], slacks[i], copies[i], scarce, floor, tolerance)
    return out


@dataclass(frozen=True, slots=True)
class Priced:
    """Outcome of one pricing: the columns found, and the highest ``rate / price`` any replica can have."""

    templates: tuple[Template, ...]
    ratio_bound: float
    complete: bool  # False: the budget ran out, and ceilings stand in for what was not searched


class Pricer:
    """Prices all configurations of a family. ``row_costs`` [rows] is what a row's unit costs beside its dual."""

    def __init__(self, atlas: Atlas, row_costs: FloatArray, *, max_copies: int, max_pool: int, threads: int) -> None:
        self.atlas, self.row_costs = atlas, row_costs
        self.max_copies, self.max_pool, self.threads = max_copies, max_pool, threads
        grouped: dict[tuple[int, int, int], list[Configuration]] = {}
        for c in configurations(atlas):
            grouped.setdefault((c.scope, c.mix, c.in_flight_index), []).append(c)
        self.groups = list(grouped.items())
        self.scarce = _scarce(atlas)

    def price(self, row_prices: FloatArray, floor: float, keep: float, budget: Budget) -> Priced:
        """Finds the best column of every configuration whose ratio could exceed ``floor``.

        Columns within ``keep`` of the best ratio found so far are returned; a configuration that cannot come that
        close is not searched, and its ceiling does not exceed the bound returned.
        """
        prices = row_prices + self.row_costs
        group_price = self.atlas.group_use @ prices
        card_price = self.atlas.card_use @ prices
        ceilings = self._ceilings(group_price, card_price)
        order = sorted(self.groups, key=lambda group: (-ceilings[group[0][0], group[0][1]], group[0][2]))
        best, bound = floor, floor
        found: list[tuple[float, Configuration, float, float]] = []
        complete = True

        def search(group: Group) -> FloatArray:
            (scope, mix, f), members = group
            if budget.is_spent():
                return np.full((len(members), 3), np.nan)
            return _best(
                self.atlas.scopes[scope].tables, mix, f, self.max_copies, self.max_pool, group_price, card_price,
                self.scarce, np.array([c.slack for c in members]),
                np.array([c.max_copies for c in members], dtype=np.int64), threshold, RATIO_TOLERANCE,
            )  # fmt: skip

        # In batches: the threshold of a batch depends on those before it only, so that threads change nothing.
        with ThreadPoolExecutor(self.threads) as workers:
            for start in range(0, len(order), BATCH):
                threshold = max(floor, best * keep)
                batch = [g for g in order[start : start + BATCH] if ceilings[g[0][0], g[0][1]] > threshold]
                bound = max(bound, min(threshold, ceilings.max()))
                for group, outcome in zip(batch, workers.map(search, batch), strict=True):
                    for configuration, (ratio, parameter, left) in zip(group[1], outcome, strict=True):
                        if np.isnan(ratio):
                            complete = False
                            bound = max(bound, ceilings[configuration.scope, configuration.mix])
                            continue
                        bound = max(bound, left)
                        if ratio > threshold:
                            found.append((float(ratio), configuration, float(parameter), threshold))
                            best = max(best, float(ratio))
        found.sort(key=lambda item: (-item[0], item[1].scope, item[1].mix, item[1].in_flight_index, item[1].max_copies))
        templates = tuple(
            self._template(configuration, ratio, parameter, below, group_price, card_price)
            for ratio, configuration, parameter, below in found
            if ratio >= best * keep
        )
        return Priced(templates, float(bound), complete)

    def _ceilings(self, group_price: FloatArray, card_price: FloatArray) -> FloatArray:
        """Upper bounds on the ratio from `cheapest_layer` and, where zones set a floor on t, memory; [scopes, X]."""
        bounds = np.empty((len(self.atlas.scopes), len(self.atlas.mixes)))
        for i, scope in enumerate(self.atlas.scopes):
            t = scope.tables
            least = t.t_floor * cheapest_memory(t, group_price)
            for x in range(len(self.atlas.mixes)):
                work = t.num_layers * cheapest_layer(t, x, self.max_pool, group_price, card_price)
                bounds[i, x] = 1.0 / max(work, least)
        return bounds

    def _template(
        self, c: Configuration, ratio: float, parameter: float, floor: float, group_price: FloatArray,
        card_price: FloatArray,
    ) -> Template:  # fmt: skip
        """Runs the winning program of a configuration once more, keeping its stages."""
        a = self.atlas
        tables = a.scopes[c.scope].tables
        options, prices = _priced_options(
            tables, c.mix, c.in_flight_index, self.max_copies, self.max_pool, group_price, card_price, self.scarce
        )
        if c.is_sequential:
            cap = tables.t_cap[c.mix, c.in_flight_index]
            if parameter == WITHIN_CAP:
                _, stages, _ = best_within_cap(tables, options, prices, cap, ratio * (1.0 - 1e-9))
            elif parameter == FITTING:
                kept = useful_options(tables, options, prices, cap, floor)
                options, prices = selected(options, kept), prices[kept]
                _, stages, _ = best_fitting_sequential(tables, options, prices, cap, self.scarce)
            else:
                _, _, stages = least_weighted(tables, options, prices, 1.0, parameter)
        else:
            _, _, stages = fitting_cover(
                tables,
                options,
                prices,
                parameter / (1.0 + c.slack),
                c.max_copies,
                self.scarce,
                np.zeros(len(a.classes)),
                np.inf,
            )
        return template_of(a, c, options, stages)


def _scarce(atlas: Atlas) -> BoolArray:
    """Classes of which a single replica may well ask for more GPUs than there are; [N].

    In larger classes such a replica is not ruled out while pricing: it can only loosen the bound.
    """
    return np.array([c.available < SCARCE for c in atlas.classes])
