"""A plan's results when every coefficient of its profiles is off: the spread, the runner-up, and the regret.

Everything is priced by `FixedPlan`, with fixed GPUs, layers and head groups. *As planned* keeps micro-batches and
chunks, so limits may be missed; *within limits* chooses engine settings again, which needs no new plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest

import numpy as np

from hetis.planner.use_cases.record.parts import ProfileErrors
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan, Performance, Profiles
from hetis.planner.use_cases.robustness.profile_errors import (
    Corner,
    corners,
    perturbed,
    scaled,
    tp_sizes,
    used_fits,
)
from hetis.solver.budget import Budget, Progress, Report, silent
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Plan, Role
from hetis.solver.problem import Family, PlacementProblem

# --- alternative plans


Search = Callable[[PlacementProblem, str, Budget], Plan]  # arguments: problem, strategy, budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUpPlan:
    """The best other plan found under the unchanged profiles; it is not proven to be the second best.

    Candidates are the plans of searches under perturbed profiles (which a user with slightly different numbers would
    have chosen) and of families that lack something the plan has (attention workers; disaggregated prefill and decode;
    mixed GPU types; one of its TP sizes), if their replicas differ in more than micro-batches and chunks. Plans are
    compared
    within limits: `FixedPlan.within_limits`.
    """

    replicas: Mapping[str, int]  # number of replicas by shape in words
    rate: float  # under the unchanged profiles, in requests/s
    better: float  # share of the samples in which it beats the plan
    mean_gain: float  # mean gain in these samples, as a share of the plan's rate
    most_gain: float  # highest gain


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """The regret: the share of the best rate that the plan loses because the right coefficients were unknown."""

    searches: int  # number of perturbed profiles under which the search was repeated
    other_replicas: int  # number of these searches that chose replicas other than the plan's
    mean: float  # mean, compared with the better of the plan and the search's result
    worst: float  # worst, compared with the better of the plan and the search's result
    bound: float  # the worst possible regret, by the bounds that the searches proved


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A plan found under other ``profiles`` or, if these are None, in a smaller family."""

    profiles: Profiles | None
    plan: Plan
    fixed: FixedPlan


def alternatives(
    plan: Plan, problem: PlacementProblem, perturbed: Sequence[Profiles], *, budget: Budget, search: Search,
    report: Report,
) -> Iterator[Alternative]:  # fmt: skip
    """Search in the smaller families and under each of the ``perturbed`` profiles, until the budget ends."""
    questions: list[tuple[PlacementProblem, str, Profiles | None]] = [
        (replace(problem, family=family), strategy, None) for family, strategy in smaller_families(plan, problem.family)
    ]
    questions += [(replace(problem, profiles=profiles), plan.strategy, profiles) for profiles in perturbed]
    for number, (posed, strategy, profiles) in enumerate(questions, 1):
        if budget.is_spent():
            return
        phase = f"search {number} of {len(questions)} under perturbed profiles and in smaller families"
        report(Progress(phase=phase, elapsed_s=budget.elapsed_s()))
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
    if any(
        len({stage.gpu for stage in replica.stages} | {pool.gpu for pool in replica.attention_workers}) > 1
        for replica in plan.replicas
    ):
        yield family, "uniform"  # the only strategy without mixed GPU types
    for tp in sorted({stage.tp * replica.attention_dp for replica in plan.replicas for stage in replica.stages}):
        if rest := tuple(size for size in family.tp_sizes if size != tp):
            yield replace(family, tp_sizes=rest), plan.strategy


