"""The best plan of an engine's family: relaxation, reduced-cost fixing and whole counts, with the bound that proves it.

K replicas of the family, of which only those that matter are ever known (`enumeration.py`); the master's letters:

1. *Relaxation.* The master's LP over some columns gives prices: y_r of every row, pi_z of a request/s on every side.
   Replica k would improve it only if ``pi rate_k > cost_k + sum_r y_r use_kr``. Such replicas join until there is none
   in the whole family; then the LP's value bounds every plan. A replica may be worth up to ``1 + RELAXATION_TOLERANCE``
   times its GPUs when this ends; prices raised by that ratio are dual feasible, and prove a bound wider by as much.
2. *Reduced-cost fixing.* ``d_k = cost_k + sum_r y_r use_kr - pi rate_k >= 0`` is what any plan with replica k loses
   against the bound. So no plan better than the incumbent contains a replica with d_k above the distance between the
   bound and the incumbent, and none of these is evaluated.
3. *Whole counts.* HiGHS chooses among all other replicas; its bound on them is a bound on the whole family.

Where that would be too many replicas, whole counts of the likeliest (least d_k) are improved instead, and the
relaxation's bound is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.budget import SearchSettings
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.columns import Bound, padded
from hetis.solver.placement.enumeration import ColumnPrices, EnumeratedColumns
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.losses.loss_rows import Within
from hetis.solver.placement.losses.simplicity import simplest
from hetis.solver.placement.master import UNDECIDED, LpSolution, Master, MilpSolution, settled
from hetis.solver.placement.nodes import NodeProgram, counts_of_kinds
from hetis.solver.placement.outcome import ANY, Beyond, Outcome, rate_bound, relative_gap, sound_bound
from hetis.solver.placement.policy import POLICY, RELAXATION_TOLERANCE, Attempt
from hetis.solver.placement.replicas.tables import BoolArray, CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template


def search_enumerated(
    costs: CostTables, master: Master, settings: SearchSettings, beyond: Beyond = ANY
) -> Outcome | None:
    """Return the best plan of an engine's family with a bound, or None if it has none ``beyond`` what is known.

    Raises:
        InvalidProblemError: the family is too large to enumerate, or the model may not be cut everywhere.
        NoPlanFoundError: no plan was found in time, nor proved impossible.
    """
    return _Search(costs, master, settings).run(beyond)


def simplest_enumerated(costs: CostTables, master: Master, settings: SearchSettings, value: float) -> Outcome | None:
    """Return the simplest plan of an engine's family of at least (if cost is minimised, at most) this value.

    None: none was found. See `simplicity.py`.
    """
    return _Search(costs, master, settings).simplest(value)


def bound_enumerated(costs: CostTables, master: Master, settings: SearchSettings) -> float:
    """Return a bound on every plan of an engine's family, by fractions of replicas alone; raises as above."""
    return _Search(costs, master, settings).relaxed_bound()


@dataclass(frozen=True, slots=True)
class Explored:
    """What a search knows besides its plan: replicas that are likely in good plans, and the proof of its bound.

    ``prices`` are dual feasible: no replica of the family is worth more than its GPUs. They are None if they were not
    found in time.
    """

    templates: tuple[Template, ...]
    value: float | None
    prices: Bound | None
    is_empty: bool


def explore_enumerated(costs: CostTables, master: Master, settings: SearchSettings) -> Explored:
    """Return replicas to choose from for a running fleet, with prices; raises as `search_enumerated`."""
    return _Search(costs, master, settings).explored()


