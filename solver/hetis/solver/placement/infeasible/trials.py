"""Trials of whether a plan keeps some requirements, by the search itself, which ends once the answer is certain.

Conflicts among requirements are found by leaving out each in turn (a deletion filter).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from hetis.solver import mixes
from hetis.solver.budget import Progress, SearchSettings, silent
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.constrained_problem import apply_constraints, is_nothing_left
from hetis.solver.placement.infeasible.requirements import Requirement, Requirements, Subject, demand_of, keeping
from hetis.solver.placement.outcome import Outcome, is_out_of_reach, rate_bound
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import least_ttft_limit_s
from hetis.solver.placement.search import equal_stages, search
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem

MAX_TRIALS = 40  # total over all reasons
GAP = 0.005  # target gap of a best rate, for fleets too large for an exact one
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The answer to whether a plan keeps some requirements (None: unknown), and such a plan if one was found."""

    exists: bool | None
    costs: CostTables | None = None
    outcome: Outcome | None = None

    def latency_s(self, subject: Subject, *, of_all: bool) -> float:
        """Return the latency of the worst replica if a demand needs all of them, otherwise of the best."""
        assert self.outcome is not None, "only a plan that exists has one"
        assert self.costs is not None
        a, family = self.costs, self.costs.problem.family
        found = []
        for template, _ in self.outcome.chosen:
            mix, m = a.mixes[template.mix], family.in_flight[template.in_flight_index]
            if subject is Subject.TPOT and mix.role is not Role.PREFILL:
                found.append(mixes.tpot_per_interval(a.problem.model, mix, m) * template.interval_s)
            if subject is Subject.TTFT and mix.role is not Role.DECODE:
                slowest = a.scopes[template.scope].tables.landing_s[template.mix].max()  # set aside by a limit
                found.append(least_ttft_limit_s(a, template) + float(slowest))
        return max(found) if of_all else min(found)


