"""The rows of the re-planning master: GPUs by class, room for TP groups in nodes, running replicas, moves.

Replicas that continue have their GPUs already, by name; new ones take the remaining GPUs. How much room these give to
TP groups depends on the nodes that hold the named GPUs. Sizes are powers of two, so that groups fit exactly if, for
every class g and size p,

    sum over groups of size q >= p of q n_q  <=  p sum over nodes floor(free GPUs / p)

A node in which only one running replica has GPUs adds the room that this replica leaves to the option's column; a
node shared by several has a whole variable per p for ``floor(free / p)``. Columns (see `master.py` of placement):

    groups of 1     GPUs of every class, counted
    groups of p     the row above, of every class and size
    shared nodes    p floor + named GPUs <= size
    replicas        at most one option of each
    stays           the worth of staying (KV that is not dropped) only comes with the option that is kept
    moves           GPUs whose holding changes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.tables import CostTables
from hetis.solver.placement.template import Template
from hetis.solver.replanning.running import Option, Place

Slot = tuple[str, int]  # the GPUs of one class in one node
Row = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """Rows with their limits, and the data that every column shares."""

    costs: CostTables
    places: Mapping[str, Place]
    rows: Mapping[Row, int]  # row -> its number
    limits: IntArray  # [rows]
    sizes: tuple[int, ...]  # of TP groups, above 1
    shared: frozenset[Slot] = field(default_factory=frozenset)

    def of_template(self, template: Template, count_moves: bool = True) -> dict[Row, int]:
        """Return the amounts that a new replica takes."""
        parts = [self.costs.ranks[s.rank] for s in template.stages for _ in range(s.copies)]
        parts += [
            (s.pool_class, 1) for s in template.stages if s.pool_class >= 0 for _ in range(s.copies * s.pool_cards)
        ]
        return self._of_parts(parts, count_moves)

    def of_option(self, option: Option) -> dict[Row, int]:
        """Return the amounts taken by a running replica that continues: its own GPUs by name, others like a new one."""
        use = Counter(self._of_parts(option.missing(self.costs), True))
        for slot, count in _by_slot(option.named(), self.places).items():
            _, g = slot
            use["gpus", g] += count
            node_size = self.costs.classes[g].gpus_per_node
            for p in self._sizes_of(g):
                if slot in self.shared:
                    use["node", slot, p] += count
                else:
                    use["groups", g, p] += p * (node_size // p - (node_size - count) // p)
        use["replica", option.old] += 1
        return dict(use)

    def floors(self) -> list[dict[Row, int]]:
        """Return the whole variables of shared nodes."""
        return [
            {("groups", g, p): -p, ("node", (node, g), p): p}
            for node, g in sorted(self.shared)
            for p in self._sizes_of(g)
        ]

    def matrix(self, uses: Sequence[Mapping[Row, int]]) -> IntArray:
        """Return columns as the master takes them, shape [columns, rows]."""
        matrix = np.zeros((len(uses), len(self.limits)), dtype=np.int64)
        for k, use in enumerate(uses):
            for row, amount in use.items():
                if row in self.rows:
                    matrix[k, self.rows[row]] = amount
        return matrix

    def _of_parts(self, parts: Iterable[tuple[int, int]], count_moves: bool) -> dict[Row, int]:
        use: Counter[Row] = Counter()
        for g, size in parts:
            use["gpus", g] += size
            for p in self._sizes_of(g):
                if size >= p:
                    use["groups", g, p] += size
            if count_moves:
                use["moves",] += size
        return dict(use)

    def _sizes_of(self, device_class: int) -> list[int]:
        return [p for p in self.sizes if p <= self.costs.classes[device_class].gpus_per_node]


def inventory_of(
    costs: CostTables,
    places: Mapping[str, Place],
    options: Sequence[Option],
    stays: Iterable[int],
    max_moves: int | None,
) -> Inventory:
    """Return the rows for these options; ``stays`` are the running replicas for which staying is worth something."""
    owners: dict[Slot, set[int]] = {}
    for option in options:
        for slot in _by_slot(option.named(), places):
            owners.setdefault(slot, set()).add(option.old)
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
    limits |= {("replica", old): 1 for old in sorted({option.old for option in options})}
    limits |= {("stays", old): 0 for old in stays}
    if max_moves is not None:
        limits["moves",] = max_moves
    rows = {row: number for number, row in enumerate(limits)}
    return Inventory(costs, places, rows, np.array(list(limits.values()), dtype=np.int64), sizes, shared)


def _by_slot(devices: Iterable[str], places: Mapping[str, Place]) -> Counter[Slot]:
    return Counter((places[device].node, places[device].device_class) for device in devices)
