"""The bound on every re-planning: the joint worth of kept and changed replicas and the best new ones.

New replicas serve at most ``share = 1 - d / horizon`` of the horizon, d being the soonest start of any. Let w and a be
the prices of column generation, with ``a_s rate <= cost + w use`` for every replica on side s. Whatever continues, the
plan's net rate is at most

    max   sum_o (a_s net_o + s_r) x_o  +  sum_g share w_g u_g  +  sum of links price capacity
    s.t.  sum_o use_og x_o + u_g <= GPUs of g,   x_o of one replica <= 1,   sum of u and joining GPUs <= moves

over whole x and u: a small mixed program, whose bound by HiGHS is used. Where cost is minimised, new replicas cost at
least ``(1 + d / horizon) (pi demand - sum_o a_s rate_o x_o - w u - links)``, and at least 0.

On small fleets new replicas are enumerated with ceilings on their rates instead, each counted with the share of a
replica whose weights are spread evenly over its sub-fleet.

Replicas of prefill and decode may be larger than any plan needs, and then serve all that it needs even during their
start: ``share`` is 1 if w is the price of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hetis.solver.placement.fleet import UNIFIED, Routes
from hetis.solver.placement.generation import NO_LINKS, Bound
from hetis.solver.placement.master import Columns, Master
from hetis.solver.placement.outcome import ROUNDING
from hetis.solver.placement.tables import FloatArray
from hetis.solver.placement.template import use_of
from hetis.solver.replanning.change import Fate
from hetis.solver.replanning.columns import Candidate, NetMaster, least_start_s
from hetis.solver.replanning.fresh import Fresh
from hetis.solver.replanning.inventory import Row
from hetis.solver.replanning.running import Option

PARTS = 1 << 20  # units of the demand: the cost of what continuing replicas do not serve is counted in these


def bound_of(
    net: NetMaster, options: Sequence[Candidate], fresh: Fresh, *, time_limit_s: float, seed: int
) -> float:  # fmt: skip
    """Return a bound: no re-planning is worth more (costs less), in the master's unit."""
    if fresh.enumerated is not None:
        return _by_enumeration(net, options, fresh.enumerated, time_limit_s, seed)
    if fresh.prices is not None:
        return _by_prices(net, options, fresh.prices, time_limit_s, seed)
    return fresh.bound + sum(net.stay_rates.values()) if net.master.maximises else 0.0


