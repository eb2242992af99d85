"""The re-planning master: running replicas that continue, new ones added to them, and their worth over the horizon.

A replica that starts does not serve until the start is done: it counts ``1 - start / horizon`` of its rate, or costs
``1 + start / horizon`` of its rent where cost is minimised. A replica that is kept never stops, and the requests in
flight on it need not start again: keeping it is worth its rate and on average half the service of each of these.

    max   sum over kept, reset, repaired, shrunk o of net_o x_o  +  sum over new k of net_k n_k  +  sum over kept of s_r
    s.t.  rows of `inventory.py`, and the flows of prefill and decode replicas at their net rates

It is solved by the master of placement, which does not know where its columns come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.fleet import UNIFIED, IntArray
from hetis.solver.placement.generation import NO_LINKS
from hetis.solver.placement.master import Columns, Master, MilpSolution
from hetis.solver.placement.search import row_costs_of
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.template import Template, use_of, zones_of
from hetis.solver.replanning.change import Fate
from hetis.solver.replanning.inventory import Inventory, Row
from hetis.solver.replanning.problem import ChangeCosts
from hetis.solver.replanning.running import Option, stage_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A column: an option of a running replica, or a new replica if ``option`` is None."""

    template: Template
    option: Option | None = None
    start_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnChoice:
    """Candidates with their counts, the flows at net rates, the net value and the upper bound over the columns seen."""

    chosen: tuple[tuple[Candidate, int], ...]
    value: float
    bound: float