def runner_up(
    found: Sequence[Alternative],
    chosen: FixedPlan,
    problem: PlacementProblem,
    around: Sequence[Profiles],
    samples: Sequence[Profiles],
    reached: Sequence[Performance],
    cancelled: threading.Event,
) -> RunnerUpPlan | None:
    """Return the best of ``found`` with other replicas, or None, also if this is cancelled.

    ``reached`` is the plan's performance under each of the samples, with engine settings near those that are best
    ``around`` them.
    """
    others = {tuple(a.fixed.structure.items()): a.fixed for a in found if a.fixed.structure != chosen.structure}
    if not others:
        return None
    rated, gains = list[tuple[float, FixedPlan]](), list[float]()
    for other in others.values():
        if cancelled.is_set():
            return None
        rated.append((other.within_limits(problem.profiles).rate, other))
    rate, best = max(rated, key=lambda pair: pair[0])
    near = best.near(around)
    for profiles, mine in zip(samples, reached, strict=True):
        if cancelled.is_set():
            return None
        gains.append((near.within_limits(profiles).rate - mine.rate) / mine.rate if mine.rate > 0 else 0.0)
    positive = [gain for gain in gains if gain > 1e-9]
    return RunnerUpPlan(
        replicas=best.structure,
        rate=rate,
        better=len(positive) / len(gains),
        mean_gain=sum(positive) / len(positive) if positive else 0.0,
        most_gain=max(positive, default=0.0),
    )


def regret(found: Iterable[Alternative], chosen: FixedPlan, cancelled: threading.Event) -> Regret | None:
    """Return the regret compared with the searches under perturbed profiles, or None if there are none."""
    losses, bounds, others = [], [], 0
    for one in found:
        if one.profiles is None or cancelled.is_set():
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


# --- the study