@dataclass(slots=True)
class Trials:
    """Trials of one problem, each run once, with at most `MAX_TRIALS` searches."""

    problem: PlacementProblem
    settings: SearchSettings
    _done: dict[Requirements, Trial] = field(default_factory=dict)
    _num_searches: int = 0

    def of(self, kept: Iterable[Requirement]) -> Trial:
        """Return whether a plan keeps these requirements; the search ends as soon as that is certain."""
        key = frozenset(kept)
        if key not in self._done:
            known = self._known(key)
            self._done[key] = known or self.of_problem(keeping(self.problem, key), demand_of(key))
        return self._done[key]

    def _known(self, key: Requirements) -> Trial | None:
        """Return an earlier trial that settles this one: a plan that keeps more, or a subset that cannot be kept."""
        for other, trial in self._done.items():
            if (trial.exists is True and other >= key) or (trial.exists is False and other <= key):
                return trial
        return None

    def of_problem(self, problem: PlacementProblem, demand_rps: float) -> Trial:
        """Return whether a plan that maximises the rate has this goodput; tries dense work and equal stages first."""
        family, costs = problem.family, self._plain_costs(problem)
        if costs is None:
            return Trial(exists=False)
        least = demand_rps / self.problem.assumptions.planned_utilisation
        if is_out_of_reach(costs, least):
            return Trial(exists=False, costs=costs)
        if self.is_over():
            return Trial(exists=None, costs=costs)
        least *= 1.0 - ROUNDING
        equal = equal_stages(costs, self._own_settings())
        if equal is not None and equal.value >= least:
            return Trial(exists=True, costs=costs, outcome=equal)
        found = costs if family.max_pool == 0 else self._costs(problem)
        assert found is not None, "the same fleet"
        return self._search_until_certain(found, least)

    def is_refuted_at_once(self, problem: PlacementProblem, demand_rps: float) -> bool:
        """Return whether dense work alone proves that no plan of a problem has this goodput."""
        costs = self._plain_costs(problem)
        return costs is None or is_out_of_reach(costs, demand_rps / self.problem.assumptions.planned_utilisation)

    def best(self, kept: Iterable[Requirement]) -> Outcome | None:
        """Return the best rate under these requirements, or None if it was not found in time."""
        costs = self._costs(keeping(self.problem, frozenset(kept)))
        return None if costs is None or self.is_over() else self._search(costs, self._own_settings())

    def rate_bound(self, kept: Iterable[Requirement]) -> float:
        """Return an upper bound on saturated requests/s under these requirements that takes no search."""
        costs = self._plain_costs(keeping(self.problem, frozenset(kept)))
        return 0.0 if costs is None else rate_bound(costs)

    def is_over(self) -> bool:
        """Return whether no further trial may run."""
        return self._num_searches >= MAX_TRIALS or self.settings.budget.is_spent()

    def _own_settings(self) -> SearchSettings:
        """Return settings for searches that end with the caller's budget but can also be ended earlier."""
        return replace(self.settings, budget=self.settings.budget.of_its_own(), gap_target=GAP, report=silent)

    def _plain_costs(self, problem: PlacementProblem) -> CostTables | None:
        """Return tables without attention workers, which take the longest; enough for dense work and equal stages."""
        return self._costs(replace(problem, family=replace(problem.family, max_pool=0)))

    def _costs(self, problem: PlacementProblem) -> CostTables | None:
        """Return the tables of a problem, or None if no GPU is left."""
        found = apply_constraints(problem)
        return None if is_nothing_left(found) else build_cost_tables(found)

    def _search_until_certain(self, costs: CostTables, least: float) -> Trial:
        own, refuted = self._own_settings(), False

        def stop_when_certain(progress: Progress) -> None:
            nonlocal refuted
            refuted = refuted or (progress.bound is not None and progress.bound < least)
            if refuted or (progress.incumbent is not None and progress.incumbent >= least):
                own.budget.cancelled.set()

        outcome = self._search(costs, replace(own, report=stop_when_certain))
        if outcome is not None and outcome.value >= least:
            return Trial(exists=True, costs=costs, outcome=outcome)
        is_refuted = not own.budget.is_spent() if outcome is None else outcome.bound < least
        return Trial(exists=False if refuted or is_refuted else None, costs=costs, outcome=outcome)

    def _search(self, costs: CostTables, settings: SearchSettings) -> Outcome | None:
        self._num_searches += 1
        try:
            return search(costs, replace(settings, strategy=costs.problem.family.name))
        except (NoPlanFoundError, InvalidProblemError):
            # Neither found nor refuted, as if the search had been stopped. A problem that was searched is valid, but
            # without a constraint its pipelines may be too many to list.
            settings.budget.cancelled.set()
            return None


# --- conflicts


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Requirements that no plan keeps together.

    ``is_minimal`` is True if for each of them a plan was found that keeps all others; False if a trial ended without an
    answer.
    """

    members: tuple[Requirement, ...]
    is_minimal: bool


def conflicts_among(trials: Trials, given: Sequence[Requirement]) -> Iterator[Conflict]:
    """Yield disjoint conflicts until the rest can be kept, or is not known to conflict.

    No plan keeps ``given``. Requirements of the fleet may be in several conflicts, since they cannot be given up.
    """
    rest = tuple(given)
    is_first = True
    while rest and (is_first or trials.of(rest).exists is False):
        found = _conflict_in(trials, rest)
        yield found
        rest = tuple(r for r in rest if r not in found.members or r.subject.is_of_fleet)
        if all(member.subject.is_of_fleet for member in found.members):
            return
        is_first = False


def _conflict_in(trials: Trials, given: Sequence[Requirement]) -> Conflict:
    """Return a minimal subset of ``given`` that no plan keeps."""
    kept, is_minimal = list(given), True
    for requirement in given:
        without = [r for r in kept if r != requirement]
        exists = trials.of(without).exists if without else True
        if exists is False:
            kept = without
        elif exists is None:
            is_minimal = False
    return Conflict(members=tuple(kept), is_minimal=is_minimal)