class NetMaster:
    """The master over some options and new templates.

    ``stay_rates`` [running replicas]: requests/s over the horizon that need not be served again if one is kept;
    ``stay_shares``: the same as a share of its own rate.

    Attributes:
        is_settled: the last `choose` finished: if it found nothing, there is nothing.
    """

    def __init__(
        self,
        inventory: Inventory,
        change_costs: ChangeCosts,
        demand: float | None,
        stay_rates: dict[int, float],
        stay_shares: dict[int, float],
    ) -> None:
        self.inventory, self.change_costs, self.costs = inventory, change_costs, inventory.costs
        self.stay_rates, self.stay_shares = stay_rates, stay_shares
        self.master = Master(inventory.limits, demand, self.costs.routes)
        self.row_costs = row_costs_of(self.costs)
        self.is_settled = False

    def start_s(self, template: Template) -> float:
        """Return the start time of a new replica: all its GPUs read their weights."""
        return self.change_costs.start_s(max(stage_bytes(self.costs, template)))

    def net(self, candidate: Candidate) -> tuple[float, float]:
        """Return (rate, cost) as the master counts them."""
        template, cost = candidate.template, float(self.row_costs @ use_of(self.costs, candidate.template))
        option = candidate.option
        if self.master.maximises:
            return template.rate * self.change_costs.served_share(candidate.start_s), 0.0
        if option is not None and option.fate is Fate.KEPT:
            return template.rate, cost * (1.0 - self.stay_shares.get(option.old, 0.0))
        return template.rate, cost * (1.0 + candidate.start_s / self.change_costs.horizon_s)

    def choose(
        self, candidates: Sequence[Candidate], *, time_limit_s: float, gap: float, seed: int, penalty: float = 0.0
    ) -> ColumnChoice | None:
        """Return the best whole counts of these candidates; None if none was found (`is_settled`).

        ``penalty``: subtracted per GPU that moves, so that of equally good plans the one with the fewest is chosen.
        """
        uses: list[dict[Row, int]] = []
        rates, costs, sides, links = list[float](), list[float](), list[int](), list[FloatArray]()
        for candidate in candidates:
            use = (
                self.inventory.of_option(candidate.option)
                if candidate.option is not None
                else self.inventory.of_template(candidate.template)
            )
            moved = self._moved(candidate)
            rate, cost = self.net(candidate)
            if candidate.option is not None and ("stays", candidate.option.old) in self.inventory.rows:
                use = {**use, ("stays", candidate.option.old): -int(candidate.option.fate is Fate.KEPT)}
            uses.append(use)
            unified = self._side(candidate.template) == UNIFIED
            rates.append(max(0.0, rate - penalty * moved) if self.master.maximises and unified else rate)
            costs.append(cost + (0.0 if self.master.maximises else penalty * moved))
            sides.append(self._side(candidate.template))
            links.append(self.links(candidate.template))
        for use, rate in self._helpers():
            uses.append(use)
            rates.append(rate)
            costs.append(0.0)
            sides.append(UNIFIED)
            links.append(np.zeros_like(self.costs.routes.capacity) if self.costs.routes.has_links else NO_LINKS)
        columns = Columns(
            rates=np.array(rates),
            costs=np.array(costs),
            uses=self.inventory.matrix(uses),
            sides=np.array(sides, dtype=np.int64),
            links=np.array(links),
        )
        found, self.is_settled = self.master.attempt(columns, time_limit_s=time_limit_s, gap=gap, seed=seed)
        return None if found is None else self._choice(candidates, found)

    def _moved(self, candidate: Candidate) -> int:
        if candidate.option is not None:
            return candidate.option.num_moved(self.costs)
        return sum(size for row, size in self.inventory.of_template(candidate.template).items() if row[0] == "gpus")

    def _helpers(self) -> list[tuple[dict[Row, int], float]]:
        """Return columns that are no replicas: room in shared nodes, and what staying is worth."""
        found: list[tuple[dict[Row, int], float]] = [(use, 0.0) for use in self.inventory.floors()]
        if self.master.maximises:
            found += [
                ({("stays", old): 1}, rate)
                for old, rate in self.stay_rates.items()
                if ("stays", old) in self.inventory.rows
            ]
        return found

    def _side(self, template: Template) -> int:
        return self.costs.side_of(template.scope, template.mix)

    def links(self, template: Template) -> FloatArray:
        """Return the use of the links between zones by a replica that spans several of them."""
        routes = self.costs.routes
        return routes.link_use(zones_of(self.costs, template)) if routes.has_links else NO_LINKS

    def _choice(self, candidates: Sequence[Candidate], found: MilpSolution) -> ColumnChoice:
        chosen = tuple((candidate, int(n)) for candidate, n in zip(candidates, found.counts, strict=False) if n)
        return ColumnChoice(chosen=chosen, value=found.value, bound=found.bound)

    def value_of(self, chosen: Sequence[tuple[Candidate, int]]) -> float:
        """Return the worth of a choice, without penalties: net requests/s, or USD/h or GPUs."""
        kept = [c.option.old for c, _ in chosen if c.option is not None and c.option.fate is Fate.KEPT]
        if not self.master.maximises:
            return sum(n * self.net(c)[1] for c, n in chosen)
        return self._served(chosen, net=True) + sum(self.stay_rates.get(old, 0.0) for old in kept)

    def rate_of(self, chosen: Sequence[tuple[Candidate, int]]) -> float:
        """Return requests/s once all replicas run."""
        return self._served(chosen, net=False)

    def rent_of(self, chosen: Sequence[tuple[Candidate, int]]) -> float:
        """Return the minimised quantity once all replicas run."""
        return sum(n * float(self.row_costs @ use_of(self.costs, c.template)) for c, n in chosen)

    def flows_of(self, chosen: Sequence[tuple[Candidate, int]]) -> FloatArray:
        """Return the flows between prefill and decode replicas once all run, [Z, Z]."""
        columns, counts = self._columns_of(chosen, net=False)
        return self.master.best_flows(columns, counts)

    def _served(self, chosen: Sequence[tuple[Candidate, int]], *, net: bool) -> float:
        if not chosen:
            return 0.0
        columns, counts = self._columns_of(chosen, net=net)
        return self.master.served(columns, counts, self.master.best_flows(columns, counts))

    def _columns_of(self, chosen: Sequence[tuple[Candidate, int]], *, net: bool) -> tuple[Columns, IntArray]:
        columns = Columns(
            rates=np.array([self.net(c)[0] if net else c.template.rate for c, _ in chosen]),
            costs=np.zeros(len(chosen)),
            uses=np.zeros((len(chosen), len(self.inventory.limits)), dtype=np.int64),
            sides=np.array([self._side(c.template) for c, _ in chosen], dtype=np.int64),
            links=np.array([self.links(c.template) for c, _ in chosen]),
        )
        return columns, np.array([n for _, n in chosen], dtype=np.int64)


def least_start_s(change_costs: ChangeCosts, costs: CostTables, num_gpus: int) -> float:
    """Return the least time until a new replica serves, its layers being spread over at most ``num_gpus`` GPUs."""
    model = costs.problem.model
    params = (model.num_layers - model.prefix_layers) * model.layer_params()
    params += model.prefix_layers * model.dense_layer_params()
    each = min(variant.weight_bytes for variant in costs.problem.models())
    return change_costs.start_s(params * each / max(1, num_gpus))