SAMPLES = 200
SMALL_FLEET = 64  # GPUs up to which a search takes about a second
SEARCHES, SEARCHES_OF_LARGE = 12, 4
GAP, GAP_OF_LARGE = 0.001, 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A quantity over the samples; ``worst`` includes the corner cases. Bad means low rates and high latencies."""

    planned: float
    p5: float
    median: float
    p95: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CornerResult:
    """The result of the unchanged plan in a corner case, and whether it misses a limit there."""

    name: str
    rate: float
    ttft_s: float
    tpot_s: float
    misses: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """The result of a study; rates are in requests/s as counted by the objective, latencies in seconds."""

    error: float  # share by which every coefficient was off at most
    samples: int  # number of random draws, generated from ``seed``
    seed: int
    rate: Spread  # rate as planned
    ttft_s: Spread  # TTFT as planned
    tpot_s: Spread  # TPOT as planned
    missed: float  # share of the samples in which a latency limit is missed as planned
    rate_within: Spread  # rate with engine settings chosen again to hold the limits; ``worst`` is over the samples only
    # Share of the samples in which the demanded rate is not reached within limits; None without a demand
    short: float | None
    corners: tuple[CornerResult, ...]  # the corner cases, as planned
    runner_up: RunnerUpPlan | None  # None if no other plan was searched for (objectives cost and gpus) or found
    regret: Regret | None  # None if no other plan was searched for (objectives cost and gpus) or found
    complete: bool  # False if the time ended before everything was done


def study(
    plan: Plan,
    problem: PlacementProblem,
    *,
    error: float,
    seed: int = 0,
    budget: Budget | None = None,
    search: Search | None = None,
    samples: int = SAMPLES,
    searches: int | None = None,
    report: Report = silent,
) -> Robustness:
    """Price a valid plan with replicas under ``samples`` perturbed profiles, and repeat the search under a few of them.

    Args:
        error: the error, below 1; 0.2 is 20%.
        budget: once it is spent or cancelled, the study returns the results so far.
        search: repeats the search; None: `default_search`.
        searches: number of perturbed profiles to search under; None: `SEARCHES`, or fewer for a large fleet.
    """
    budget = budget if budget is not None else Budget()
    profiles = used_fits(problem.profiles, problem.model, tp_sizes(plan, problem))
    fixed = FixedPlan(plan, problem)
    around = [scaled(profiles, factor) for factor in (1.0, 1.0 + error, 1.0 - error)]
    near = fixed.near(around)
    rng = np.random.default_rng(seed)
    drawn, planned, within = list[Profiles](), list[Performance](), list[Performance]()
    while len(drawn) < samples and not (drawn and budget.is_spent()):
        phase = f"plan under perturbed profile {len(drawn) + 1} of {samples}"
        report(Progress(phase=phase, elapsed_s=budget.elapsed_s()))
        drawn.append(perturbed(profiles, error, rng))
        planned.append(fixed.as_planned(drawn[-1]))
        within.append(near.within_limits(drawn[-1]))
    edges = list(corners(profiles, error, gpus=fixed.gpus))
    at_corners = [fixed.as_planned(corner.profiles) for corner in edges]
    small = sum(1 for _ in islice(problem.cluster.devices(), SMALL_FLEET + 1)) <= SMALL_FLEET
    wanted = searches if searches is not None else SEARCHES if small else SEARCHES_OF_LARGE
    found, lost = list[Alternative](), None
    if problem.objective.maximises:
        chosen = _alternating(drawn, edges, wanted)
        search = search or default_search(seed, gap_target=GAP if small else GAP_OF_LARGE)
        others = alternatives(plan, problem, chosen, budget=budget, search=search, report=report)
        lost = regret(_kept(others, found), fixed, budget.cancelled)  # each as it is found: pricing takes seconds too
        if not budget.cancelled.is_set():
            report(Progress(phase="comparing with the runner-up", elapsed_s=budget.elapsed_s()))
    now, now_within = fixed.as_planned(problem.profiles), near.within_limits(problem.profiles)
    demand = problem.objective.demand_rps
    return Robustness(
        error=error,
        samples=len(drawn),
        seed=seed,
        rate=_spread(lambda reach: reach.rate, now, planned, at_corners, worst=min),
        ttft_s=_spread(lambda reach: reach.ttft_s, now, planned, at_corners, worst=max),
        tpot_s=_spread(lambda reach: reach.tpot_s, now, planned, at_corners, worst=max),
        missed=_share(reach.misses(problem.objective) for reach in planned),
        rate_within=_spread(lambda reach: reach.rate, now_within, within, [], worst=min),
        short=None if demand is None else _share(reach.rate < demand * (1 - 1e-9) for reach in within),
        corners=tuple(
            CornerResult(
                name=corner.name,
                rate=reach.rate,
                ttft_s=reach.ttft_s,
                tpot_s=reach.tpot_s,
                misses=reach.misses(problem.objective),
            )
            for corner, reach in zip(edges, at_corners, strict=True)
        ),
        runner_up=runner_up(found, fixed, problem, around, drawn, within, budget.cancelled),
        regret=lost,
        complete=not budget.is_spent(),
    )


def _kept(found: Iterable[Alternative], into: list[Alternative]) -> Iterator[Alternative]:
    """Yield what is found, and append it to a list."""
    for one in found:
        into.append(one)
        yield one


def default_search(seed: int, *, gap_target: float = GAP) -> Search:
    """Return `solve_placement` as a search that uses the rest of the budget."""
    from hetis.solver.planning import solve_placement

    def search(problem: PlacementProblem, strategy: str, budget: Budget) -> Plan:
        left = Budget(time_limit_s=budget.remaining_s(), clock=budget.clock, cancelled=budget.cancelled)
        return solve_placement(problem, strategy=strategy, budget=left, gap_target=gap_target, seed=seed)

    return search


def _alternating(drawn: Sequence[Profiles], edges: Sequence[Corner], count: int) -> list[Profiles]:
    """Return random draws and corner cases in alternation, so that even a truncated search has seen both."""
    pairs = zip_longest(drawn, (corner.profiles for corner in edges))
    return list(islice((one for one in chain.from_iterable(pairs) if one is not None), count))


def _spread(
    of: Callable[[Performance], float],
    now: Performance,
    samples: Sequence[Performance],
    at_corners: Sequence[Performance],
    *,
    worst: Callable[[list[float]], float],
) -> Spread:
    values = [of(reach) for reach in samples]
    p5, median, p95 = (float(value) for value in np.percentile(values, (5, 50, 95)))
    return Spread(
        planned=of(now), p5=p5, median=median, p95=p95, worst=worst(values + [of(reach) for reach in at_corners])
    )


def _share(holds: Iterable[bool]) -> float:
    answers = list(holds)
    return sum(answers) / len(answers)


def with_robustness(plan: Plan, robustness: Robustness) -> Plan:
    """Return the plan with the result of a study."""
    errors = replace(ProfileErrors.of(plan).errors, robustness=robustness)
    return ProfileErrors(errors=errors).on(plan)
