"""Rules for placing head groups that do not affect the makespan, compared over a sequence of admissions.

If one device is the slowest in any case, every placement that keeps the others below it is optimal now, and later
admissions, growth and drift show which one was good. All rules here keep the makespan of the given plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measuring.drift import Rearranged, Run, Scenario, Still, Tally
from benchmarks.measuring.rows import Row
from hetis.solver import dispatch
from hetis.solver.compiled import kernel_of
from hetis.solver.dispatch.problem import DispatchPlan, DispatchProblem, FloatArray, IntArray
from hetis.solver.dispatch.tables import (
    LoadedStage,
    Placement,
    card_s,
    costs_of,
    empty_placement,
    makespan,
    put,
    put_all,
    running_load,
    seconds_with,
)

kernel = kernel_of(Path(__file__).parent, Path(dispatch.__file__).parent)
SCENARIOS = (
    Scenario(name="steady"),
    Scenario(name="long", long_share=0.1),
    Scenario(name="slow", slow="3090-0", slow_at=100),
    Scenario(name="few", requests=30),
)
MOST_STEPS = 400
SLACK = 1.0 + 1e-9


def least_power(power: float) -> Rearranged:
    """Return the rule with the least sum of the devices' times to this power (1: work, 2: squares), by single moves."""

    def rearranged(problem: DispatchProblem, plan: DispatchPlan) -> IntArray:
        return _searched(problem, plan, power)

    return rearranged


def any_placement(problem: DispatchProblem, plan: DispatchPlan) -> IntArray:
    """Take the first device with room in time and memory, in varying order, as ``min z`` alone may do."""
    return _searched(problem, plan, 0.0)


RULES: dict[str, Rearranged | None] = {
    "next bottleneck (ours)": None,
    "least squares": least_power(2.0),
    "least work": least_power(1.0),
    "any": any_placement,
}


def measured(*, quick: bool, only: str) -> Iterator[Row]:
    """Yield every scenario with every rule, and how its makespans differ from the first rule's, with standard error."""
    steps, seeds = (60, 2) if quick else (400, 8)
    for scenario in (s for s in (SCENARIOS[:1] if quick else SCENARIOS) if only in s.name):
        ours: Sequence[Tally] = ()
        for name, rule in RULES.items():
            tallies = [
                Run(scenario, Still(evicts_itself=True), theta=np.inf, seed=seed, rearranged=rule).run(steps)
                for seed in range(seeds)
            ]
            ours = ours or tallies
            means = [np.mean(t.makespans_s) for t in tallies]
            more = np.divide(means, [np.mean(t.makespans_s) for t in ours])
            yield {
                "name": f"{scenario.name}, {name}",
                "mean_us": 1e6 * float(np.mean(means)),
                "over_ours": float(more.mean()) - 1,
                "standard_error": float(more.std(ddof=1) / np.sqrt(seeds)),
                "over_ideal": float(np.mean([np.divide(t.makespans_s, t.ideals_s) for t in tallies])) - 1,
                "raised": sum(t.raised for t in tallies) / sum(t.admissions for t in tallies),
                "admissions": sum(t.admissions for t in tallies),
                "seeds": seeds,
            }


def _searched(problem: DispatchProblem, plan: DispatchPlan, power: float) -> IntArray:
    """Return the plan's groups [J, D] after a local search."""
    placed = np.flatnonzero(plan.groups.any(axis=1))
    if not len(placed):
        return plan.groups
    load = problem.load
    placed = placed[np.argsort(problem.requests.context_tokens[placed], kind="stable")]
    groups = plan.groups.copy()
    stage = running_load(costs_of(problem.stage), load.heads, load.kv_bytes)
    blocks = problem.requests.blocks(problem.stage.heads.block_tokens)[placed]
    placement = empty_placement(stage, load.free_blocks, problem.requests.context_tokens[placed], blocks)
    groups[placed] = _rearrange(stage, placement, load.free_blocks, plan.groups[placed], plan.makespan_s, power)
    return groups


