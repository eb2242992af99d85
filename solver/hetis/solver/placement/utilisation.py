"""Plans by what they keep: the utilisation is a decision.

A plan that serves the share u of its saturated rate keeps a limit on TTFT only if requests wait for no longer than the
limit leaves (`waits.py`). So for each u of `GRID` the family is searched with the limits as they are at u, and what is
found serves as much as keeps them. Two more choices follow from that: some of the limit may be set aside for waiting
(`RESERVED`), which excludes replicas whose own iterations use it up, and a plan may serve more than the u it was
searched for.

Prompts that wait make TTFT long, while decode replicas keep TPOT at any utilisation. So prefill replicas may have a
lower one than the plan: the share ``prefill_load`` of it (`Lanes`), which scales their rates in the master.

Caps at a lower u exclude fewer replicas. So a plan that serves between two neighbours u < u' of the grid serves at most
u' times the bound at u, and the largest of these products bounds every plan. Cells whose product is no larger than what
is known are not searched.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hetis.solver.budget import SearchSettings
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.master import cost_of
from hetis.solver.placement.outcome import Outcome, rate_bound
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.waits import PRECISE, Kept, kept_by, lanes_of, most_lanes, own_rate, retuned, saturated_rate
from hetis.solver.plan import Lanes, ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem

GRID = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.98)
TRIED = (0.98, 0.8, 0.6)  # utilisations at which plans are searched; those found may keep more or less
RESERVED = (0.25, 0.4, 0.5)  # shares of the limit on TTFT that are set aside for waiting, in turn
MORE_RESERVES = 1  # further shares, between those that keep most
RERATED = (0.98, 0.4)  # utilisations at whose limits replicas are rated by what they keep among their like
WAITING = 0.8  # utilisation at which they are set aside
NEARLY = 0.97  # ratio to a utilisation below which plans found for it do not keep it
NEAR = 0.004  # gap of whole counts while waits decide what is kept, whose bound is that of relaxations
TRIES = 3  # searches for a simpler plan that keeps enough
CLOSE = 1.01  # ratio of a bound to what is kept from which on further plans are not worth their time

Find = Callable[[CostTables, float, float], Outcome | None]  # of what serves more than a saturated rate; to a gap
Quick = Callable[..., Outcome | None]  # of few replicas, by saturated rates or as ``rated``
BoundOf = Callable[[CostTables], float]


class KeptOutcome(NamedTuple):
    """The outcome of a search with the tables of its utilisation; its bound is that on what is kept, over that."""

    costs: CostTables
    outcome: Outcome


class Unbeaten(NamedTuple):
    """The bound on what is kept, if nothing better than a known plan was found."""

    bound: float


def chooses_utilisation(problem: PlacementProblem) -> bool:
    """Return whether the share of their saturated rate that plans serve is chosen."""
    return problem.objective.kind.goal.is_planned and problem.assumptions.chooses_utilisation


def loosest(costs: CostTables) -> CostTables:
    """Return the tables with the limits as they are at the lowest utilisation, and any demand at the highest."""
    return replace(costs.at(GRID[0], most_lanes(costs)), problem=costs.problem.at(GRID[-1]))


def search_kept(
    costs: CostTables, settings: SearchSettings, find: Find, bound_of: BoundOf, known: float = 0.0,
    quick: Quick | None = None,
) -> KeptOutcome | Unbeaten | None:  # fmt: skip
    """Return the outcome that keeps most or, if a rate is demanded, the best that keeps it; None: there is none.

    ``find`` searches at the utilisation of tables, and ``bound_of`` returns a bound without whole counts, in the unit
    of outcomes. If the rate is maximised, a plan may be known that keeps a rate, and only better ones count. Then the
    plans of a ``quick`` search of a smaller family count first: those of the highest saturated rates may keep less.

    Raises:
        NoPlanFoundError: none of what was found keeps any rate, or the demand, which proves nothing.
    """
    if costs.problem.objective.maximises:
        return _most(costs, settings, find, bound_of, known, quick).run()
    return _Least(costs, settings, find, bound_of, quick).run()


def search_simpler(
    costs: CostTables, best: Plan, least: float, simplest: Callable[[CostTables, float], Outcome | None]
) -> KeptOutcome | None:
    """Return the simplest outcome that keeps at least a rate, or a demand; None: none was found.

    ``simplest`` searches among plans that serve so many times the least, at the utilisation that the ``best`` plan
    keeps, with its lanes. If what is found keeps too little, it does so again with the lanes of that, among plans that
    leave as much of the limit on TTFT for waiting as the best does; and then among those that serve as much more as was
    missing, but less than the best. The bound is that of the first search.
    """
    problem, used, lanes = costs.problem, best.result.utilisation, best.lanes()
    if not chooses_utilisation(problem):
        outcome = simplest(costs, 1.0)
        return None if outcome is None else KeptOutcome(costs, outcome)
    needed, most = (least, GRID[-1]) if problem.objective.maximises else (problem.objective.demand_rps or 0.0, used)
    limit_s, slowest_s = problem.objective.ttft_limit_s, max((one.ttft_s for one in best.replicas), default=0.0)
    leaves = 0.0 if limit_s is None else max(0.0, 1.0 - slowest_s / limit_s) * (1.0 - PRECISE)
    factor, bound = 1.0, 0.0
    for number in range(TRIES):
        tables = costs.at(used, lanes, leaves if number else 0.0)
        outcome = simplest(tables, factor)
        if outcome is None or outcome.simplicity is None:
            break
        bound = bound if number else outcome.simplicity.bound
        lanes, keeps = lanes_of(tables, outcome), kept_by(tables, outcome, most).utilisation
        if keeps * saturated_rate(tables, outcome) >= needed * (1.0 - 1e-9):
            outcome = replace(outcome, simplicity=replace(outcome.simplicity, bound=bound))
            return KeptOutcome(costs.at(keeps, lanes), outcome)
        if number and least:  # GPUs may cost nothing
            factor = min(used / keeps if keeps else np.inf, (factor + best.result.value / least) / 2.0)
    return None


@dataclass(frozen=True, slots=True)
class _Found:
    """Replicas that keep their limits at a utilisation."""

    outcome: Outcome
    keeps: Kept
    lanes: Lanes
    reserved: float  # share of the limit that was set aside

    @property
    def utilisation(self) -> float:
        return self.keeps.utilisation

    @property
    def kept(self) -> float:
        return self.utilisation * self.outcome.value


class _Cells:
    """Searches of one problem at several utilisations."""

    def __init__(self, costs: CostTables, settings: SearchSettings, find: Find, bound_of: BoundOf) -> None:
        self.costs, self.settings, self.find = costs, settings, find
        self._bound_of, self._bounds = bound_of, dict[float, float]()
        self.lanes = most_lanes(costs)  # of the last plan
        self.has_found = False  # whether any search found a plan
        self._searched = list[tuple[CostTables, float]]()  # tables with their bounds on saturated rates

    @property
    def limit_s(self) -> float | None:
        return self.costs.problem.of_classes().objective.ttft_limit_s

    def searched(
        self, utilisation: float, reserved: float = 0.0, load: float = 1.0, *, above: float = 0.0, gap: float = 0.0
    ) -> _Found | None:
        """Return what a search at a utilisation found, at the one that it keeps; raises as `outcome_of`.

        None: there is no plan, or none that keeps more than ``above``. Prefill replicas have the share ``load`` of it.
        """
        lanes = self.lanes._replace(prefill_load=load)
        tables = self.costs.at(utilisation, lanes, reserved)
        if any(GRID[-1] * bound <= above and _is_within(tables, other) for other, bound in self._searched):
            return None
        outcome = self.outcome_of(tables, above / GRID[-1], gap)
        if outcome is None:
            return None
        self._searched.append((tables, outcome.bound))
        return _Found(outcome, kept_by(tables, outcome, GRID[-1]), lanes_of(tables, outcome), reserved)

    def outcome_of(self, tables: CostTables, above: float = 0.0, gap: float = 0.0) -> Outcome | None:
        """Return the outcome of a search with these tables for what serves more than a saturated rate.

        Raises:
            NoPlanFoundError: the time is up, and no earlier search found a plan either.
        """
        try:
            outcome = self.find(tables, above, gap)
        except NoPlanFoundError:
            if not self.has_found:
                raise
            return None
        if outcome is not None:
            self.has_found, self.lanes = True, lanes_of(tables, outcome)
        return outcome

    def require_kept(self) -> None:
        """Raise NoPlanFoundError if plans were found, of which none keeps what it should: that proves nothing."""
        if self.has_found and not self.settings.budget.is_spent():
            raise NoPlanFoundError(
                "plans were found, but requests wait in each of them for longer than the limit on TTFT leaves; allow a"
                " longer TTFT, or demand less"
            )

    def finished(self, outcome: Outcome, bound: float) -> Outcome:
        """Return the outcome of one search as that of all, each of which may have been called off."""
        is_called_off = outcome.interrupted or self.settings.budget.cancelled.is_set()
        return replace(outcome, bound=bound, interrupted=is_called_off)

    def bound_at(self, utilisation: float) -> float:
        """Return a bound on saturated rates at a utilisation and all higher ones, whatever the load of prefill is."""
        if utilisation not in self._bounds:
            lanes = most_lanes(self.costs)
            unloaded = self.costs.at(utilisation, lanes._replace(prefill_load=GRID[0]))
            tables = replace(unloaded, problem=self.costs.problem.at(utilisation, lanes))
            self._bounds[utilisation] = (rate_bound if self.settings.budget.is_spent() else self._bound_of)(tables)
        return self._bounds[utilisation]


class _Most(_Cells):
    """The search for the highest kept rate."""

    def __init__(
        self, costs: CostTables, settings: SearchSettings, find: Find, bound_of: BoundOf, known: float
    ) -> None:
        super().__init__(costs, settings, find, bound_of)
        self.best: _Found | None = None
        self._kept = known  # by the best plan that is known
        self._tuned = set[Hashable]()  # the stages of what was tried with other iterations

    def begin_with(self, quick: Quick) -> None:
        """Begin with the best plan of a quick search of few replicas."""
        other = _Most(self.costs, self.settings, lambda tables, *_: quick(tables), lambda _: np.inf, self._kept)
        other.search()
        other.rerate(quick)
        if other.best is not None:
            self.best, self._kept, self.has_found = other.best, other._kept, True

    def rerate(self, quick: Quick) -> None:
        """Search again by what replicas keep among their like, if the best plan keeps less than it is searched for."""
        is_settled = self.best is not None and self.best.utilisation >= NEARLY * GRID[-1]
        for utilisation in () if is_settled or not self.has_found or self.costs.ranges else RERATED:
            tables = self.costs.at(utilisation, self.lanes)
            rated = partial(own_rate, tables, GRID[-1])
            if self.settings.budget.is_spent() or (outcome := quick(tables, rated=rated)) is None:
                break
            outcome = replace(outcome, value=saturated_rate(tables, outcome))
            self._adopt(_Found(outcome, kept_by(tables, outcome, GRID[-1]), lanes_of(tables, outcome), 0.0))

    def run(self) -> KeptOutcome | Unbeaten | None:
        if self.limit_s is None:
            found = self.searched(GRID[-1])
            return None if found is None else self._answer(found, GRID[-1] * found.outcome.bound)
        most = self.search()
        if not self._kept:
            self.require_kept()
            return None
        bound = self.bound_after(most)
        return Unbeaten(max(bound, self._kept)) if self.best is None else self._answer(self.best, bound)

    def search(self) -> float:
        """Search for the best plan; return a bound on saturated rates."""
        most = self.bound_at(GRID[0])
        for utilisation in TRIED:
            if self._kept and (utilisation * most <= CLOSE * self._kept or self.settings.budget.is_spent()):
                break
            lanes, found = self.lanes, self._improved(utilisation)
            is_overrated = found is not None and found.utilisation < NEARLY * utilisation
            if is_overrated and self.lanes != lanes and not self.settings.budget.is_spent():
                self._improved(utilisation)  # now with the lanes that such plans have
            elif found is not None and not is_overrated and not self._is_settled(found.outcome):
                self._improved(utilisation, gap=0.0)  # waits are no matter, so whole counts decide
        if not self._kept:
            self._improved(GRID[0])
        if self._kept or self.has_found:  # replicas that keep no rate may be excluded by what they leave for waiting
            self._leave_time_to_wait(most)
            self._relieve_prefill(most)
        return most

    def _is_settled(self, outcome: Outcome) -> bool:
        """Return whether no search to a smaller gap can find more, or has time."""
        is_close = outcome.bound <= outcome.value * (1.0 + self.settings.gap_target)
        return is_close or self.settings.budget.is_spent()

    def _relieve_prefill(self, most: float) -> None:
        """Search for better plans whose prefill replicas have a lower utilisation than the others."""
        if self.best is None or not self.best.outcome.flows.any():
            return
        load = self.best.utilisation / GRID[-1]
        for each in (load, (1.0 + load) / 2.0) if load < NEARLY else ():
            if GRID[-1] * most <= CLOSE * self._kept or self.settings.budget.is_spent():
                break
            self._improved(GRID[-1], self.best.reserved, each)

    def _improved(
        self, utilisation: float, reserved: float = 0.0, load: float = 1.0, *, gap: float = NEAR
    ) -> _Found | None:
        """Return what a search at a utilisation found; it replaces the best plan if it keeps more."""
        return self._adopt(self.searched(utilisation, reserved, load, above=self._kept, gap=gap))

    def _adopt(self, found: _Found | None) -> _Found | None:
        """Return what was found, with other iterations if it keeps more so; it replaces the best plan if it does."""
        if found is not None and found.utilisation < NEARLY * GRID[-1]:
            stages = frozenset((t.scope, t.stages, n) for t, n in found.outcome.chosen)
            if stages not in self._tuned:
                self._tuned.add(stages)
                found = self._retuned(found)
        if found is not None and found.kept > self._kept:
            self.best, self._kept = found, found.kept
        return found

    def _retuned(self, found: _Found) -> _Found:
        """Return what was found or, if they keep more, its stages with other iterations."""
        tables, best = self.costs.at(found.utilisation, found.lanes), found
        for outcome in retuned(tables, found.outcome):
            rate = saturated_rate(tables, outcome)
            if GRID[-1] * rate > max(best.kept, self._kept):
                keeps = kept_by(tables, outcome, GRID[-1], above=best.kept)
                other = replace(found, outcome=replace(outcome, value=rate), keeps=keeps)
                best = max(best, other, key=lambda one: one.kept)
        return best

    def bound_after(self, most: float) -> float:
        """Return a bound on kept rates, given one on saturated rates at the lowest utilisation."""
        bound, close = GRID[0] * most, max(CLOSE, 1.0 + self.settings.gap_target) * self._kept
        for low, high in reversed(list(pairwise(GRID))):
            if high * most <= max(bound, self._kept):
                break
            bound = max(bound, high * (most if high * most <= close else self.bound_at(low)))
        return bound

    def _leave_time_to_wait(self, most: float) -> None:
        """Search for better plans of replicas that leave more of the limit for waiting."""
        kept = {0.0: self._kept}  # by share of the limit
        for number in range(len(RESERVED) + MORE_RESERVES):
            if GRID[-1] * most <= CLOSE * self._kept or self.settings.budget.is_spent():
                break
            reserved = RESERVED[number] if number < len(RESERVED) else _between(kept)
            found = self._improved(WAITING, reserved)
            kept[reserved] = 0.0 if found is None else found.kept

    def _answer(self, found: _Found, bound: float) -> KeptOutcome:
        """Return an outcome whose bound, times its utilisation, is that on what is kept."""
        used = found.utilisation
        tables = self.costs.at(used, found.lanes)
        over = max(bound, found.kept) / used if used else np.inf
        return KeptOutcome(tables, self.finished(found.outcome, max(over, found.outcome.value)))


def _is_within(tables: CostTables, other: CostTables) -> bool:
    """Return whether replicas within the caps of one search are within those of another of the same problem."""
    loads = (one.problem.assumptions.lanes.prefill_load for one in (tables, other))
    caps = ((own.tables, its.tables) for own, its in zip(tables.scopes, other.scopes, strict=True))
    return len(set(loads)) == 1 and all(
        bool((own.t_cap <= its.t_cap).all() and (own.trip_cap <= its.trip_cap).all()) for own, its in caps
    )


def _between(kept: Mapping[float, float]) -> float:
    """Return the share halfway between the one that keeps most and the better one of its neighbours."""
    shares = sorted(kept)
    at = shares.index(max(shares, key=lambda share: kept[share]))
    near = [shares[i] for i in (at - 1, at + 1) if 0 <= i < len(shares)]
    return (shares[at] + max(near, key=lambda share: kept[share])) / 2.0


def _most(
    costs: CostTables, settings: SearchSettings, find: Find, bound_of: BoundOf, known: float, quick: Quick | None
) -> _Most:
    """Return the search for the highest kept rate, which begins with the best plan of a quick search."""
    searching = _Most(costs, settings, find, bound_of, known)
    if quick is not None and searching.limit_s is not None:
        searching.begin_with(quick)
    return searching


class _Least(_Cells):
    """The search for the least cost of a demanded rate."""

    def __init__(
        self, costs: CostTables, settings: SearchSettings, find: Find, bound_of: BoundOf, quick: Quick | None
    ) -> None:
        super().__init__(costs, settings, find, bound_of)
        self._quick = quick  # to begin a search for the highest rate with

    def run(self) -> KeptOutcome | None:
        demand = self.costs.problem.objective.demand_rps
        assert demand is not None, "what is minimised serves a demand"
        best = self._best(self._found(), demand)
        if best is None and self.has_found:
            best = self._best(self._with_more_room(demand), demand)
        if best is None and self.limit_s is not None:
            best = self._that_keeps_most(demand)
        if best is None:
            self.require_kept()
            return None
        # The demand at the highest utilisation, within the limits as they are at the lowest.
        least = 0.0 if self.settings.budget.is_spent() else self._bound_of(loosest(self.costs))
        return best._replace(outcome=self.finished(best.outcome, min(least, best.outcome.value)))

    def _best(self, searched: Iterable[KeptOutcome], demand: float) -> KeptOutcome | None:
        """Return the first of what was found that keeps the demand, or the next if it costs less; None: none does."""
        best: KeptOutcome | None = None
        for tables, outcome in searched:
            serves = kept_by(tables, outcome, tables.problem.assumptions.planned_utilisation).utilisation
            if serves * saturated_rate(tables, outcome) < demand * (1.0 - 1e-9):
                continue
            if best is not None and outcome.value >= best.outcome.value:
                break  # at lower utilisations replicas serve less
            best = KeptOutcome(self.costs.at(serves, lanes_of(tables, outcome)), outcome)
            if self.limit_s is None:
                break
        return best

    def _found(self) -> Iterator[KeptOutcome]:
        """Yield what is found at each utilisation, the highest first, while there is time."""
        for utilisation in reversed(GRID):
            tables = self.costs.at(utilisation, self.lanes)
            if (outcome := self.outcome_of(tables)) is not None:
                yield KeptOutcome(tables, outcome)
            if self.settings.budget.is_spent():
                return

    def _with_more_room(self, demand: float) -> Iterator[KeptOutcome]:
        """Yield what leaves time to wait and, saturated, serves more than the demand by as much as was missing."""
        for reserved in (0.0, *RESERVED):
            factor = 1.0
            for _ in range(TRIES):
                tables = self.costs.at(GRID[-1], self.lanes, reserved)
                goal = replace(tables.problem.objective, demand_rps=factor * demand)
                tables = replace(tables, problem=replace(tables.problem, objective=goal))
                spent = self.settings.budget.is_spent()
                if spent or (outcome := self.outcome_of(tables)) is None:
                    break
                yield KeptOutcome(tables, outcome)
                keeps = kept_by(tables, outcome, GRID[-1]).utilisation * saturated_rate(tables, outcome)
                factor *= min(2.0, max(CLOSE, demand / keeps)) if keeps else 2.0

    def _that_keeps_most(self, demand: float) -> KeptOutcome | None:
        """Return the plan that keeps most, whatever it costs, if it keeps the demand."""
        problem = self.costs.problem
        goal = replace(problem.objective, kind=ObjectiveKind.GOODPUT, demand_rps=None)
        costs = replace(self.costs, problem=replace(problem, objective=goal))
        most = _most(costs, self.settings, self.find, self._bound_of, 0.0, self._quick)
        is_excluded = most.bound_after(most.search()) < demand * (1.0 - 1e-9)
        self.has_found, found = not is_excluded and (self.has_found or most.has_found), most.best
        if found is None or found.kept < demand:
            return None
        outcome = found.outcome
        outcome = replace(
            outcome,
            value=cost_of(self.costs, outcome.chosen),
            row_prices=np.zeros_like(outcome.row_prices),  # those known are of another objective
            rate_prices=np.zeros_like(outcome.rate_prices),
        )
        return KeptOutcome(self.costs.at(found.utilisation, found.lanes), outcome)
