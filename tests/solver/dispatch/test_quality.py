"""Dispatch is near the optimum that HiGHS proves in whole groups, over random stages of every kind."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.dispatcher import solve_dispatch
from tests.solver.dispatch.instances import random_problem
from tests.solver.dispatch.specification import solve_specification


def test_quality_over_small_stages_of_every_kind_is_as_the_search_found_it() -> None:
    rng = np.random.default_rng(9058)
    gaps = list[float]()
    while len(gaps) < 60:
        problem = random_problem(
            rng,
            num_devices=int(rng.integers(2, 9)),
            num_requests=int(rng.integers(1, 6)),
            pieces=int(rng.integers(1, 4)),
            head_groups=int(rng.choice([1, 2, 4, 8])),
            tp=[None, 1, 2, 4][int(rng.integers(4))],
            free_ratio=[None, 3.0, 1.3, 1.05][int(rng.integers(4))],
        )
        plan = solve_dispatch(problem)
        if not plan.unplaced:
            best_s = solve_specification(problem, whole=True, time_limit_s=2.0).makespan_s
            gaps.append(plan.makespan_s / min(best_s, plan.makespan_s) - 1)
    assert np.mean(gaps) < 0.003
    assert np.quantile(gaps, 0.95) < 0.015
