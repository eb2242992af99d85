"""The bound on every re-planning: what keeping and changing replicas can be worth together with the best new ones.

New replicas serve at most ``share = 1 - d / horizon`` of the horizon, d the soonest start of any. Let w and a be the
prices of column generation, with ``a_s rate <= cost + w use`` for every replica on side s. Whatever goes on, the plan's
net rate is at most

    max   sum_o (a_s net_o + s_r) x_o  +  sum_g share w_g u_g  +  sum of links price capacity
    s.t.  sum_o use_og x_o + u_g <= GPUs of g,   x_o of one replica <= 1,   sum of u and joining GPUs <= moves

over whole x and u: a small mixed program, whose bound by HiGHS is ours. Where cost is minimised, new replicas cost at
least ``(1 + d / horizon) (pi demand - sum_o a_s rate_o x_o - w u - links)``, and at least nothing.

On small fleets new replicas are listed with ceilings on their rates instead, each counted with the share of a replica
whose weights are spread evenly over its sub-fleet.

Replicas of prefill and decode may be larger than any plan asks for, and then serve all it asks for even while they
start: ``share`` is 1 where w prices those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.placement.generation import Bound
from hetis.solver.placement.master import Columns, Master
from hetis.solver.placement.outcome import ROUNDING
from hetis.solver.placement.routes import UNIFIED
from hetis.solver.placement.template import use_of
from hetis.solver.replanning.change import Fate
from hetis.solver.replanning.columns import Candidate, NetMaster, least_start_s
from hetis.solver.replanning.fresh import Fresh
from hetis.solver.replanning.inventory import Row

PARTS = 1 << 20  # of the demand: the cost of what is not served by replicas that go on is counted in these


@dataclass(slots=True)
class _Rows:
    """Columns of the bounding program, gathered one by one."""

    uses: list[dict[Row, int]]
    rates: list[float]
    costs: list[float]

    def add(self, use: dict[Row, int], rate: float, cost: float = 0.0) -> None:
        self.uses.append(use)
        self.rates.append(rate)
        self.costs.append(cost)


def bound_of(
    net: NetMaster, options: Sequence[Candidate], fresh: Fresh, *, time_limit_s: float, seed: int
) -> float:  # fmt: skip
    """No re-planning is worth more (costs less), in the master's unit."""
    if fresh.listed is not None:
        return _by_list(net, options, fresh.listed, time_limit_s, seed)
    if fresh.prices is not None:
        return _by_prices(net, options, fresh.prices, time_limit_s, seed)
    return fresh.bound + sum(net.stay_rates.values()) if net.master.maximises else 0.0


def _rows_of(net: NetMaster) -> dict[Row, int]:
    """Rows of the program: those of the inventory that count GPUs, replicas and moves; no nodes."""
    return {row: i for i, row in enumerate(r for r in net.inventory.rows if r[0] in ("gpus", "replica", "moves"))}


def _limits(net: NetMaster, rows: dict[Row, int]) -> np.ndarray:
    return np.array([net.inventory.limits[net.inventory.rows[row]] for row in rows], dtype=np.int64)


def _named_use(net: NetMaster, candidate: Candidate) -> dict[Row, int]:
    """What an option takes of these rows, its GPUs counted as any others."""
    option = candidate.option
    assert option is not None
    use = net.inventory.of_template(candidate.template, count_moves=False)
    return {**use, ("replica", option.old): 1, ("moves",): option.num_moved(net.atlas)}


def _stay(net: NetMaster, candidate: Candidate) -> float:
    option = candidate.option
    return net.stay_rates.get(option.old, 0.0) if option is not None and option.fate is Fate.KEPT else 0.0


def _by_prices(net: NetMaster, options: Sequence[Candidate], prices: Bound, time_limit_s: float, seed: int) -> float:
    atlas, maximises = net.atlas, net.master.maximises
    start_s = least_start_s(net.costs, atlas, sum(c.available for c in atlas.classes))
    share, later = net.costs.served_share(start_s), 1.0 + start_s / net.costs.horizon_s
    if atlas.routes.splits_roles:
        share = 1.0
    rows = _rows_of(net)
    gathered = _Rows([], [], [])
    for candidate in options:
        rate, cost = net.net(candidate)
        worth = float(prices.rate_prices[atlas.side_of(candidate.template.scope, candidate.template.mix)])
        rate = min(rate, prices.value) if maximises else rate  # no plan serves more
        gathered.add(_named_use(net, candidate), worth * rate + (_stay(net, candidate) if maximises else 0.0), cost)
    for (g, p), price in zip(atlas.resources.rows, prices.row_prices, strict=True):
        if p == 1:
            gathered.add({("gpus", g): 1, ("moves",): 1}, (share if maximises else 1.0) * float(price))
    finite = np.isfinite(atlas.routes.capacity)
    fixed = float((prices.link_prices[finite] * atlas.routes.capacity[finite]).sum())
    fixed += _worth_of_group_rows(net, prices)
    if maximises:
        found = _solve(net, rows, gathered, None, time_limit_s, seed)
        return (found + fixed) * (1.0 + ROUNDING)
    demand = float(prices.rate_prices[UNIFIED]) * (net.master.demand or 0.0) - fixed
    if demand <= 0.0:
        return 0.0
    gathered.add({}, demand / PARTS, later * demand / PARTS)  # a part of the demand served anew
    found = _solve(net, rows, gathered, demand, time_limit_s, seed)
    return max(0.0, found - later * demand / PARTS) * (1.0 - ROUNDING)


