"""The cost model's rate and the simulated one, in cases in which the model neglects little."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hetis.simulator.simulate import simulate
from hetis.simulator.values import Request, Settings
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.check.setting import Setting
from hetis.solver.check.timing import seconds_between_completions, stage_seconds
from hetis.solver.plan import ReplicaPlan
from hetis.solver.problem import PlacementProblem
from tests.simulator.small_plans import pipeline, plan_of, small_problem
from tests.solver.instances import make_workload


class Shuffled:
    """Requests that are always waiting: equally many of each length of the workload, in random order."""

    def __init__(self, problem: PlacementProblem, count: int) -> None:
        bins = problem.workload.bins
        rng = np.random.default_rng(0)
        dealt = itertools.chain.from_iterable(rng.permutation(len(bins)) for _ in range(-(-count // len(bins))))
        self._left = enumerate(itertools.islice(dealt, count))
        self._lengths = [(int(one.prompt_tokens), int(one.output_tokens)) for one in bins]
        self._hit_rate = problem.workload.prefix_hit_rate

    def next_request(self, now_s: float) -> Request | None:
        found = next(self._left, None)
        if found is None:
            return None
        number, chosen = found
        prompt, output = self._lengths[chosen]
        cached = min(round(self._hit_rate * prompt), prompt - 1)
        return Request(
            id=number, arrival_s=now_s, prompt_tokens=prompt, output_tokens=output, prefix_tokens=cached
        )  # fmt: skip


def planned_rate(problem: PlacementProblem, one: ReplicaPlan) -> float:
    """Return 1 / t as the checker derives it."""
    setting = Setting(
        problem=problem,
        moments=problem.workload.moments(block_tokens=problem.assumptions.block_tokens),
        micro_batch=one.micro_batch,
        in_flight=one.in_flight,
        chunk_tokens=one.chunk_tokens,
    )
    stages, last = replica_shape(one, problem, Fleet.of(problem.cluster)).stages, len(one.stages) - 1
    seconds = [stage_seconds(setting, stage, is_first=n == 0, is_last=n == last) for n, stage in enumerate(stages)]
    return 1.0 / seconds_between_completions(setting, stages, seconds)


@pytest.mark.parametrize("lengths", [((128, 64),), ((300, 40), (60, 90)), ((40, 120), (80, 20), (200, 60))])
@pytest.mark.parametrize(("layers", "in_flight"), [((6,), 1), ((3, 3), 1), ((3, 3), 4), ((2, 2, 2), 9)])
@pytest.mark.parametrize(("micro_batch", "hit_rate"), [(4, 0.0), (16, 0.0), (16, 0.5)])
def test_simulated_rates_are_within_a_tenth_of_planned_ones(
    lengths: tuple[tuple[float, float], ...], layers: tuple[int, ...], in_flight: int, micro_batch: int, hit_rate: float
) -> None:
    workload = replace(make_workload(*lengths), prefix_hit_rate=hit_rate)
    problem = small_problem(workload=workload, usable_bytes=400_000_000, block_tokens=16)
    one = pipeline(problem, *layers, micro_batch=micro_batch, in_flight=in_flight, chunk_tokens=64)
    count = 12 * micro_batch * in_flight + 200
    run = simulate(plan_of(one), problem, Shuffled(problem, count), Settings())
    finished = np.sort(run.finished_s)
    first, last = count // 3, int(np.searchsorted(finished, run.arrival_s.max()))
    rate = (last - first) / (finished[last - 1] - finished[first - 1])
    assert rate == pytest.approx(planned_rate(problem, one), rel=0.1)
