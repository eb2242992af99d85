"""The exact search, pass by pass: first the families of other strategies, then the whole family.

Three passes over all configurations, each with a narrower tolerance; what `exact.py` proves after one is left out of
the next. The first pass over the whole family takes longest: it knows no bound. The families of `hexgen` and `hexgen2`
take a small part of that, having few ways to build a stage, and are searched to their end before. So a search that is
cut short is not behind what these would have found in their share of the time (`parts.SHARE`), and the first pass
begins with the configurations of their best replicas, which rule out others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.placement.exact import TOLERANCES, ExactSearch, Kind, Rates
from hetis.solver.placement.master import Master, MilpSolution
from hetis.solver.placement.out_of_reach import rate_bound
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.parts import SHARE, Part, contained_parts, whole
from hetis.solver.placement.pool import Pool
from hetis.solver.placement.tables import Atlas, FloatArray


@dataclass(frozen=True, slots=True)
class Packed:
    """A packing of the chosen sub-fleets."""

    chosen: list[tuple[Kind, int]]
    packing: MilpSolution


def solve_exactly(
    atlas: Atlas, master: Master, row_costs: FloatArray, *, budget: Budget, report: Report, seed: int
) -> Outcome | None:
    """Proven optimum of a small fleet; None if the family holds no plan (or the budget ran out before one was found).

    When the budget runs out during a pass, the result carries the bound of the last full pass over the whole family.
    """
    passes = Passes(atlas, master, row_costs, budget, report, seed)
    family = atlas.problem.family
    for part in contained_parts(family, family.roles):
        passes.over(part, budget.share(SHARE))
    passes.over(whole(family), budget)
    return passes.outcome()


class Passes:
    """Passes over one part of a family after another: what is found in one is known in the next."""

    def __init__(
        self, atlas: Atlas, master: Master, row_costs: FloatArray, budget: Budget, report: Report, seed: int
    ) -> None:
        self.search = ExactSearch(atlas, master, row_costs)
        self.whole = whole(atlas.problem.family)
        self.budget, self.report, self.seed = budget, report, seed
        self.best: Packed | None = None
        self.proven = rate_bound(atlas) if master.maximises else 0.0

    def over(self, part: Part, budget: Budget) -> None:
        """Searches a part to its end, or to that of its budget; the bound is that of the whole family only."""
        search, is_whole = self.search, part == self.whole
        needed: Rates = {kind: np.zeros(len(f.rate)) for kind, f in search.frontiers.items()}
        for tolerance in TOLERANCES:
            finished = search.sweep(needed, tolerance, budget, part)
            packing = self._pack(search.rates(part), budget)
            if not finished:
                return
            ceilings = search.ceilings(tolerance, part)
            _, optimistic = search.pack(ceilings, budget.remaining_s(), self.seed)
            if packing is None:
                if optimistic is None:
                    return  # not even the ceilings meet the demand: proved
                continue  # this pass was too coarse to tell
            if is_whole and optimistic is not None:
                outside = max if search.master.maximises else min
                self.proven = outside(packing.value, optimistic.bound)
            self._tell(is_whole)
            needed = search.needed_rates(ceilings, packing.value)

    def _pack(self, rates: Rates, budget: Budget) -> MilpSolution | None:
        """The best packing at these rates, kept if no better one is known; None if none serves anything."""
        chosen, packing = self.search.pack(rates, budget.remaining_s(), self.seed)
        if packing is not None and (self.best is None or not self._is_worse(packing.value, self.best.packing.value)):
            self.best = Packed(chosen, packing)
        return packing

    def _is_worse(self, value: float, than: float) -> bool:
        return value < than if self.search.master.maximises else value > than

    def _tell(self, is_whole: bool) -> None:
        assert self.best is not None, "told after a packing"
        value = self.best.packing.value
        gap = abs(self.proven - value) / max(abs(value), 1e-12)
        self.report(
            Progress(
                phase="sub-fleets" if is_whole else "sub-fleets, without stage copies and attention workers",
                elapsed_s=self.budget.elapsed_s(),
                incumbent=value,
                bound=self.proven if is_whole else None,
                gap=gap if is_whole else None,
            )
        )

    def outcome(self) -> Outcome | None:
        """The best packing as replicas, at their exact rates; None without one."""
        if self.best is None:
            return None
        search, chosen, packing = self.search, self.best.chosen, self.best.packing
        atlas, master = search.atlas, search.master
        picked = [(search.template(*where), int(n)) for where, n in zip(chosen, packing.counts, strict=True) if n]
        pool = Pool(atlas, np.zeros(len(atlas.resources.rows)))
        pool.add([template for template, _ in picked])
        counts = np.zeros(len(pool.templates), dtype=np.int64)
        for template, n in picked:
            counts[pool.place(template)] += n
        columns = pool.columns()
        flows = master.best_flows(columns, counts)
        value = master.served(columns, counts, flows) if master.maximises else packing.value
        duals = search.prices(search.rates())
        used = {where for where, n in zip(chosen, packing.counts, strict=True) if n}
        others = sorted((w for w in chosen if w not in used), key=lambda w: -search.frontiers[w[0]].rate[w[1]])
        rows, sides = len(atlas.resources.rows), atlas.routes.num_sides
        return Outcome(
            chosen=tuple(picked),
            value=value,
            bound=sound_bound(self.proven, value, maximises=master.maximises),
            row_prices=duals.row_prices if duals is not None else np.zeros(rows),
            rate_prices=duals.rate_prices if duals is not None else np.ones(sides),
            flows=flows,
            runners_up=tuple(search.template(*where) for where in others[:5]),
            interrupted=self.budget.cancelled.is_set(),
        )
