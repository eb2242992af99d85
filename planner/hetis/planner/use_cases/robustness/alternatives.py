"""Alternative plans: searches under perturbed profiles and in smaller families, and their results.

The runner-up is the best other plan found, judged by the unchanged profiles. Candidates are the plans of searches under
perturbed profiles (what somebody with slightly other numbers would have chosen) and of families that lack something
the plan has (attention workers; disaggregated prefill and decode; mixed GPU types; one of its TP sizes), if their
replicas differ in more than micro-batches and chunks. It is not proven to be the second best.

Plans are compared within limits: `FixedPlan.within_limits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan, Reach
from hetis.planner.use_cases.robustness.perturbing import Profiles
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import Family, PlacementProblem

Search = Callable[[PlacementProblem, str, Budget], Plan]  # problem, strategy, budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The best other plan found.

    Attributes:
        replicas: shapes in words, with the number of each.
        rate: by the unchanged profiles, requests/s.
        better: share of the samples in which it beats the plan.
        mean_gain: its mean gain in these, as a share of the plan's rate.
        most_gain: its highest gain.
    """

    replicas: Mapping[str, int]
    rate: float
    better: float
    mean_gain: float
    most_gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """The regret: the share of the best rate that the plan loses for lack of the right coefficients.

    Attributes:
        searches: number of perturbed profiles under which the search was repeated.
        other_replicas: how many of these searches chose other replicas than the plan has.
        mean, worst: compared with the better of the plan and what was found.
        bound: the worst that is possible, by the bounds that the searches proved.
    """

    searches: int
    other_replicas: int
    mean: float
    worst: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A plan found under other ``profiles`` or, if None, in a smaller family."""

    profiles: Profiles | None
    plan: Plan
    fixed: FixedPlan


def alternatives(
    plan: Plan, problem: PlacementProblem, perturbed: Sequence[Profiles], *, budget: Budget, search: Search
) -> Iterator[Alternative]:
    """Search in the smaller families and under each of the ``perturbed`` profiles, until the budget ends."""
    questions: list[tuple[PlacementProblem, str, Profiles | None]] = [
        (replace(problem, family=family), strategy, None) for family, strategy in smaller_families(plan, problem.family)
    ]
    questions += [(replace(problem, profiles=profiles), plan.strategy, profiles) for profiles in perturbed]
    for posed, strategy, profiles in questions:
        if budget.is_spent():
            return
        try:
            found = search(posed, strategy, budget)
        except (InfeasibleError, NoPlanFoundError):
            continue
        yield Alternative(profiles=profiles, plan=found, fixed=FixedPlan(found, problem, made_with=profiles))


def smaller_families(plan: Plan, family: Family) -> Iterator[tuple[Family, str]]:
    """Yield families that lack something the plan has, with their strategies: their best plans are different ones."""
    if any(replica.attention_workers for replica in plan.replicas):
        yield replace(family, max_pool=0), plan.strategy
    if plan.kv_routes and Role.UNIFIED in family.roles:
        yield replace(family, roles=(Role.UNIFIED,)), plan.strategy
    if any(len(_gpus(replica)) > 1 for replica in plan.replicas):
        yield family, "uniform"  # the only strategy without mixed types
    for tp in sorted({stage.tp * replica.attention_dp for replica in plan.replicas for stage in replica.stages}):
        if rest := tuple(size for size in family.tp_sizes if size != tp):
            yield replace(family, tp_sizes=rest), plan.strategy


def runner_up(
    found: Sequence[Alternative],
    chosen: FixedPlan,
    problem: PlacementProblem,
    around: Sequence[Profiles],
    samples: Sequence[Profiles],
    reached: Sequence[Reach],
) -> RunnerUp | None:
    """Return the best of ``found`` with other replicas, or None.

    ``reached`` is the plan's result under each of the samples, with engine settings near those that are best ``around``
    them.
    """
    others = {tuple(a.fixed.structure.items()): a.fixed for a in found if a.fixed.structure != chosen.structure}
    if not others:
        return None
    rate, best = max(
        ((other.within_limits(problem.profiles).rate, other) for other in others.values()), key=lambda pair: pair[0]
    )
    near = best.near(around)
    gains = [
        (near.within_limits(profiles).rate - mine.rate) / mine.rate if mine.rate > 0 else 0.0
        for profiles, mine in zip(samples, reached, strict=True)
    ]
    positive = [gain for gain in gains if gain > 1e-9]
    return RunnerUp(
        replicas=best.structure,
        rate=rate,
        better=len(positive) / len(gains),
        mean_gain=sum(positive) / len(positive) if positive else 0.0,
        most_gain=max(positive, default=0.0),
    )


def regret(found: Sequence[Alternative], chosen: FixedPlan) -> Regret | None:
    """Return the regret compared with searches under perturbed profiles, or None if there are none."""
    losses, bounds, others = [], [], 0
    for one in found:
        if one.profiles is None:
            continue
        mine = chosen.within_limits(one.profiles).rate
        best = max(mine, one.plan.result.value, one.fixed.within_limits(one.profiles).rate)
        losses.append(1.0 - mine / best if best > 0 else 0.0)
        bounds.append(max(losses[-1], 1.0 - mine / one.plan.result.bound if one.plan.result.bound > 0 else 0.0))
        others += one.fixed.structure != chosen.structure
    if not losses:
        return None
    return Regret(
        searches=len(losses),
        other_replicas=others,
        mean=sum(losses) / len(losses),
        worst=max(losses),
        bound=max(bounds),
    )


def _gpus(replica: ReplicaPlan) -> set[str]:
    return {stage.gpu for stage in replica.stages} | {pool.gpu for pool in replica.attention_workers}
