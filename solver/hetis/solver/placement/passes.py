"""The exact search, pass by pass; where its time ends before a proof, the families of other strategies, too.

Three passes over all configurations, each with a narrower tolerance; what `exact.py` proves after one is left out of
the next. The first pass over the whole family takes longest: it knows no bound, and there are many ways to build a
stage. If it, or a later one, has not ended after half of the time, the families of `hexgen` and `hexgen2` are searched
to their end, which takes a small part of that, and then the whole family goes on, beginning with the configurations of
the best replicas known. So a search that is cut short is not behind what these strategies would have found in their
share of the time (`MAIN`, `parts.SHARE`), and one that ends in time pays nothing for it: beforehand, the parts took a
fifth of the time of a search that ended.
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

MAIN = 0.5  # of the time: for the whole family, before its parts are searched for want of a proof


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
    everything, contained = whole(family), contained_parts(family, family.roles)
    if not passes.over(everything, budget.share(MAIN) if contained else budget):
        for part in contained:
            passes.over(part, budget.share(SHARE))
        passes.over(everything, budget)
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
        self._done: dict[Part, int] = {}  # passes
        self._needed: dict[Part, Rates] = {}
        self.proven = rate_bound(atlas) if master.maximises else 0.0

    def over(self, part: Part, budget: Budget) -> bool:
        """Searches a part to its end, or to that of its budget (False): the next call goes on with the pass cut.

        The bound is that of the whole family only.
        """
        search, is_whole = self.search, part == self.whole
        for tolerance in TOLERANCES[self._done.get(part, 0) :]:
            finished = search.sweep(self._needed_of(part), tolerance, budget, part)
            packing = self._pack(search.rates(part), budget)
            if not finished:
                return False
            self._done[part] = self._done.get(part, 0) + 1
            ceilings = search.ceilings(tolerance, part)
            _, optimistic = search.pack(ceilings, budget.remaining_s(), self.seed)
            if packing is None:
                if optimistic is None:
                    return True  # not even the ceilings meet the demand: proved
                continue  # this pass was too coarse to tell
            if is_whole and optimistic is not None:
                outside = max if search.master.maximises else min
                self.proven = outside(packing.value, optimistic.bound)
            self._tell(is_whole)
            self._needed[part] = search.needed_rates(ceilings, packing.value)
        return True

    def _needed_of(self, part: Part) -> Rates:
        """What replicas need not be looked for, as far as earlier passes over the part have proved it."""
        nothing = {kind: np.zeros(len(f.rate)) for kind, f in self.search.frontiers.items()}
        return self._needed.get(part, nothing)

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