def _worth_of_group_rows(net: NetMaster, prices: Bound) -> float:
    """Rows of larger TP groups are left to new replicas whole: their worth is a constant."""
    rows = zip(net.atlas.resources.rows, prices.row_prices, net.atlas.resources.limits, strict=True)
    return float(sum(price * limit for (_, p), price, limit in rows if p > 1))


def _by_list(net: NetMaster, options: Sequence[Candidate], listed: Columns, time_limit_s: float, seed: int) -> float:
    """The same master with ceilings in place of new replicas; its rows are those of the atlas."""
    atlas, maximises = net.atlas, net.master.maximises
    base = list(atlas.resources.rows)
    rows: dict[Row, int] = {("row", *row): i for i, row in enumerate(base)}
    rows |= {row: len(base) + i for i, row in enumerate(r for r in net.inventory.rows if r[0] in ("replica", "moves"))}
    own = [net.inventory.limits[net.inventory.rows[row]] for row in rows if row[0] != "row"]
    stays = [candidate for candidate in options if _stay(net, candidate) > 0.0] if maximises else []
    rows |= {("stays", c.option.old): len(rows) + i for i, c in enumerate(stays) if c.option is not None}
    limits = np.array([*atlas.resources.limits, *own, *[0] * len(stays)], dtype=np.int64)
    uses, count = [], len(options)
    for candidate in options:
        use: dict[Row, int] = {
            ("row", *row): int(n) for row, n in zip(base, use_of(atlas, candidate.template), strict=True)
        }
        assert candidate.option is not None
        use |= {("replica", candidate.option.old): 1, ("moves",): candidate.option.num_moved(atlas)}
        if candidate in stays:
            use["stays", candidate.option.old] = -1
        uses.append(use)
    for taken in listed.uses:
        use = {("row", *row): int(n) for row, n in zip(base, taken, strict=True)}
        use["moves",] = sum(int(n) for (_, p), n in zip(base, taken, strict=True) if p == 1)
        uses.append(use)
    uses += [{("stays", c.option.old): 1} for c in stays if c.option is not None]
    nets = [net.net(candidate) for candidate in options]
    each = listed.uses[:, [p == 1 for _, p in base]].sum(axis=1)  # GPUs of every sub-fleet
    starts_s = np.array([least_start_s(net.costs, atlas, int(n)) for n in each])
    share = np.array([net.costs.served_share(s) for s in starts_s]) if maximises else np.ones(len(each))
    later = 1.0 + starts_s / net.costs.horizon_s
    sides = [atlas.side_of(c.template.scope, c.template.mix) for c in options]
    links = [net.links(c.template) for c in options]
    still = [np.zeros_like(links_of) for links_of in listed.links[:1]] or [np.zeros((0, 0))]
    columns = Columns(
        rates=np.array([*(r for r, _ in nets), *(share * listed.rates), *(_stay(net, c) for c in stays)]),
        costs=np.array([*(c for _, c in nets), *(later * listed.costs), *[0.0] * len(stays)]),
        uses=_matrix(uses, rows),
        sides=np.array([*sides, *listed.sides, *[UNIFIED] * len(stays)], dtype=np.int64),
        links=np.array([*links, *listed.links, *[still[0]] * len(stays)])
        if count + len(listed.rates)
        else np.zeros((0, 0, 0)),
    )
    master = Master(limits, net.master.demand, atlas.routes)
    return _bound(master, columns, time_limit_s, seed)


def _solve(
    net: NetMaster, rows: dict[Row, int], gathered: _Rows, demand: float | None, time_limit_s: float, seed: int
) -> float:  # fmt: skip
    routes = replace(net.atlas.routes, splits_roles=False)
    count = len(gathered.rates)
    columns = Columns(
        rates=np.array(gathered.rates),
        costs=np.array(gathered.costs),
        uses=_matrix(gathered.uses, rows),
        sides=np.full(count, UNIFIED, dtype=np.int64),
        links=np.zeros((count, 0, 0)),
    )
    return _bound(Master(_limits(net, rows), demand, routes), columns, time_limit_s, seed)


def _bound(master: Master, columns: Columns, time_limit_s: float, seed: int) -> float:
    """HiGHS's bound over whole counts; the relaxation's where it has none in time."""
    relaxed = master.solve_lp(columns)
    if relaxed is None:
        return 0.0 if master.maximises else np.inf
    found = master.solve_milp(columns, time_limit_s=time_limit_s, gap=1e-6, seed=seed)
    if found is None or not np.isfinite(found.bound):
        return relaxed.value
    tightest = min if master.maximises else max
    return float(tightest(found.bound, relaxed.value))


def _matrix(uses: Sequence[dict[Row, int]], rows: dict[Row, int]) -> np.ndarray:
    matrix = np.zeros((len(uses), len(rows)), dtype=np.int64)
    for k, use in enumerate(uses):
        for row, amount in use.items():
            if row in rows:
                matrix[k, rows[row]] = amount
    return matrix
