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
from hetis.solver.dispatch.local_search import placement_of
from hetis.solver.dispatch.problem import DispatchPlan, DispatchProblem, FloatArray, IntArray
from hetis.solver.dispatch.tables import (
    Costs,
    Placement,
    Running,
    card_s,
    costs_of,
    empty_placement,
    makespan,
    put,
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
    costs, load = costs_of(problem.stage), problem.load
    placed = placed[np.argsort(problem.requests.context_tokens[placed], kind="stable")]
    groups = plan.groups.copy()
    groups[placed] = _rearrange(
        costs,
        running_load(costs, load.heads, load.kv_bytes),
        load.free_blocks,
        problem.requests.context_tokens[placed],
        problem.requests.blocks(problem.stage.heads.block_tokens)[placed],
        plan.groups[placed],
        plan.makespan_s,
        power,
    )
    return groups


@kernel
def _rearrange(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, groups: IntArray,
    limit_s: float, power: float,
) -> IntArray:  # fmt: skip
    given = placement_of(costs, running, free_blocks, contexts, blocks, groups)
    if power == 0.0:
        first = empty_placement(costs, running, free_blocks, len(contexts))
        return first.x if _first_fit(costs, running, first, contexts, blocks, limit_s) else given.x
    greedy = empty_placement(costs, running, free_blocks, len(contexts))
    complete = _cheapest_fit(costs, running, greedy, contexts, blocks, limit_s, power)
    _descend(costs, running, given, contexts, blocks, limit_s, power)
    if not complete:
        return given.x
    _descend(costs, running, greedy, contexts, blocks, limit_s, power)
    return greedy.x if _total(greedy.seconds, power) < _total(given.seconds, power) else given.x


@kernel
def _total(seconds: FloatArray, power: float) -> float:
    return float((seconds**power).sum())


@kernel
def _fits(
    costs: Costs, running: Running, placement: Placement, device: int, groups: int, context: int, blocks: int,
    limit_s: float,
) -> float:  # fmt: skip
    """Return the device's seconds with this many more groups, or infinity if blocks or the limit do not allow them."""
    if placement.room[device] < groups * blocks:
        return np.inf
    late = seconds_with(costs, running, placement, device, groups, groups * context)
    workers = placement.on_workers[0] + (groups if device != costs.primary else 0)
    if costs.primary >= 0 and card_s(costs, running, workers) > limit_s * SLACK:
        return np.inf
    return late if late <= limit_s * SLACK else np.inf


@kernel
def _first_fit(
    costs: Costs,
    running: Running,
    placement: Placement,
    contexts: IntArray,
    blocks: IntArray,
    limit_s: float,
) -> bool:
    num = len(costs.unit)
    for j in range(len(contexts) - 1, -1, -1):
        left = costs.head_groups
        for turn in range(num):
            i = (turn + contexts[j]) % num
            unit = costs.unit[i]
            while left >= unit and _fits(costs, running, placement, i, unit, contexts[j], blocks[j], limit_s) < np.inf:
                put(costs, running, placement, j, i, unit, contexts[j], blocks[j])
                left -= unit
        if left > 0:
            return False
    return makespan(costs, running, placement) <= limit_s * SLACK


@kernel
def _cheapest_fit(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, limit_s: float,
    power: float,
) -> bool:  # fmt: skip
    for j in range(len(contexts) - 1, -1, -1):
        left = costs.head_groups
        while left > 0:
            best, least = -1, np.inf
            for i in range(len(costs.unit)):
                unit = costs.unit[i]
                if unit > left:
                    continue
                late = _fits(costs, running, placement, i, unit, contexts[j], blocks[j], limit_s)
                more = (late**power - placement.seconds[i] ** power) / unit
                if more < least:
                    best, least = i, more
            if best < 0:
                return False
            put(costs, running, placement, j, best, costs.unit[best], contexts[j], blocks[j])
            left -= costs.unit[best]
    return makespan(costs, running, placement) <= limit_s * SLACK


@kernel
def _descend(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, limit_s: float,
    power: float,
) -> None:  # fmt: skip
    """Move single units, the best move first, while the sum falls and the limit holds."""
    num = len(costs.unit)
    for _ in range(MOST_STEPS):
        best_j, best_i, best_k, best_n = -1, -1, -1, 0
        most = 1e-9 * _total(placement.seconds, power)
        for j in range(len(contexts)):
            for i in range(num):
                for k in range(num):
                    n = max(costs.unit[i], costs.unit[k])
                    if i == k or placement.x[j, i] < n:
                        continue
                    late = _fits(costs, running, placement, k, n, contexts[j], blocks[j], limit_s)
                    if late == np.inf:
                        continue
                    early = seconds_with(costs, running, placement, i, -n, -n * contexts[j])
                    gain = placement.seconds[i] ** power - early**power + placement.seconds[k] ** power - late**power
                    if gain > most:
                        most, best_j, best_i, best_k, best_n = gain, j, i, k, n
        if best_j < 0:
            return
        j = best_j
        put(costs, running, placement, j, best_i, -best_n, contexts[j], blocks[j])
        put(costs, running, placement, j, best_k, best_n, contexts[j], blocks[j])
