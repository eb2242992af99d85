"""The exact search in passes over the whole family and, if time ends before a proof, over smaller families inside it.

Three passes go over all configurations, each with a narrower tolerance; what `exact.py` proves in one is left out of
the next. The first pass over the whole family takes longest, because it knows no bound and there are many ways to build
a stage. If a pass has not ended after a share of the time (`MAIN`), the smaller families inside are searched, which is
cheap in comparison. The search of the whole family then resumes where it stopped and uses what they found. A search
that ends early therefore pays nothing for the smaller families, no work is lost, and a search that is cut short is at
least as good as what these families offered within their time (`parts.INSIDE`).

Only HiGHS's own verdict that nothing can be chosen proves that no plan exists. A packing that HiGHS's time limit cut
short is solved again when there is more time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.exact import TOLERANCES, ExactSearch, Kind, Rates, Sweep
from hetis.solver.placement.generation import LEAST_MILP_SECONDS, MILP_SECONDS
from hetis.solver.placement.master import UNDECIDED, Master, MilpSolution, Verdict
from hetis.solver.placement.out_of_reach import rate_bound
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.parts import Part, parts_inside, whole
from hetis.solver.placement.pool import Pool
from hetis.solver.placement.tables import CostTables, FloatArray

MAIN = 0.25  # share of the time for the whole family before its parts are searched
MOMENT = 1e-9  # seconds: avoids a division by zero, since a budget may end between two reads of it


@dataclass(frozen=True, slots=True)
class Packed:
    """A packing of the chosen sub-fleets."""

    chosen: list[tuple[Kind, int]]
    packing: MilpSolution


def solve_exactly(
    costs: CostTables, master: Master, row_costs: FloatArray, *, budget: Budget, report: Report, seed: int
) -> Outcome | None:
    """Return the proven optimum of a small fleet, or None if the family is empty or the budget ran out before a plan.

    If the budget runs out during a pass, the result carries the bound of the last full pass over the whole family.

    Raises:
        NoPlanFoundError: HiGHS, which has a clock of its own, stopped before it found a plan or proved there is none.
    """
    passes = Passes(costs, master, row_costs, budget, report, seed)
    family = costs.problem.family
    everything, inside = whole(family), parts_inside(family)
    if not passes.over(everything, budget.share(MAIN) if inside else budget):
        rest_s = budget.remaining_s()
        for part, share in inside:
            if not budget.is_spent():
                passes.over(part, budget.share(min(1.0, share * rest_s / max(budget.remaining_s(), MOMENT))))
        if not budget.is_spent():
            passes.over(everything, budget)
    outcome = passes.outcome()
    if outcome is None and not passes.is_empty and not budget.is_spent():
        raise NoPlanFoundError(UNDECIDED)
    return outcome


@dataclass(slots=True)
class Progression:
    """The progress of the passes over a part: ``num_done`` are finished and ``sweep`` is under way."""

    sweep: Sweep
    num_done: int = 0


class Passes:
    """Passes over the parts of a family, each of which starts from what the others found."""

    def __init__(
        self, costs: CostTables, master: Master, row_costs: FloatArray, budget: Budget, report: Report, seed: int
    ) -> None:
        self.search = ExactSearch(costs, master, row_costs)
        self.whole = whole(costs.problem.family)
        self.budget, self.report, self.seed = budget, report, seed
        self.best: Packed | None = None
        self.is_empty = False  # proven: the whole family holds no plan
        self._begun: dict[Part, Progression] = {}
        self._is_packed = True  # all rates found so far have been packed
        self.proven = rate_bound(costs) if master.maximises else 0.0

    def over(self, part: Part, budget: Budget) -> bool:
        """Search a part and return whether it was finished within its budget; the next call resumes where this stopped.

        Only passes over the whole family improve the bound.
        """
        begun = self._progression(part)
        while begun.num_done < len(TOLERANCES):
            if budget.is_spent():
                return False
            self._is_packed = False
            if not self.search.go_on(begun.sweep, budget) or not self._conclude(begun, budget):
                return False
        return True

    def _progression(self, part: Part) -> Progression:
        if part not in self._begun:
            nothing = {kind: np.zeros(len(f.rate)) for kind, f in self.search.frontiers.items()}
            self._begun[part] = Progression(self.search.begin(nothing, TOLERANCES[0], part))
        return self._begun[part]

    def _conclude(self, begun: Progression, budget: Budget) -> bool:
        """Pack the replicas that a pass found and its upper bounds on them; return False if that was cut short."""
        search, sweep = self.search, begun.sweep
        is_whole = sweep.part == self.whole
        packing = self._pack(search.rates(sweep.part), budget.remaining_s())
        if budget.is_spent():
            return False
        ceilings = search.ceilings(sweep.tolerance, sweep.part)
        _, above = search.pack(ceilings, budget.remaining_s(), self.seed)
        if is_whole and above.found is not None and packing.found is not None:
            self._improve_bound(above.found.bound)
        is_finest = sweep.tolerance == TOLERANCES[-1]
        # In the finest pass the ceilings exceed the rates by rounding only, so its packing proves emptiness as well.
        if above.proves_none or (is_finest and packing.proves_none):
            self.is_empty = self.is_empty or is_whole
            begun.num_done = len(TOLERANCES)
            return True
        if not (packing.is_settled and above.is_settled) and (is_finest or budget.is_spent()):
            return False  # repeated when there is more time: HiGHS has a clock of its own
        begun.num_done += 1
        needed = sweep.needed
        if packing.found is not None:
            self._tell(sweep.part)
            if self.budget.is_spent():
                return False  # the report may have cancelled the search
            needed = search.needed_rates(ceilings, self._best_value())
        if not is_finest:
            begun.sweep = search.begin(needed, TOLERANCES[begun.num_done], sweep.part)
        return True

    def _improve_bound(self, bound: float) -> None:
        inner, outer = (min, max) if self.search.master.maximises else (max, min)
        self.proven = outer(self._best_value(), inner(self.proven, bound))

    def _best_value(self) -> float:
        assert self.best is not None, "asked after a packing"
        return self.best.packing.value

    def _pack(self, rates: Rates, time_limit_s: float) -> Verdict:
        """Return the best packing at these rates, and keep it unless a better one is known."""
        chosen, packing = self.search.pack(rates, time_limit_s, self.seed)
        found = packing.found
        if found is not None and (self.best is None or not self._is_worse(found.value, self.best.packing.value)):
            self.best = Packed(chosen, found)
        self._is_packed = packing.is_settled and len(rates) == len(self.search.frontiers)
        return packing

    def _is_worse(self, value: float, than: float) -> bool:
        return value < than if self.search.master.maximises else value > than

    def _tell(self, part: Part) -> None:
        value, is_whole = self._best_value(), part == self.whole
        gap = abs(self.proven - value) / max(abs(value), 1e-12)
        self.report(
            Progress(
                phase="sub-fleets" if is_whole else f"sub-fleets, {part.describe(self.whole)}",
                elapsed_s=self.budget.elapsed_s(),
                incumbent=value,
                bound=self.proven if is_whole else None,
                gap=gap if is_whole else None,
            )
        )

    def outcome(self) -> Outcome | None:
        """Return the best packing as replicas at their exact rates, or None without one."""
        if not self._is_packed:  # a pass was cut short: its finds count even if the budget is spent
            seconds = max(LEAST_MILP_SECONDS, min(MILP_SECONDS, self.budget.remaining_s()))
            self._pack(self.search.rates(), seconds)
        if self.best is None:
            return None
        search, chosen, packing = self.search, self.best.chosen, self.best.packing
        costs, master = search.costs, search.master
        picked = [(search.template(*where), int(n)) for where, n in zip(chosen, packing.counts, strict=True) if n]
        pool = Pool(costs, np.zeros(len(costs.resources.rows)))
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
        rows, sides = len(costs.resources.rows), costs.routes.num_sides
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