@kernel
def _rearrange(
    stage: LoadedStage, given: Placement, free_blocks: IntArray, groups: IntArray, limit_s: float, power: float
) -> IntArray:
    """Return groups [J, D] by the rule; ``given`` is empty."""
    put_all(stage, given, groups)
    other = empty_placement(stage, free_blocks, given.contexts, given.blocks)
    if power == 0.0:
        return other.x if _first_fit(stage, other, limit_s) else given.x
    complete = _cheapest_fit(stage, other, limit_s, power)
    _descend(stage, given, limit_s, power)
    if not complete:
        return given.x
    _descend(stage, other, limit_s, power)
    return other.x if _total(other.seconds, power) < _total(given.seconds, power) else given.x


@kernel
def _total(seconds: FloatArray, power: float) -> float:
    return float((seconds**power).sum())


@kernel
def _fits(stage: LoadedStage, placement: Placement, request: int, device: int, groups: int, limit_s: float) -> float:
    """Return the device's seconds with this many more groups, or infinity if blocks or the limit do not allow them."""
    if placement.room[device] < groups * placement.blocks[request]:
        return np.inf
    late = seconds_with(stage, placement, device, groups, groups * placement.contexts[request])
    workers = placement.on_workers[0] + (groups if device != stage.primary else 0)
    if stage.primary >= 0 and card_s(stage, workers) > limit_s * SLACK:
        return np.inf
    return late if late <= limit_s * SLACK else np.inf


@kernel
def _first_fit(stage: LoadedStage, placement: Placement, limit_s: float) -> bool:
    num = len(stage.unit)
    for j in range(len(placement.contexts) - 1, -1, -1):
        left = stage.head_groups
        for turn in range(num):
            i = (turn + placement.contexts[j]) % num
            unit = stage.unit[i]
            while left >= unit and _fits(stage, placement, j, i, unit, limit_s) < np.inf:
                put(stage, placement, j, i, unit)
                left -= unit
        if left > 0:
            return False
    return makespan(stage, placement) <= limit_s * SLACK


@kernel
def _cheapest_fit(stage: LoadedStage, placement: Placement, limit_s: float, power: float) -> bool:
    for j in range(len(placement.contexts) - 1, -1, -1):
        left = stage.head_groups
        while left > 0:
            best, least = -1, np.inf
            for i in range(len(stage.unit)):
                unit = stage.unit[i]
                if unit > left:
                    continue
                late = _fits(stage, placement, j, i, unit, limit_s)
                more = (late**power - placement.seconds[i] ** power) / unit
                if more < least:
                    best, least = i, more
            if best < 0:
                return False
            put(stage, placement, j, best, stage.unit[best])
            left -= stage.unit[best]
    return makespan(stage, placement) <= limit_s * SLACK


@kernel
def _descend(stage: LoadedStage, placement: Placement, limit_s: float, power: float) -> None:
    """Move single units, the best move first, while the sum falls and the limit holds."""
    num = len(stage.unit)
    for _ in range(MOST_STEPS):
        best_j, best_i, best_k, best_n = -1, -1, -1, 0
        most = 1e-9 * _total(placement.seconds, power)
        for j in range(len(placement.contexts)):
            for i in range(num):
                for k in range(num):
                    n = max(stage.unit[i], stage.unit[k])
                    if i == k or placement.x[j, i] < n:
                        continue
                    late = _fits(stage, placement, j, k, n, limit_s)
                    if late == np.inf:
                        continue
                    early = seconds_with(stage, placement, i, -n, -n * placement.contexts[j])
                    gain = placement.seconds[i] ** power - early**power + placement.seconds[k] ** power - late**power
                    if gain > most:
                        most, best_j, best_i, best_k, best_n = gain, j, i, k, n
        if best_j < 0:
            return
        j = best_j
        put(stage, placement, j, best_i, -best_n)
        put(stage, placement, j, best_k, best_n)