class _Search:
    """One search of an engine's family."""

    def __init__(self, costs: CostTables, master: Master, settings: SearchSettings) -> None:
        if costs.problem.model.forbidden_cuts:
            raise InvalidProblemError(
                f"{costs.problem.model.name} has forbidden cuts, which only strategy uniform and published heuristics "
                "know"
            )
        self.costs, self.master, self.settings = costs, master, settings
        self.budget, self.gap_target, self.seed = settings.budget, settings.gap_target, settings.seed
        self.policy = POLICY
        self.enumerated = EnumeratedColumns(costs, master.row_costs, master.pins)
        self.bound = rate_bound(costs) if master.maximises else 0.0  # from dense work alone, until more is known
        self.is_complete = False  # whether the bound is that of the relaxation over the whole family
        self.is_impossible = False  # whether it is proved that no whole counts of the family's replicas meet the demand
        self.incumbent: MilpSolution | None = None
        self.relaxed: LpSolution | None = None

    def run(self, beyond: Beyond) -> Outcome | None:
        """Return the best plan; None: there is none, or none beyond what is known."""
        engine = self.costs.problem.family.engine
        self._relax(chooses=not beyond.rate)
        if beyond.rate:
            if self.is_complete and (self.bound <= beyond.rate or beyond.adds_workers > self._uses_workers()):
                return None
            self._choose_relaxed()
        if engine is not None and engine.max_nodes is not None:
            self._keep_to_nodes(engine.max_nodes)
        elif not (self.is_complete and self._prove()):
            for attempt in self.policy.attempts:
                self._choose(attempt)
        return self._outcome()

    def _uses_workers(self) -> bool:
        """Return whether the relaxation has replicas with attention workers."""
        used = [] if self.relaxed is None else np.flatnonzero(self.relaxed.counts > 0.0).tolist()
        return any(map(self.enumerated.has_workers, used))

    def relaxed_bound(self) -> float:
        self._relax(chooses=False)
        return self.bound

    def explored(self) -> Explored:
        """Search without a proof over whole counts."""
        self._relax()
        self._choose(self.policy.attempts[0])
        if self.relaxed is None:
            return Explored((), None, None, is_empty=self.is_complete)
        if self.enumerated.num_compositions <= self.policy.few_for_a_change:
            self._list_within(np.inf)  # any replica may fit beside those that run
        chosen = np.flatnonzero(self._likeliest(self.policy.explored))
        if self.incumbent is not None:
            chosen = np.union1d(chosen, np.flatnonzero(self.incumbent.counts))
        lp, dearer = self.relaxed, 1.0 + RELAXATION_TOLERANCE
        prices = Bound(self.bound, lp.row_prices * dearer, lp.link_prices * dearer, lp.rate_prices)
        value = None if self.incumbent is None else self.incumbent.value
        templates = tuple(self.enumerated.template(int(i)) for i in chosen)
        return Explored(templates, value, prices if self.is_complete else None, is_empty=False)

    # --- relaxation

    def _relax(self, *, chooses: bool = True) -> None:
        """Solve the relaxation over all replicas of the family and, if it ``chooses``, whole counts of the likeliest.

        Raises:
            NoPlanFoundError: there was no time to list any replica.
        """
        self.enumerated.list_first(self.costs, self.budget)
        for number in range(self.policy.most_rounds):
            lp = self._solve_relaxation()
            if number == 0 and chooses and not self.enumerated.is_prepared:
                self._round_down()
                self._choose(self.policy.begins)
            if self.budget.is_spent():
                break
            if self.enumerated.list_improving(None if lp is None else self._prices(lp), self.budget):
                self._set_bound()
                break
        if self.enumerated.columns is None and not self.is_complete:
            raise self.settings.stopped()
        if chooses:
            self._choose_relaxed()

    def _choose_relaxed(self) -> None:
        """Find whole counts near the relaxation."""
        self._round_down()
        self._choose(self.policy.relaxed)

    def _solve_relaxation(self) -> LpSolution | None:
        """Solve the relaxation over the enumerated columns and keep it in ``relaxed``.

        If these columns cannot meet the demand or the pins, return the solution that misses least instead.
        """
        columns = self.enumerated.columns
        if columns is None:
            return None
        self.relaxed = self.master.solve_lp(columns)
        return self.relaxed or self.master.solve_lp(columns, is_elastic=True)

    def _prices(self, lp: LpSolution) -> ColumnPrices:
        """Return the prices of a relaxation; one that minimises what is missing has no costs."""
        row_costs = 0.0 if self.relaxed is None else self.master.row_costs
        return ColumnPrices(lp.side_prices + row_costs, lp.replica_price, lp.rate_prices)

    def _set_bound(self) -> None:
        self.is_complete, lp = True, self.relaxed
        if lp is None:
            self.bound = 0.0 if self.master.maximises else np.inf
        elif self.master.demand is None:
            self.bound = min(self.bound, lp.value * (1.0 + RELAXATION_TOLERANCE))
        else:
            self.bound = max(0.0, lp.value - RELAXATION_TOLERANCE * self.master.demand * lp.demand_price)
        self._tell("bound by fractions of replicas")

    # --- whole counts

    def _choose(self, attempt: Attempt) -> None:
        """Solve whole counts of the likeliest columns of each side, unless the gap is small enough."""
        if self.relaxed is None or self._gap() <= self.gap_target:
            return
        if self.incumbent is None or not self.budget.is_spent():
            self._solve(self._likeliest(attempt.columns), attempt.nodes, back=attempt.back)

    def _reduced(self) -> FloatArray:
        """Return how much more each replica's GPUs are worth than its rate: the least that a plan with it loses."""
        columns, lp = self.enumerated.columns, self.relaxed
        assert lp is not None, "prices say what is lost"
        assert columns is not None, "prices are those of columns"
        return lp.reduced(columns)

    def _within(self, distance: float) -> BoolArray:
        """Return which columns lose at most ``distance``; no better plan contains any other."""
        return np.asarray(self._reduced() <= distance * (1.0 + RELAXATION_TOLERANCE))

    def _likeliest(self, num: int) -> BoolArray:
        """Return the ``num`` columns of every side that lose least, and those of the relaxation."""
        columns, reduced = self.enumerated.columns, self._reduced()
        assert columns is not None, "prices are those of columns"
        assert self.relaxed is not None, "prices say which are likely"
        inside = padded(self.relaxed.counts, len(reduced)) > 0.0
        for side in np.unique(columns.sides):
            here = np.flatnonzero(columns.sides == side)
            inside[here[np.argsort(reduced[here])[:num]]] = True
        return np.asarray(inside)

    def _round_down(self) -> None:
        """Round the relaxation down to a plan, in case no time is left for a better one."""
        columns = self.enumerated.columns
        if columns is not None and self.relaxed is not None and self.master.maximises and self.master.has_only_limits:
            found = self.master.rounded_down(columns, padded(self.relaxed.counts, len(columns.rates)))
            if found.value > 0.0 and self.master.prefers(found.value, self.incumbent):
                is_first, self.incumbent = self.incumbent is None, found
                if is_first:
                    self._tell("fractions rounded down to whole replicas")

    def _prove(self) -> bool:
        """Solve whole counts over every column that may be in a better plan; HiGHS's bound then holds for the family.

        Return whether this was tried; it is not if hardly any column is excluded or no time is left.
        """
        if self.relaxed is None or self._gap() <= self.gap_target:
            return True
        distance = np.inf if self.incumbent is None else abs(self.bound - self.incumbent.value)
        is_telling = distance * float(self.relaxed.counts.sum()) <= abs(self.bound)  # less than a replica is worth
        are_few = self.enumerated.num_compositions <= self.policy.most_listed
        if not (is_telling or are_few) or not self._list_within(distance) or self.budget.is_spent():
            return False
        worthwhile = self._within(distance)
        if worthwhile.sum() > self.policy.most_proved:
            return False
        bound = self._solve(worthwhile, self.policy.proof_nodes, proves=True)
        if bound is not None:
            self._tighten(bound)
        self._tell("whole counts")
        return True

    def _list_within(self, distance: float) -> bool:
        """List every replica that loses at most ``distance``; return False if time ran out."""
        assert self.relaxed is not None, "prices say what is lost"
        return self.enumerated.list_within(
            self._prices(self.relaxed), distance * (1.0 + RELAXATION_TOLERANCE), self.budget
        )

    def _solve(self, which: BoolArray, nodes: int, *, proves: bool = False, back: int = 1) -> float | None:
        """Find whole counts of some columns no worse than the incumbent; return HiGHS's bound on them.

        For ``back`` see `settled`.
        """
        columns, num = self.enumerated.columns, len(which)
        chosen = np.flatnonzero(which)
        if columns is None or not len(chosen):
            return None
        if self.master.pins is None:
            chosen = chosen[columns.some(chosen).undominated()]
        start = None
        if self.incumbent is not None:
            inside = padded(self.incumbent.counts, num)
            chosen = np.union1d(chosen, np.flatnonzero(inside))
            start = replace(self.incumbent, counts=inside[chosen])
        least = None
        if not proves and self.relaxed is not None and self.master.has_only_limits:
            (least,) = settled([padded(self.relaxed.counts, num)[chosen]], back=back) or (None,)
            if least is not None and start is not None and np.any(start.counts < least):
                start = None
        found, is_settled = self.master.solve_milp(
            columns.some(chosen), time_limit_s=self._time_limit_s(), nodes=self.budget.nodes(nodes),
            gap=self.gap_target / (1 if proves else 10), seed=self.seed, start=start, least=least,
            presolves=self.master.pins is not None, stop=self._is_over(), charge=self.budget.charge,
        )  # fmt: skip
        if proves and not self.master.serves(found):  # the choice was among the whole family
            self.is_impossible = is_settled and self.incumbent is None
        if found is None:
            return None
        self._adopt_if_better(found, chosen)
        return found.bound

    # --- whole counts that nodes have room for, if the nodes of a replica are limited

    def _keep_to_nodes(self, most_nodes: int) -> None:
        """Choose whole counts again so that every replica fits on at most ``most_nodes`` nodes.

        Earlier choices and the relaxation held each replica to this limit alone, so the relaxation's bound is valid.
        Better plans consist only of columns within the distance between bound and incumbent, so HiGHS's bound on these
        columns is a bound on all.

        Raises:
            NoPlanFoundError: no such choice was found, nor proved that there is none.
        """
        if self.relaxed is None:
            return
        anywhere, self.incumbent = self.incumbent, None
        self._solve_on_nodes(self._likeliest(self.policy.explored), most_nodes)
        if self.incumbent is None:
            self._solve_on_nodes(self._likeliest(self.policy.most_on_nodes), most_nodes)
        if self.incumbent is None:
            self._refute(most_nodes, is_somewhere=anywhere is not None)
        if self.is_impossible:
            return
        if self.incumbent is None:
            raise NoPlanFoundError(
                f"no plan was found with replicas on at most {most_nodes} nodes each, nor proved that there is none"
            )
        distance = abs(self.bound - self.incumbent.value)
        is_tellable = (
            self.is_complete
            and self.enumerated.num_compositions <= self.policy.most_listed
            and self._gap() > self.gap_target
        )
        if not is_tellable or self.budget.is_spent() or not self._list_within(distance):
            return
        worthwhile = self._within(distance)
        if worthwhile.sum() <= self.policy.most_on_nodes:
            bound = self._solve_on_nodes(worthwhile, most_nodes)
            if bound is not None:
                self._tighten(bound)
                self._tell("whole counts")

    def _refute(self, most_nodes: int, *, is_somewhere: bool) -> None:
        """Try to prove that no whole counts keep to the nodes; a plan that does may be found instead.

        Rows for nodes only exclude plans. So it is a proof if there is none without them, unless one is known.
        """
        if not self.is_complete or self.enumerated.num_compositions > self.policy.most_listed:
            return
        if not is_somewhere:
            self._prove()
            self.incumbent = None
        if self.is_impossible or not self._list_within(np.inf):
            return
        if self.enumerated.num_columns <= self.policy.most_on_nodes:
            self._solve_on_nodes(np.ones(self.enumerated.num_columns, dtype=bool), most_nodes, proves=True)

    def simplest(self, value: float) -> Outcome | None:
        """Return the simplest plan that is no worse than ``value``, if one is found."""
        self._relax()
        if self.incumbent is None or self.relaxed is None:
            return None
        found = simplest(
            self.costs, self.master, self.enumerated, self.relaxed, self.settings,
            Within(value=value, wanted=self.master.demand or value),
            distance=abs(self.relaxed.value - value) if self.is_complete else np.inf,
            known=np.flatnonzero(self.incumbent.counts),
        )  # fmt: skip
        if found is None:
            return None
        self._adopt(found.solution, found.chosen, "simpler plans")
        outcome, each = self._outcome(), zip(found.chosen, found.layouts, strict=True)
        nodes = {self.enumerated.template(int(i)): tuple(of) for i, of in each if of}
        return outcome and replace(outcome, layouts=nodes, simplicity=found.simplicity)

    def _solve_on_nodes(self, which: BoolArray, most_nodes: int, *, proves: bool = False) -> float | None:
        """Find the best whole counts of columns that nodes have room for; return HiGHS's bound if it covers all.

        With ``proves`` these are all columns of the family, so it is impossible if there are no such counts.
        """
        columns = self.enumerated.columns
        assert columns is not None, "prices are those of columns"
        chosen = np.flatnonzero(which)
        kinds, of_columns = counts_of_kinds([self.enumerated.kind(int(i)) for i in chosen])
        program = NodeProgram.of(self.costs.classes, kinds, most_nodes)
        if program is None:
            return None
        found, is_settled = self.master.solve_milp(
            columns.some(chosen), time_limit_s=self._time_limit_s(), seed=self.seed, gap=self.gap_target / 2,
            nodes=self.budget.nodes(self.policy.nodes_on_nodes), stop=self._is_over(), charge=self.budget.charge,
            extend=lambda highs: program.extend(highs, of_columns.tolist()),
        )  # fmt: skip
        if proves and program.is_whole and not self.master.serves(found):  # the choice was among the whole family
            self.is_impossible = is_settled
        if found is None:
            return None
        self._adopt_if_better(found, chosen)
        return found.bound if program.is_whole else None

    def _adopt_if_better(self, found: MilpSolution, chosen: IntArray) -> None:
        if self.master.serves(found) and self.master.prefers(found.value, self.incumbent):
            self._adopt(found, chosen, "whole counts")

    def _adopt(self, found: MilpSolution, chosen: IntArray, phase: str) -> None:
        """Make whole counts of the chosen columns the incumbent."""
        counts = np.zeros(self.enumerated.num_columns, dtype=np.int64)
        counts[chosen] = found.counts
        self.incumbent = replace(found, counts=counts)
        self._tell(phase)

    def _tighten(self, bound: float) -> None:
        self.bound = min(self.bound, bound) if self.master.maximises else max(self.bound, bound)

    def _time_limit_s(self) -> float:
        """Return the time limit of a choice, which only guards: nodes of the search tree end it."""
        return max(self.policy.least_s, self.budget.remaining_s())

    def _is_over(self) -> Callable[[], bool]:
        """Return a check for whether the time is up on the budget's clock or the caller has cancelled."""
        end_s = self.budget.elapsed_s() + self._time_limit_s()
        return lambda: self.budget.cancelled.is_set() or self.budget.elapsed_s() >= end_s

    def _gap(self) -> float:
        return relative_gap(self.incumbent, self.bound) if self.is_complete else np.inf

    def _tell(self, phase: str) -> None:
        known = np.isfinite(self.bound) and (self.is_complete or self.master.maximises)
        value = None if self.incumbent is None else self.incumbent.value
        gap = relative_gap(self.incumbent, self.bound) if known and self.incumbent is not None else None
        self.settings.tell(phase, value, self.bound if known else None, gap)

    def _outcome(self) -> Outcome | None:
        columns = self.enumerated.columns
        if self.incumbent is None or self.relaxed is None or columns is None:
            serves_nothing = self.relaxed is None or (self.master.maximises and self.relaxed.value <= 0.0)
            if self.is_impossible or (self.is_complete and serves_nothing):
                return None
            raise NoPlanFoundError(UNDECIDED)
        counts = padded(self.incumbent.counts, len(columns.rates))
        others = [int(i) for i in np.argsort(self._reduced())[: 5 + int((counts > 0).sum())] if not counts[i]][:5]
        value = self.incumbent.value
        return Outcome(
            chosen=tuple((self.enumerated.template(int(i)), int(counts[i])) for i in np.flatnonzero(counts)),
            value=value,
            bound=sound_bound(self.bound, value, maximises=self.master.maximises) if self.is_complete else self.bound,
            row_prices=self.relaxed.row_prices,
            rate_prices=self.relaxed.rate_prices,
            flows=self.incumbent.flows,
            runners_up=tuple(map(self.enumerated.template, others)),
            interrupted=self.budget.cancelled.is_set(),
        )
