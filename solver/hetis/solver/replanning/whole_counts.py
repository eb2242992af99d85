"""A bound on re-plannings of an engine's family over whole counts of replicas, which prices alone cannot give.

Let w and a be the prices of `fresh.py`, ``scale`` the largest share that a new replica can serve (the least factor on
its cost), and rates and costs those of the re-planning master. A new replica k on side s, whose GPUs are worth more
than what it serves, loses

    loss_k = scale w use_k - a_s rate_k >= 0             if the rate is maximised
    loss_k = cost_k + scale (w use_k - a_s rate_k) >= 0   if cost is minimised

A running replica that continues may have a negative loss, but has at most one of its options. So re-plannings are worth
at most (cost at least)

    L = scale (w limits + links) + sum over running replicas of their greatest gain
    L = scale (pi demand - w limits - links) - sum over running replicas of their greatest gain

and with a new replica k worse than that by ``loss_k``. None that is better than a known one has a replica that loses
more than the distance between that one and L. HiGHS's bound over whole counts of all others, beside all options, is
therefore a bound on all re-plannings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from hetis.solver.budget import SearchSettings
from hetis.solver.placement.columns import Bound, Columns
from hetis.solver.placement.enumeration import ColumnPrices, EnumeratedColumns
from hetis.solver.placement.fleet import UNIFIED
from hetis.solver.placement.outcome import CROSSING
from hetis.solver.placement.policy import POLICY
from hetis.solver.placement.replicas.tables import CostTables, FloatArray
from hetis.solver.placement.replicas.template import use_of
from hetis.solver.replanning.fresh import by_enumeration, net_columns, stay_of
from hetis.solver.replanning.net_master import NetMaster, ProgramLimits
from hetis.solver.replanning.running import Candidate

PROOF_NODES = 10_000  # nodes of the search tree of one proof
UNITS = 1e9  # costs are rounded down to this share of the largest


class WholeCounts:
    """Proofs over whole counts at the prices of one search; the replicas that it lists serve every proof."""

    def __init__(self, costs: CostTables, prices: Bound, row_costs: FloatArray, settings: SearchSettings) -> None:
        self.costs, self.prices, self.row_costs, self.settings = costs, prices, row_costs, settings
        self.budget = settings.budget

    @cached_property
    def _enumerated(self) -> EnumeratedColumns:
        return EnumeratedColumns(self.costs, self.row_costs, None)

    def bound(
        self, net: NetMaster, options: Sequence[Candidate], busy: Mapping[int, int], value: float, known: float
    ) -> float:
        """Return a bound on every re-planning, one of which has this value; ``known`` if no better one is found.

        ``busy`` is as in `fresh.bound_of`.
        """
        scale = self._scale(net)
        distance = self._distance(net, options, value, scale)
        is_close = abs(known - value) <= self.settings.gap_target * abs(value)
        if is_close or scale == 0.0 or self.budget.is_spent() or not self._list(distance / scale):
            return known
        columns = self._columns(net, distance, scale)
        if columns is None or self.budget.is_spent():
            return known
        ends = ProgramLimits(
            gap=self.settings.gap_target / 2, nodes=PROOF_NODES, time_limit_s=self.budget.remaining_s(),
            seed=self.settings.seed, stop=self.budget.is_spent,
        )  # fmt: skip
        found = by_enumeration(net, options, columns, busy, ends)
        if net.master.maximises:
            return min(known, found) if found > 0.0 else known  # there is a re-planning, so 0 is a failure of HiGHS
        return max(known, found) if np.isfinite(found) else known

    def _scale(self, net: NetMaster) -> float:
        """Return the largest share that a new replica can serve, or the least factor on its cost."""
        start_s = net.least_start_s()
        if not net.master.maximises:
            return 1.0 + start_s / net.change_costs.horizon_s
        # Prefill and decode replicas may be larger than needed and serve all even during their start.
        return 1.0 if self.costs.routes.splits_roles else net.change_costs.served_share(start_s)

    def _distance(self, net: NetMaster, options: Sequence[Candidate], value: float, scale: float) -> float:
        """Return the distance between the value of a known re-planning and L."""
        routes, prices, maximises = self.costs.routes, self.prices, net.master.maximises
        finite = np.isfinite(routes.capacity)
        worth = float(prices.row_prices @ self.costs.resources.limits)
        worth += float((prices.link_prices[finite] * routes.capacity[finite]).sum())
        gains: dict[int, float] = {}
        for option in options:
            template, old, (rate, cost) = option.template, option.running, net.net(option)
            price = float(prices.rate_prices[self.costs.side_of(template.scope, template.mix)])
            taken = float(prices.row_prices @ use_of(self.costs, template))
            gain = price * rate + stay_of(net, option) - scale * taken
            if not maximises:
                gain = scale * (price * rate - taken) - cost
            gains[old] = max(gains.get(old, 0.0), gain)
        demanded = 0.0 if maximises else float(prices.rate_prices[UNIFIED]) * (net.master.demand or 0.0)
        most = scale * (worth - demanded) + sum(gains.values())
        rounding = CROSSING * (scale * (worth + demanded) + sum(gains.values()))
        return max(0.0, most - value if maximises else most + value) + rounding

    def _list(self, loss: float) -> bool:
        """List the best replica of every composition that loses at most ``loss``; return False if they are too many."""
        enumerated, prices = self._enumerated, self.prices
        if enumerated.num_compositions > POLICY.most_listed:
            return False
        side_prices = np.tile(prices.row_prices + self.row_costs, (len(prices.rate_prices), 1))
        return enumerated.list_within(ColumnPrices(side_prices, 0.0, prices.rate_prices), loss, self.budget)

    def _columns(self, net: NetMaster, distance: float, scale: float) -> Columns | None:
        """Return the listed replicas that lose at most ``distance``, with net rates and costs; None if too many."""
        listed, prices = self._enumerated.columns, self.prices
        if listed is None:
            return None
        columns = net_columns(net, listed)
        losses = columns.costs + scale * (columns.uses @ prices.row_prices)
        served = prices.rate_prices[columns.sides] * columns.rates
        losses -= served if net.master.maximises else scale * served
        columns = columns.some(np.flatnonzero(losses <= distance))
        if len(columns.rates) > POLICY.most_proved:
            return None
        unit = float(columns.costs.max(initial=0.0)) / UNITS or 1.0
        units: FloatArray = np.floor(columns.costs / unit)
        # A replica with fewer GPUs may start later, and then costs more.
        priced = replace(columns, uses=np.column_stack([columns.uses, units.astype(np.int64)]))
        return replace(columns, costs=np.asarray(units * unit)).some(priced.undominated())
