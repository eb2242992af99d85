"""Answers on random stages add up to what they did: a heuristic that became a little worse breaks no property.

After an intended change, put in what the failing assertion shows, and say in the commit what became better or worse.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hetis.solver.dispatch.dispatch_problem import DispatchProblem, Path
from hetis.solver.dispatch.dispatcher import solve_dispatch
from tests.solver.dispatch.instances import random_problem

NUM_PROBLEMS = 120
PROVED = 1e-4  # gap of a plan that further search would not have improved


def problem_of(seed: int) -> DispatchProblem:
    """Return a random stage of any kind, with short memory in two of three cases."""
    rng = np.random.default_rng(seed)
    return random_problem(
        rng,
        num_devices=int(rng.integers(2, 13)),
        num_requests=int(rng.integers(1, 10)),
        pieces=int(rng.integers(1, 4)),
        head_groups=int(rng.choice([1, 2, 4, 8])),
        load=rng.choice(["level", "uneven", "idle"]),
        tp=[None, 1, 2, 4][int(rng.integers(4))],
        nic_share=float(rng.choice([0.0, 0.5, 1.2])),
        free_ratio=[None, 3.0, 1.3, 1.1, 1.03, 0.7][int(rng.integers(6))],
        equal_growth=bool(rng.integers(2)),
    )


def test_dispatches_add_up_to_what_they_did() -> None:
    totals: Counter[str] = Counter()
    unsure_us = 0.0  # where HiGHS or ruin and recreate took part, the last digits decide which good plan is found
    for seed in range(NUM_PROBLEMS):
        plan = solve_dispatch(problem_of(seed))
        totals[plan.path] += 1
        totals["bound_us"] += plan.bound_s * 1e6
        totals["relaxed_us"] += plan.relaxed_s * 1e6
        totals["unplaced"] += len(plan.unplaced)
        if plan.path is not Path.LP and plan.gap < PROVED:
            totals["makespan_us"] += plan.makespan_s * 1e6
            totals["squared_groups"] += int(np.square(plan.groups.sum(axis=0)).sum())
        else:
            unsure_us += plan.makespan_s * 1e6
    assert totals == pytest.approx(
        {
            "chain": 26,
            "bound_us": 43564.34834,
            "relaxed_us": 43576.46112,
            "unplaced": 63,
            "makespan_us": 30433.18543,
            "squared_groups": 31497,
            "mixed": 86,
            "lp": 8,
        },
        rel=1e-6,
    )
    assert unsure_us == pytest.approx(13215.594070808444, rel=1e-3)
