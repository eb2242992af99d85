"""Whole GPUs round after round."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.shares.fair_shares import cooperative
from hetis.solver.shares.properties import next_round
from hetis.solver.shares.share_problem import GpuShare, ShareJob, ShareProblem, ShareTenant
from tests.solver.shares.instances import problems


@settings(max_examples=40, deadline=None)
@given(problems, st.integers(1, 40))
def test_rounds_never_hand_out_more_than_there_is_and_books_are_kept(problem: ShareProblem, count: int) -> None:
    amounts = cooperative(problem, tie_seconds=0.0).amounts
    owed, total = np.zeros_like(amounts), np.zeros_like(amounts)
    for _ in range(count):
        one = next_round(problem, amounts, owed)
        assert (one.granted >= 0).all()
        assert (one.granted.sum(axis=0) <= problem.counts).all()
        given_to = one.granted.sum(axis=1)
        assert ((given_to == 0) | (given_to >= problem.min_gpus)).all()
        owed, total = one.owed, total + one.granted
    assert np.allclose(total + owed, count * amounts, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(problems)
def test_over_many_rounds_everybody_who_can_run_has_his_share(problem: ShareProblem) -> None:
    single = ShareProblem(
        gpus=problem.gpus,
        tenants=tuple(
            ShareTenant(
                name=t.name, weight=t.weight, jobs=tuple(ShareJob(name=j.name, speedups=j.speedups) for j in t.jobs)
            )
            for t in problem.tenants
        ),
    )
    amounts = cooperative(single, tie_seconds=0.0).amounts
    owed, total = np.zeros_like(amounts), np.zeros_like(amounts)
    for _ in range(400):
        one = next_round(single, amounts, owed)
        owed, total = one.owed, total + one.granted
    assert np.abs(total / 400 - amounts).max() < 0.02


def test_who_waits_for_a_job_that_needs_two_gpus_gets_them_every_other_round() -> None:
    problem = ShareProblem(
        gpus=(GpuShare(gpu="only", count=2),),
        tenants=tuple(ShareTenant(name=n, jobs=(ShareJob(name="j", speedups=(1.0,), min_gpus=2),)) for n in ("a", "b")),
    )
    owed, taken = np.zeros((2, 1)), []
    for _ in range(6):
        one = next_round(problem, np.ones((2, 1)), owed)
        owed = one.owed
        taken.append(tuple(int(n) for n in one.granted[:, 0]))
    assert sorted(taken[:2]) == [(0, 2), (2, 0)]
    assert taken[:2] == taken[2:4] == taken[4:]
