"""The columns seen so far, the prices of a bound, and the floor under prices that keeps pricing finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hetis.solver.placement.classes import IntArray, Resources
from hetis.solver.placement.master import Columns
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.template import Template, use_of, zones_of

PRICE_FLOOR = 1e-5  # share of a row unit's mean price: with a free row a replica could be infinitely good
NO_LINKS = np.zeros((0, 0))  # if no links between zones carry KV


@dataclass(slots=True)
class Pool:
    """The columns seen so far, without repetition."""

    costs: CostTables
    row_costs: FloatArray
    templates: list[Template] = field(default_factory=list)
    uses: list[IntArray] = field(default_factory=list)
    links: list[FloatArray] = field(default_factory=list)
    _place: dict[tuple[object, ...], int] = field(default_factory=dict)
    _built: Columns | None = None  # of all templates; None if templates were added since

    def add(self, templates: Sequence[Template]) -> int:
        """Add new templates that fit in the fleet; return how many were new."""
        before = len(self.templates)
        routes = self.costs.routes
        for template in templates:
            use = use_of(self.costs, template)
            if template.shape not in self._place and np.all(use <= self.costs.resources.limits):
                self._place[template.shape] = len(self.templates)
                self.templates.append(template)
                self.uses.append(use)
                self.links.append(routes.link_use(zones_of(self.costs, template)) if routes.has_links else NO_LINKS)
        if len(self.templates) > before:
            self._built = None
        return len(self.templates) - before

    def columns(self, rate_cap: float = np.inf) -> Columns:
        """Return all templates as columns, with rates counted only up to ``rate_cap``."""
        if self._built is None:
            self._built = self._columns()
        return replace(self._built, rates=np.minimum(self._built.rates, rate_cap))

    def _columns(self) -> Columns:
        uses = np.array(self.uses, dtype=np.int64).reshape(len(self.uses), -1)
        return Columns(
            rates=np.array([t.rate for t in self.templates]),
            costs=uses @ self.row_costs,
            uses=uses,
            sides=np.array([self.costs.side_of(t.scope, t.mix) for t in self.templates], dtype=np.int64),
            links=np.array(self.links),
        )

    def place(self, template: Template) -> int:
        """Return the number of a template that was added."""
        return self._place[template.shape]

    def counts_from(self, other: Pool, counts: IntArray) -> IntArray:
        """Return counts of another pool's templates, all of which are in this pool, in this pool's order."""
        mine = np.zeros(len(self.templates), dtype=np.int64)
        for template, count in zip(other.templates, counts, strict=False):
            mine[self.place(template)] += count
        return mine


@dataclass(slots=True)
class Bound:
    """The best bound so far and the prices that gave it, scaled to be dual feasible."""

    value: float
    row_prices: FloatArray
    link_prices: FloatArray
    rate_prices: FloatArray


def lifted(prices: FloatArray, resources: Resources, total: float) -> FloatArray:
    """Return row prices with a floor for GPU rows; ``total`` is the worth of the whole inventory; [rows]."""
    gpus = resources.counts_gpus
    return np.maximum(prices, PRICE_FLOOR * total / max(1.0, float(gpus @ resources.limits)) * gpus)


def first_prices(costs: CostTables) -> FloatArray:
    """Return initial row prices, at which a GPU is worth about its memory bandwidth; [rows]."""
    types, rows = costs.problem.cluster.gpu_types, costs.resources.rows
    worth = np.array([types[costs.classes[g].gpu].mem_bytes_per_s for g, _ in rows])
    return np.asarray(worth / worth.max() * costs.resources.counts_gpus)
