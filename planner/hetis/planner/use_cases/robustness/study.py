"""A plan's results when every coefficient of its profiles is off: the spread, the runner-up, the regret.

All of it is priced by `FixedPlan`, with fixed GPUs, layers and head groups. *As planned* keeps micro-batches and
chunks, so limits may be missed; *within limits* chooses engine settings again, which needs no new plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import numpy as np

from hetis.planner.use_cases.robustness.alternatives import (
    Regret,
    RunnerUp,
    Search,
    alternatives,
    regret,
    runner_up,
)
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan, Reach
from hetis.planner.use_cases.robustness.perturbing import (
    Corner,
    Profiles,
    corners,
    perturbed,
    scaled,
    tp_sizes,
    used_fits,
)
from hetis.solver.budget import Budget, Progress, Report, silent
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

SAMPLES = 200
SMALL_FLEET = 64  # GPUs; up to this size a search takes about a second
SEARCHES, SEARCHES_OF_LARGE = 12, 4
GAP, GAP_OF_LARGE = 0.001, 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A quantity over the samples; ``worst`` includes the corner cases. Low rates and high latencies are bad."""

    planned: float
    p5: float
    median: float
    p95: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CornerReach:
    """The result of the unchanged plan in a corner case, and whether it misses a limit there."""

    name: str
    rate: float
    ttft_s: float
    tpot_s: float
    misses: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """The result of a study; rates in requests/s as the objective counts them, latencies in seconds.

    Attributes:
        error: every coefficient was off by up to this share.
        samples: number of random draws from ``seed``.
        rate, ttft_s, tpot_s: as planned.
        missed: share of the samples in which a latency limit is missed as planned.
        rate_within: with engine settings chosen again so that limits hold; ``worst`` over the samples only.
        short: share of the samples in which the demanded rate is not reached within limits; None without a demand.
        corners: the corner cases, as planned.
        runner_up, regret: None if no other plan was searched for (objectives cost and gpus) or found.
        complete: False if the time ended before everything was done.
    """

    error: float
    samples: int
    seed: int
    rate: Spread
    ttft_s: Spread
    tpot_s: Spread
    missed: float
    rate_within: Spread
    short: float | None
    corners: tuple[CornerReach, ...]
    runner_up: RunnerUp | None
    regret: Regret | None
    complete: bool


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
    threads: int = 1,
    report: Report = silent,
) -> Robustness:
    """Price the plan under ``samples`` perturbed profiles, and repeat the search under a few of them.

    Args:
        plan: a valid plan of ``problem`` with at least one replica.
        error: 0.2 is 20%; below 1.
        seed: of the draws.
        budget: when it ends or is cancelled, the study returns what it has.
        search: repeats the search; None: `default_search`.
        samples: at least 1.
        searches: number of perturbed profiles to search under; None: `SEARCHES`, or fewer for a large fleet.
        threads: of a search.
    """
    budget = budget if budget is not None else Budget()
    profiles = used_fits(problem.profiles, problem.model, tp_sizes(plan, problem))
    fixed = FixedPlan(plan, problem)
    report(Progress(phase="perturbed profiles", elapsed_s=budget.elapsed_s()))
    around = [scaled(profiles, factor) for factor in (1.0, 1.0 + error, 1.0 - error)]
    near = fixed.near(around)
    rng = np.random.default_rng(seed)
    drawn, planned, within = list[Profiles](), list[Reach](), list[Reach]()
    while len(drawn) < samples and not (drawn and budget.is_spent()):
        drawn.append(perturbed(profiles, error, rng))
        planned.append(fixed.as_planned(drawn[-1]))
        within.append(near.within_limits(drawn[-1]))
    edges = list(corners(profiles, error, gpus=fixed.gpus))
    at_corners = [fixed.as_planned(corner.profiles) for corner in edges]
    small = _is_small(problem)
    wanted = searches if searches is not None else SEARCHES if small else SEARCHES_OF_LARGE
    found = []
    if problem.objective.maximises:
        report(Progress(phase="searches under perturbed profiles", elapsed_s=budget.elapsed_s()))
        chosen = _alternating(drawn, edges, wanted)
        search = search or default_search(seed, threads=threads, gap_target=GAP if small else GAP_OF_LARGE)
        found = list(alternatives(plan, problem, chosen, budget=budget, search=search))
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
            CornerReach(
                name=corner.name,
                rate=reach.rate,
                ttft_s=reach.ttft_s,
                tpot_s=reach.tpot_s,
                misses=reach.misses(problem.objective),
            )
            for corner, reach in zip(edges, at_corners, strict=True)
        ),
        runner_up=runner_up(found, fixed, problem, around, drawn, within),
        regret=regret(found, fixed),
        complete=not budget.is_spent(),
    )


def default_search(seed: int, *, threads: int = 1, gap_target: float = GAP) -> Search:
    """Return `solve_placement` as a search that gets the rest of the budget."""
    from hetis.solver.planning import solve_placement

    def search(problem: PlacementProblem, strategy: str, budget: Budget) -> Plan:
        left = Budget(time_limit_s=budget.remaining_s(), clock=budget.clock, cancelled=budget.cancelled)
        return solve_placement(
            problem, strategy=strategy, budget=left, gap_target=gap_target, seed=seed, threads=threads
        )

    return search


def _is_small(problem: PlacementProblem) -> bool:
    return sum(1 for _ in islice(problem.cluster.devices(), SMALL_FLEET + 1)) <= SMALL_FLEET


def _alternating(drawn: Sequence[Profiles], edges: Sequence[Corner], count: int) -> list[Profiles]:
    """Return random draws and corner cases in alternation, so that a truncated search has seen both."""
    pairs = zip_longest(drawn, (corner.profiles for corner in edges))
    return list(islice((one for one in chain.from_iterable(pairs) if one is not None), count))


def _spread(
    of: Callable[[Reach], float],
    now: Reach,
    samples: Sequence[Reach],
    at_corners: Sequence[Reach],
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
