"""Why no plan exists: what is short of memory, or else which constraints conflict and how far each must give way.

    Constraints   those given of demand, TPOT limit, TTFT limit
    Trial of S    whether some plan keeps S, a part of them: the best rate under its limits, beside its demand
    Conflict      an S that no plan keeps, and of which nothing can be left out (found by leaving out each in turn)
    Relaxation    of a member of a conflict, the others kept: the best rate for a demand, the best latency for a limit

The same search that found no plan answers the trials, each until it is certain and no further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from hetis.solver import cost
from hetis.solver.budget import Budget, Progress, Report, silent
from hetis.solver.placement.first_token import least_ttft_limit_s
from hetis.solver.placement.outcome import Outcome
from hetis.solver.placement.search import search
from hetis.solver.placement.shortage import why_nothing_fits
from hetis.solver.placement.tables import Atlas
from hetis.solver.placement.tabulation import build_atlas
from hetis.solver.plan import Objective, ObjectiveKind, Role
from hetis.solver.problem import PlacementProblem

MAX_TRIALS = 20  # for all reasons together
PRECISION = 1.02  # a best latency is known this closely, as a ratio
GAP = 0.005  # of a best rate where the fleet is too large for an exact one
ROUNDING = 1e-9


class Constraint(StrEnum):
    """What may stand in the way of a plan. Those named first are left out first, so that limits are blamed last."""

    DEMAND = "demand"  # requests/s of goodput
    TPOT = "mean TPOT limit"  # seconds
    TTFT = "p95 TTFT limit"  # seconds


Constraints = Mapping[Constraint, float]


def why_infeasible(
    atlas: Atlas, budget: Budget | None = None, *, seed: int = 0, threads: int = 1
) -> tuple[str, ...]:  # fmt: skip
    """Sentences with numbers for a problem that was proved infeasible, each with the option to change.

    ``budget`` is the caller's: what it leaves no time for is said instead.
    """
    trials = _Trials(atlas.problem, budget if budget is not None else Budget(), seed, threads)
    given = _constraints(atlas.problem.objective)
    fits = bool(atlas.ranks) and bool(given) and trials.of({}).exists
    if fits is None:
        return (f"no time was left to tell what is in the way: memory, or {_listed(given)}",)
    if not fits:
        return (why_nothing_fits(atlas),)
    return tuple(_conflict_reasons(trials, given))


def _constraints(objective: Objective) -> dict[Constraint, float]:
    demand = None if objective.maximises else objective.demand_rps
    values = {
        Constraint.DEMAND: demand,
        Constraint.TPOT: objective.tpot_limit_s,
        Constraint.TTFT: objective.ttft_limit_s,
    }
    return {constraint: value for constraint, value in values.items() if value is not None}


def _conflict_reasons(trials: _Trials, given: Constraints) -> Iterator[str]:
    """Reasons for conflicts that have no member in common; what is left after the last can be kept."""
    rest, conflicts = dict(given), list[Constraints]()
    while rest and (not conflicts or trials.of(rest).exists is False):
        conflicts.append(_conflict_in(trials, rest))
        rest = {c: value for c, value in rest.items() if c not in conflicts[-1]}
    if len(conflicts) > 1:
        yield "several things are in the way, and all must give way: what is said of one supposes the others lifted"
    for conflict in conflicts:
        if len(conflict) > 1:
            yield f"each can be kept, but not together: {_listed(conflict)}; any one of them may give way"
        for constraint, value in conflict.items():
            others = {c: v for c, v in given.items() if c != constraint and (c in rest or c in conflict)}
            yield f"{_named(constraint, value)} {_relaxation(trials, constraint, value, others)}"


def _conflict_in(trials: _Trials, given: Constraints) -> Constraints:
    """A conflict among constraints that no plan keeps; perhaps not minimal where a trial ended without an answer."""
    kept = dict(given)
    for constraint in given:
        without = {c: value for c, value in kept.items() if c != constraint}
        if without and trials.of(without).exists is False:
            kept = without
    return kept


def _relaxation(trials: _Trials, constraint: Constraint, value: float, others: Constraints) -> str:
    """How far a constraint must give way when the others stay."""
    if constraint is Constraint.DEMAND:
        return _best_rate(trials, others)
    keeping = f" beside {_listed(others)}" if others else ""
    latency = _best_latency(trials, constraint, value, others)
    option = f"--{constraint.name.lower()}"
    if latency is None:
        return f"is out of reach{keeping}; no time was left to find what is not: try a longer one, or {option} none"
    if math.isinf(latency.possible_s):
        return f"is not the only obstacle: without it no plan exists either{keeping}"
    possible, impossible = _up(latency.possible_s), _down(latency.impossible_s)
    return f"is out of reach{keeping}: {impossible} cannot be kept, {possible} can ({option} {possible})"


def _best_rate(trials: _Trials, limits: Constraints) -> str:
    within = f" within {_listed(limits)}" if limits else ""
    if limits and trials.of(limits).exists is False:
        return f"is not the only obstacle: no plan at all exists{within}"
    outcome = trials.best(limits)
    if outcome is None:
        return f"is above what this fleet serves{within}; no time was left to find how much it serves (--rate)"
    share = trials.problem.assumptions.planned_utilisation
    value, bound = f"{share * outcome.value:.4g}", f"{share * outcome.bound:.4g}"
    proof = "" if bound == value else f" with the best plan found, proven at most {bound}"
    rate = _down_to(share * outcome.value)
    return f"is above what this fleet serves{within}: {value} requests/s{proof} (--rate {rate:g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _BestLatency:
    """A limit that some plan keeps and one that none keeps; ``inf``: none keeps any."""

    impossible_s: float
    possible_s: float


def _best_latency(
    trials: _Trials, constraint: Constraint, limit_s: float, others: Constraints
) -> _BestLatency | None:  # fmt: skip
    """Bisects between the limit and what a plan reaches without it; None if not even that could be found out."""
    first = trials.of(others)
    if first.exists is None:
        return None
    if not first.exists:
        return _BestLatency(impossible_s=limit_s, possible_s=math.inf)
    low, high = limit_s, first.latency_s(constraint, others)
    while high > low * PRECISION:
        middle = math.sqrt(low * high)
        trial = trials.of({**others, constraint: middle})
        if trial.exists is None:
            break
        if trial.exists:
            high = min(middle, trial.latency_s(constraint, others))
        else:
            low = middle
    return _BestLatency(impossible_s=low, possible_s=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """Whether a plan exists that keeps some constraints, None: not known; and one, if so."""

    exists: bool | None
    atlas: Atlas
    outcome: Outcome | None

    def latency_s(self, constraint: Constraint, others: Constraints) -> float:
        """What the replicas that have this latency reach: all of them where a demand needs all, else the best."""
        assert self.outcome is not None, "only asked of a plan that exists"
        a, family = self.atlas, self.atlas.problem.family
        found = []
        for template, _ in self.outcome.chosen:
            mix, m = a.mixes[template.mix], family.in_flight[template.in_flight_index]
            if constraint is Constraint.TPOT and mix.role is not Role.PREFILL:
                found.append(cost.tpot_per_interval(a.moments, mix, m) * template.interval_s)
            if constraint is Constraint.TTFT and mix.role is not Role.DECODE:
                slowest = a.scopes[template.scope].tables.landing_s[template.mix].max()  # what a limit sets aside
                found.append(least_ttft_limit_s(a, template) + float(slowest))
        return max(found) if Constraint.DEMAND in others else min(found)


@dataclass(slots=True, kw_only=True)
class _ShareOfBudget(Budget):
    """A trial's budget: its own to cancel, spent when the caller's is."""

    callers: Budget

    def is_spent(self) -> bool:
        return self.cancelled.is_set() or self.callers.is_spent()


@dataclass(slots=True)
class _Trials:
    """Solves of one problem at other constraints, each only once and no more than `MAX_TRIALS`."""

    problem: PlacementProblem
    budget: Budget
    seed: int
    threads: int
    _done: dict[tuple[tuple[Constraint, float], ...], _Trial] = field(default_factory=dict)
    _num_searches: int = 0

    def of(self, constraints: Constraints) -> _Trial:
        """Whether a plan keeps these; the search ends as soon as that is certain."""
        key = tuple(sorted(constraints.items()))
        if key not in self._done:
            self._done[key] = self._try(constraints)
        return self._done[key]

    def best(self, limits: Constraints) -> Outcome | None:
        """The best rate under limits; None if it was not found in time."""
        if self._is_over():
            return None
        atlas = self._atlas(limits)
        return self._search(atlas, self._share(), silent)

    def _try(self, constraints: Constraints) -> _Trial:
        atlas = self._atlas(constraints)
        if self._is_over():
            return _Trial(exists=None, atlas=atlas, outcome=None)
        least = constraints.get(Constraint.DEMAND, 0.0) / self.problem.assumptions.planned_utilisation
        least *= 1.0 - ROUNDING
        share, refuted = self._share(), False

        def stop_when_certain(progress: Progress) -> None:
            nonlocal refuted
            refuted = refuted or (progress.bound is not None and progress.bound < least)
            if refuted or (progress.incumbent is not None and progress.incumbent >= least):
                share.cancelled.set()

        outcome = self._search(atlas, share, stop_when_certain)
        exists: bool | None = None
        if outcome is not None and outcome.value >= least:
            exists = True
        elif refuted or (outcome is not None and outcome.bound < least) or (outcome is None and not share.is_spent()):
            exists = False
        return _Trial(exists=exists, atlas=atlas, outcome=outcome)

    def _is_over(self) -> bool:
        return self._num_searches >= MAX_TRIALS or self.budget.is_spent()

    def _share(self) -> Budget:
        return _ShareOfBudget(
            time_limit_s=self.budget.remaining_s(), clock=self.budget.clock, callers=self.budget
        )  # fmt: skip

    def _atlas(self, constraints: Constraints) -> Atlas:
        objective = Objective(
            kind=ObjectiveKind.THROUGHPUT,
            ttft_limit_s=constraints.get(Constraint.TTFT),
            tpot_limit_s=constraints.get(Constraint.TPOT),
        )
        return build_atlas(replace(self.problem, objective=objective))

    def _search(self, atlas: Atlas, budget: Budget, report: Report) -> Outcome | None:
        self._num_searches += 1
        return search(atlas, self.problem.family.name, budget, GAP, self.seed, self.threads, report)


def _listed(constraints: Constraints) -> str:
    return " and ".join(_named(constraint, value) for constraint, value in constraints.items())


def _named(constraint: Constraint, value: float) -> str:
    if constraint is Constraint.DEMAND:
        return f"{constraint} {value:g} requests/s"
    return f"{constraint} {value * 1e3:.4g} ms" if constraint is Constraint.TPOT else f"{constraint} {value:.4g} s"


def _up(seconds: float) -> str:
    """A time as an option takes it, never less than it is."""
    return _as_option(seconds, _up_to)


def _down(seconds: float) -> str:
    return _as_option(seconds, _down_to)


def _as_option(seconds: float, rounded: Callable[[float], float]) -> str:
    return f"{rounded(seconds):g}s" if seconds >= 1.0 else f"{rounded(seconds * 1e3):g}ms"


def _up_to(value: float) -> float:
    """Three digits, not below the value."""
    return -_down_to(-value)


def _down_to(value: float) -> float:
    """Three digits, not above the value."""
    if value == 0.0:
        return 0.0
    places = 2 - math.floor(math.log10(abs(value)))
    return round(math.floor(value * 10.0**places) / 10.0**places, max(0, places))
