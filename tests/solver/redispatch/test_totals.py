"""Answers on random stages add up to what they did, as in `tests.solver.dispatch.test_totals`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem
from hetis.solver.redispatch.redispatcher import solve_redispatch
from hetis.solver.redispatch.triggers import triggers
from tests.solver.redispatch.instances import random_problem, with_moves_under_way

NUM_PROBLEMS = 75


def problem_of(seed: int) -> RedispatchProblem:
    """Return a random stage of any kind."""
    rng = np.random.default_rng(seed)
    head_groups = int(rng.choice([1, 2, 4, 8]))
    is_large = rng.random() < 0.12  # so large that the integer program considers only some requests
    problem = random_problem(
        seed,
        num_devices=int(rng.integers(6, 17) if is_large else rng.integers(2, 6)),
        num_requests=int(rng.integers(20, 60) if is_large else rng.integers(1, 13)),
        head_groups=head_groups,
        pieces=int(rng.integers(1, 3)),
        tp=[None, 1, min(2, head_groups)][int(rng.integers(3))],
        slack=float(rng.choice([0.0, 0.05, 0.3, 2.0])),
        draining=bool(rng.random() < 0.3),
        budget_share=float(rng.choice([0.1, 0.3, np.inf, np.inf])),
        least_gain=float(rng.choice([0.0, 0.0, 0.05])),
        high_water=float(rng.choice([0.5, 0.9, 1.0])),
    )
    if rng.random() < 0.25:
        problem = replace(problem, snapshot=with_moves_under_way(problem.snapshot, rng))
    if rng.random() < 0.2:
        problem = replace(problem, full=frozenset({int(rng.integers(len(problem.snapshot.devices)))}))
    return problem


def test_redispatches_add_up_to_what_they_did() -> None:
    totals: Counter[str] = Counter()
    for seed in range(NUM_PROBLEMS):
        problem = problem_of(seed)
        plan = solve_redispatch(problem)
        totals["objective_us"] += plan.objective_s * 1e6
        totals["bound_us"] += plan.bound_s * 1e6
        totals["makespan_us"] += plan.makespan_after_s * 1e6
        totals["short"] += plan.short_after
        totals["copied_mb"] += plan.num_bytes / 1e6
        totals["refused"] += len(plan.refused)
        totals["due"] += len(triggers(problem.snapshot, Dispatcher(problem.snapshot.stage)))
        for move in plan.moves:
            totals[f"moves for {move.reason}"] += 1
            totals["groups"] += move.groups
            totals["waves"] += move.wave
            totals["seconds"] += move.seconds
            totals["payback_steps"] += move.payback_steps or 0.0
    assert totals == pytest.approx(
        {
            "objective_us": 14731266.23,
            "bound_us": 9144709.709,
            "makespan_us": 2703.005049,
            "short": 17406.71784,
            "copied_mb": 1355.00288,
            "refused": 0,
            "due": 127,
            "moves for drain": 35,
            "groups": 299,
            "waves": 2,
            "seconds": 0.1861062789,
            "payback_steps": 7230.329788,
            "moves for balance": 145,
            "moves for memory": 6,
        },
        rel=1e-6,
    )