@dataclass(slots=True)
class _BoundProgram:
    """A bounding program, collected column by column; ``routes`` define the sides and links."""

    limits: dict[Row, int]
    routes: Routes
    uses: list[dict[Row, int]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    links: list[FloatArray] = field(default_factory=list)

    def add(
        self, use: dict[Row, int], rate: float, cost: float = 0.0, side: int = UNIFIED, links: FloatArray | None = None
    ) -> None:  # fmt: skip
        self.uses.append(use)
        self.rates.append(rate)
        self.costs.append(cost)
        self.sides.append(side)
        nothing = np.zeros_like(self.routes.capacity) if self.routes.has_links else NO_LINKS
        self.links.append(nothing if links is None else links)

    def bound(self, demand: float | None, time_limit_s: float, seed: int) -> float:
        """Return HiGHS's bound over whole counts, or the relaxation's if it has none in time; without any, 0 or inf."""
        if not self.rates:
            return 0.0 if demand is None else np.inf
        master = Master(np.array(list(self.limits.values()), dtype=np.int64), demand, self.routes)
        columns = self._columns()
        relaxed = master.solve_lp(columns)
        if relaxed is None:
            return 0.0 if master.maximises else np.inf
        found = master.solve_milp(columns, time_limit_s=time_limit_s, gap=1e-6, seed=seed)
        if found is None or not np.isfinite(found.bound):
            return relaxed.value
        tightest = min if master.maximises else max
        return float(tightest(found.bound, relaxed.value))

    def _columns(self) -> Columns:
        number = {row: i for i, row in enumerate(self.limits)}
        uses = np.zeros((len(self.uses), len(number)), dtype=np.int64)
        for k, use in enumerate(self.uses):
            for row, amount in use.items():
                if row in number:
                    uses[k, number[row]] = amount
        return Columns(
            rates=np.array(self.rates),
            costs=np.array(self.costs),
            uses=uses,
            sides=np.array(self.sides, dtype=np.int64),
            links=np.array(self.links),
        )


def _limits_of(net: NetMaster, *kinds: str) -> dict[Row, int]:
    """Return rows of the inventory of these kinds with their limits."""
    inventory = net.inventory
    return {row: int(inventory.limits[i]) for row, i in inventory.rows.items() if row[0] in kinds}


def _stay(net: NetMaster, option: Option) -> float:
    """Return the worth of staying, in addition to the rate."""
    return net.stay_rates.get(option.old, 0.0) if net.master.maximises and option.fate is Fate.KEPT else 0.0


def _by_prices(net: NetMaster, options: Sequence[Candidate], prices: Bound, time_limit_s: float, seed: int) -> float:
    costs, maximises = net.costs, net.master.maximises
    start_s = least_start_s(net.change_costs, costs, sum(c.available for c in costs.classes))
    share, later = net.change_costs.served_share(start_s), 1.0 + start_s / net.change_costs.horizon_s
    if costs.routes.splits_roles or not maximises:
        share = 1.0
    program = _BoundProgram(_limits_of(net, "gpus", "replica", "moves"), replace(costs.routes, splits_roles=False))
    for candidate in options:
        option, (rate, cost) = candidate.option, net.net(candidate)
        assert option is not None
        worth = float(prices.rate_prices[costs.side_of(candidate.template.scope, candidate.template.mix)])
        rate = min(rate, prices.value) if maximises else rate  # no plan serves more
        use = net.inventory.of_template(candidate.template, count_moves=False)
        use |= {("replica", option.old): 1, ("moves",): option.num_moved(costs)}
        program.add(use, worth * rate + _stay(net, option), cost)
    # All room for larger TP groups is given to new replicas: its worth is a constant, as is that of the links.
    finite = np.isfinite(costs.routes.capacity)
    fixed = float((prices.link_prices[finite] * costs.routes.capacity[finite]).sum())
    for (g, p), price, limit in zip(costs.resources.rows, prices.row_prices, costs.resources.limits, strict=True):
        if p == 1:
            program.add({("gpus", g): 1, ("moves",): 1}, share * float(price))
        else:
            fixed += float(price * limit)
    if maximises:
        return (program.bound(None, time_limit_s, seed) + fixed) * (1.0 + ROUNDING)
    demand = float(prices.rate_prices[UNIFIED]) * (net.master.demand or 0.0) - fixed
    if demand <= 0.0:
        return 0.0
    part = later * demand / PARTS
    program.add({}, demand / PARTS, part)  # one unit of the demand, served by new replicas
    return max(0.0, program.bound(demand, time_limit_s, seed) - part) * (1.0 - ROUNDING)


def _by_enumeration(
    net: NetMaster, options: Sequence[Candidate], enumerated: Columns, time_limit_s: float, seed: int
) -> float:
    """Return the bound of the same master with ceilings in place of new replicas, over all of its rows."""
    costs, maximises = net.costs, net.master.maximises
    rows: list[Row] = [("row", *row) for row in costs.resources.rows]
    limits = dict(zip(rows, map(int, costs.resources.limits), strict=True))
    program = _BoundProgram({**limits, **_limits_of(net, "replica", "stays", "moves")}, costs.routes)
    for candidate in options:
        template, option = candidate.template, candidate.option
        assert option is not None
        use: dict[Row, int] = dict(zip(rows, map(int, use_of(costs, template)), strict=True))
        use |= {("replica", option.old): 1, ("moves",): option.num_moved(costs)}
        rate, cost = net.net(candidate)
        if stay := _stay(net, option):
            program.add({("stays", option.old): 1}, stay)
            use["stays", option.old] = -1
        program.add(use, rate, cost, costs.side_of(template.scope, template.mix), net.links(template))
    of_gpus = [p == 1 for _, p in costs.resources.rows]
    for k, taken in enumerate(enumerated.uses):
        num_gpus = int(taken[of_gpus].sum())
        start_s = least_start_s(net.change_costs, costs, num_gpus)
        share = net.change_costs.served_share(start_s) if maximises else 1.0
        cost = float(enumerated.costs[k]) * (1.0 + start_s / net.change_costs.horizon_s)
        use = {**dict(zip(rows, map(int, taken), strict=True)), ("moves",): num_gpus}
        program.add(use, share * float(enumerated.rates[k]), cost, int(enumerated.sides[k]), enumerated.links[k])
    return program.bound(net.master.demand, time_limit_s, seed)
