"""The re-planning master: running replicas that continue, new ones added to them, and their worth over the horizon.

A replica that starts does not serve until the start is done: it counts ``1 - start / horizon`` of its rate, or costs
``1 + start / horizon`` of its rent where cost is minimised. A replica that is kept never stops, and its requests in
flight need not start again: keeping it is worth its rate and, on average, half the service of each of them.

    max   sum over kept, reset, repaired, shrunk o of net_o x_o + sum over new k of net_k n_k + sum over kept of s_r
    s.t.  rows of `InventoryRows`, and the flows of prefill and decode replicas at their net rates

It is solved by the master of placement, which does not depend on where its columns come from.

Replicas that continue have their GPUs already, by name; new ones take the remaining GPUs. How much room these give to
TP groups depends on the nodes that hold the named GPUs. Sizes are powers of two, so that groups fit exactly if, for
every class g and size p,

    sum over groups of size q >= p of q n_q  <=  p sum over nodes floor(free GPUs / p)

A node in which only one running replica has GPUs adds the room that this replica leaves to the option's column; a
node shared by several has a whole variable per p for ``floor(free / p)``. The rows:

    groups of 1     GPUs of every class, counted
    groups of p     the row above, of every class and size
    shared nodes    p floor + named GPUs <= size
    replicas        at most one option of each
    stays           the worth of staying (KV that is not dropped) only comes with the option that is kept
    moves           GPUs whose holding changes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hetis.solver.placement.columns import Columns
from hetis.solver.placement.constraint_rows import class_rows
from hetis.solver.placement.fleet import UNIFIED, IntArray, Routes
from hetis.solver.placement.master import Master, row_costs_of
from hetis.solver.placement.replicas.tables import CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template, use_of
from hetis.solver.plan import Role
from hetis.solver.replanning.change import ChangeCosts, Fate
from hetis.solver.replanning.running import Candidate, Place, stage_bytes

Slot = tuple[str, int]  # (node, class): the GPUs of one class in one node
Row = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class InventoryRows:
    """Rows with their limits, and the data that every column shares."""

    costs: CostTables
    places: Mapping[str, Place]
    rows: Mapping[Row, int]  # number of each row
    limits: IntArray  # [rows]
    sizes: tuple[int, ...]  # sizes of TP groups above 1
    shared: frozenset[Slot] = field(default_factory=frozenset)

    def of(self, candidate: Candidate) -> dict[Row, int]:
        """Return the amounts that a replica takes: those of its GPUs by name, and of the others by their classes."""
        use = Counter[Row]()
        for g, size in candidate.missing(self.costs):
            use["gpus", g] += size
            for p in self._sizes_of(g):
                if size >= p:
                    use["groups", g, p] += size
            use["moves",] += size
        for slot, count in _by_slot(candidate.named(), self.places).items():
            g, node_size = slot[1], self.costs.classes[slot[1]].gpus_per_node
            use["gpus", g] += count
            for p in self._sizes_of(g):
                if slot in self.shared:
                    use["node", slot, p] += count
                else:
                    use["groups", g, p] += p * (node_size // p - (node_size - count) // p)
        if candidate.old is not None:
            use["replica", candidate.old] = 1
        return dict(use)

    def floors(self) -> list[dict[Row, int]]:
        """Return the whole variables of shared nodes."""
        return [
            {("groups", g, p): -p, ("node", (node, g), p): p}
            for node, g in sorted(self.shared)
            for p in self._sizes_of(g)
        ]

    def _sizes_of(self, device_class: int) -> list[int]:
        return [p for p in self.sizes if p <= self.costs.classes[device_class].gpus_per_node]


def inventory_of(
    costs: CostTables, places: Mapping[str, Place], options: Sequence[Candidate], stays: Iterable[int],
    max_moves: int | None,
) -> InventoryRows:  # fmt: skip
    """Return the rows for these options; ``stays`` are the running replicas for which staying has a value."""
    owners: dict[Slot, set[int]] = {}
    for option in options:
        for slot in _by_slot(option.named(), places):
            owners.setdefault(slot, set()).add(option.running)
    shared = frozenset(slot for slot, olds in owners.items() if len(olds) > 1)
    sizes = tuple(size for size in sorted(costs.problem.family.tp_sizes) if size > 1)
    limits: dict[Row, int] = {}
    for g, c in enumerate(costs.classes):
        limits["gpus", g] = c.available
        for p in (size for size in sizes if size <= c.gpus_per_node):
            alone = c.num_nodes - sum(1 for _, of_class in shared if of_class == g)
            limits["groups", g, p] = alone * p * (c.gpus_per_node // p)
            for slot in (slot for slot in shared if slot[1] == g):
                limits["node", slot, p] = c.gpus_per_node
    limits |= {("replica", old): 1 for old in sorted({option.running for option in options})}
    limits |= {("stays", old): 0 for old in stays}
    if max_moves is not None:
        limits["moves",] = max_moves
    rows = {row: number for number, row in enumerate(limits)}
    return InventoryRows(costs, places, rows, np.array(list(limits.values()), dtype=np.int64), sizes, shared)


def _by_slot(devices: Iterable[str], places: Mapping[str, Place]) -> Counter[Slot]:
    return Counter((places[device].node, places[device].device_class) for device in devices)


# --- columns


@dataclass(slots=True)
class ColumnList:
    """The columns of a master, collected one by one: amounts by row; rows that are not in ``rows`` do not count."""

    rows: Mapping[Row, int]  # number of each row
    routes: Routes
    uses: list[Mapping[Row, int]] = field(default_factory=list)
    numbers: list[tuple[float, float, int]] = field(default_factory=list)

    def add(self, use: Mapping[Row, int], rate: float, cost: float = 0.0, side: int = UNIFIED) -> None:
        self.uses.append(use)
        self.numbers.append((rate, cost, side))

    def columns(self) -> Columns:
        uses = np.zeros((len(self.uses), len(self.rows)), dtype=np.int64)
        for k, use in enumerate(self.uses):
            for row, amount in use.items():
                if row in self.rows:
                    uses[k, self.rows[row]] = amount
        rates, costs, sides = zip(*self.numbers, strict=True)
        return Columns(np.array(rates), np.array(costs), uses, np.array(sides, dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramLimits:
    """When a mixed program ends: at its gap or after ``nodes`` of the search tree; the clock only guards."""

    gap: float
    nodes: int
    time_limit_s: float
    seed: int
    stop: Callable[[], bool] | None = None


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
        is_settled: whether the last `choose` finished: if it found nothing, nothing exists.
    """

    def __init__(
        self, inventory: InventoryRows, change_costs: ChangeCosts, demand: float | None, stay_rates: dict[int, float],
        stay_shares: dict[int, float],
    ) -> None:  # fmt: skip
        self.inventory, self.change_costs, self.costs = inventory, change_costs, inventory.costs
        self.stay_rates, self.stay_shares = stay_rates, stay_shares
        self.master = Master(inventory.limits, demand, self.costs.routes, classes=class_rows(self.costs))
        self.row_costs = row_costs_of(self.costs)
        self.is_settled = False

    def start_s(self, template: Template) -> float:
        """Return the time that a new replica takes to start, in which all its GPUs read their weights."""
        return self.change_costs.start_s(max(stage_bytes(self.costs, template)))

    def least_start_s(self, num_gpus: int | None = None) -> float:
        """Return the least time until a new replica serves, its layers being spread over so many GPUs, or all."""
        num_gpus = sum(c.available for c in self.costs.classes) if num_gpus is None else num_gpus
        model = self.costs.problem.model
        params = (model.num_layers - model.prefix_layers) * model.layer_params()
        params += model.prefix_layers * model.dense_layer_params()
        each = min(variant.weight_bytes for variant in self.costs.problem.models())
        return self.change_costs.start_s(params * each / max(1, num_gpus))

    def net(self, candidate: Candidate) -> tuple[float, float]:
        """Return (rate, cost) as the master counts them."""
        template, cost = candidate.template, float(self.row_costs @ use_of(self.costs, candidate.template))
        if self.master.maximises:
            return template.rate * self.change_costs.served_share(candidate.start_s), 0.0
        if candidate.fate is Fate.KEPT:
            return template.rate, cost * (1.0 - self.stay_shares.get(candidate.running, 0.0))
        return template.rate, cost * (1.0 + candidate.start_s / self.change_costs.horizon_s)

    def choose(
        self, candidates: Sequence[Candidate], limits: ProgramLimits, penalty: float = 0.0
    ) -> ColumnChoice | None:
        """Return the best whole counts of these candidates; None if none was found (`is_settled`).

        ``penalty`` is subtracted per GPU that moves, so that of equally good plans one with the fewest moves is chosen.
        """
        listed = ColumnList(self.inventory.rows, self.costs.routes)
        for candidate in candidates:
            side, (rate, cost) = self._side(candidate.template), self.net(candidate)
            use, moved = self.inventory.of(candidate), candidate.num_moved(self.costs)
            if candidate.fate is Fate.KEPT:
                use["stays", candidate.old] = -1
            if not self.master.maximises:
                cost += penalty * moved
            elif self.costs.mixes[candidate.template.mix].role is Role.UNIFIED:
                rate = max(0.0, rate - penalty * moved)
            listed.add(use, rate, cost, side)
        for use in self.inventory.floors():  # room in shared nodes
            listed.add(use, 0.0)
        for old, rate in self.stay_rates.items() if self.master.maximises else ():  # the worth of staying
            if ("stays", old) in self.inventory.rows:
                listed.add({("stays", old): 1}, rate)
        found, self.is_settled = self.master.solve_milp(
            listed.columns(), nodes=limits.nodes, time_limit_s=limits.time_limit_s, gap=limits.gap, seed=limits.seed
        )  # fmt: skip
        if found is None:
            return None
        chosen = tuple((candidate, int(n)) for candidate, n in zip(candidates, found.counts, strict=False) if n)
        return ColumnChoice(chosen=chosen, value=found.value, bound=found.bound)

    def share_of(self, template: Template) -> float:
        """Return the share of all requests that the classes of its range have."""
        rows = self.master.classes
        return 1.0 if rows is None else 1.0 / float(rows.covers[self.costs.scopes[template.scope].number].max())

    def _side(self, template: Template) -> int:
        return self.costs.side_of(template.scope, template.mix)

    def value_of(self, chosen: Sequence[tuple[Candidate, int]]) -> float:
        """Return the worth of a choice, without penalties: net requests/s, or USD/h or GPUs."""
        kept = [c.running for c, _ in chosen if c.fate is Fate.KEPT]
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
        )
        return columns, np.array([n for _, n in chosen], dtype=np.int64)
