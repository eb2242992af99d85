"""OEF's two rules: their promises on random problems, and what they do not promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from hetis.solver.shares.fair_shares import (
    cooperative,
    cooperative_bound,
    non_cooperative,
    non_cooperative_bound,
    solve_shares,
)
from hetis.solver.shares.properties import best_claim, properties_of
from hetis.solver.shares.share_problem import FairnessRule, GpuShare, ShareJob, ShareProblem, ShareTenant, tenant_values
from hetis.solver.shares.shares_check import check_shares
from tests.solver.shares.instances import problems, random_problem


def one_job_each(gpus: dict[str, int], *speedups: tuple[float, ...]) -> ShareProblem:
    return ShareProblem(
        gpus=tuple(GpuShare(gpu=gpu, count=count) for gpu, count in gpus.items()),
        tenants=tuple(
            ShareTenant(name=f"t{i}", jobs=(ShareJob(name="only", speedups=each),)) for i, each in enumerate(speedups)
        ),
    )


def test_cooperative_shares_are_without_envy_and_pay_on_a_thousand_random_problems() -> None:
    generator = np.random.default_rng(7)
    for _ in range(1000):
        problem = random_problem(generator, most_tenants=4)
        shares = cooperative(problem, tie_seconds=0.0)
        found = properties_of(problem, shares.amounts)
        assert found.is_envy_free
        assert found.has_sharing_incentive
        assert not check_shares(problem, shares)
        assert shares.gap < 1e-6


@settings(max_examples=30, deadline=None)
@given(problems)
def test_every_rule_keeps_to_the_fleet_and_proves_its_value(problem: ShareProblem) -> None:
    for rule in FairnessRule:
        shares = solve_shares(problem, rule)
        assert not check_shares(problem, shares), rule
        if rule in (FairnessRule.COOPERATIVE, FairnessRule.NON_COOPERATIVE, FairnessRule.EQUAL):
            assert shares.gap < 1e-6
        assert shares.value <= shares.bound * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(problems)
def test_ties_are_broken_without_losing_value_and_never_towards_more_types(problem: ShareProblem) -> None:
    for rule in (cooperative, non_cooperative):
        plain, settled = rule(problem, tie_seconds=0.0), rule(problem)
        assert settled.value == pytest.approx(plain.value, rel=1e-7)
        before, after = properties_of(problem, plain.amounts), properties_of(problem, settled.amounts)
        assert after.spans.sum() <= before.spans.sum()


def test_of_equal_optima_the_one_on_adjacent_types_is_chosen() -> None:
    # Equal tenants: every split of equal value is optimal, for instance halves of all three types.
    problem = one_job_each({"slow": 4, "middle": 4, "fast": 2}, (1.0, 2.0, 4.0), (1.0, 2.0, 4.0))
    found = properties_of(problem, cooperative(problem).amounts)
    assert found.contiguous.all()
    assert found.spans.sum() <= 4  # a tenant's value of 10 takes at least two types


def test_equal_shares_have_equal_value_per_part() -> None:
    problem = one_job_each({"slow": 4, "fast": 4}, (1.0, 2.0), (1.0, 8.0), (1.0, 3.0))
    heavier = replace(problem, tenants=(replace(problem.tenants[0], weight=3.0), *problem.tenants[1:]))
    values = heavier.values(non_cooperative(heavier).amounts)
    assert values / heavier.weights == pytest.approx([values[1]] * 3)


def test_a_weight_of_two_is_two_clones() -> None:
    pair = one_job_each({"slow": 6, "fast": 3}, (1.0, 2.0), (1.0, 5.0))
    heavy = replace(pair, tenants=(replace(pair.tenants[0], weight=2.0), pair.tenants[1]))
    clones = one_job_each({"slow": 6, "fast": 3}, (1.0, 2.0), (1.0, 2.0), (1.0, 5.0))
    for rule in (cooperative, non_cooperative):
        one, two = rule(heavy), rule(clones)
        assert one.value == pytest.approx(two.value)


def test_jobs_of_a_tenant_share_its_weight() -> None:
    gpus = (GpuShare(gpu="slow", count=8), GpuShare(gpu="fast", count=4))
    jobs = (ShareJob(name="a", speedups=(1.0, 2.0)), ShareJob(name="b", speedups=(1.0, 6.0)))
    other = ShareTenant(name="other", jobs=(ShareJob(name="only", speedups=(1.0, 3.0)),))
    problem = ShareProblem(gpus=gpus, tenants=(ShareTenant(name="two", jobs=jobs), other))
    shares = cooperative(problem)
    assert problem.weights.tolist() == [0.5, 0.5, 1.0]
    assert tenant_values(problem, shares.amounts).sum() == pytest.approx(shares.value)


def test_claiming_more_never_pays_in_the_non_cooperative_mode_and_claiming_less_can() -> None:
    generator = np.random.default_rng(3)
    deflated = 0
    for _ in range(15):
        problem = random_problem(generator, most_tenants=4)
        assert best_claim(problem, FairnessRule.NON_COOPERATIVE, 0, inflate=True, tries=6).gain < 1e-6
        deflated += best_claim(problem, FairnessRule.NON_COOPERATIVE, 0, inflate=False, tries=6).gain > 1e-6
    assert deflated > 5


def test_the_cooperative_mode_can_be_gamed_by_claiming_more() -> None:
    # Why provider-side profiling is needed: docs/fair.md.
    generator = np.random.default_rng(5)
    gains = [
        best_claim(random_problem(generator), FairnessRule.COOPERATIVE, 0, inflate=True, tries=8).gain
        for _ in range(15)
    ]
    assert max(gains) > 0.01


def test_equal_value_may_leave_a_tenant_below_an_equal_split() -> None:
    problem = one_job_each({"slow": 4, "fast": 4}, (1.0, 10.0), (1.0, 1.1))
    found = properties_of(problem, non_cooperative(problem).amounts)
    assert not found.has_sharing_incentive
    assert not found.is_envy_free


@settings(max_examples=30, deadline=None)
@given(problems)
def test_any_multipliers_prove_a_bound(problem: ShareProblem) -> None:
    generator = np.random.default_rng(len(problem.weights))
    count = len(problem.weights)
    together, apart = cooperative(problem, tie_seconds=0.0), non_cooperative(problem, tie_seconds=0.0)
    for _ in range(5):
        assert cooperative_bound(problem, generator.exponential(0.3, (count, count))) >= together.value * (1 - 1e-9)
        assert non_cooperative_bound(problem, generator.normal(0.0, 0.3, count)) >= apart.value * (1 - 1e-9)


def test_the_checker_sees_false_claims_of_an_answer() -> None:
    problem = one_job_each({"slow": 4, "fast": 4}, (1.0, 2.0), (1.0, 8.0))
    shares = cooperative(problem)
    swapped = replace(shares, amounts=shares.amounts[::-1])
    assert any("envies" in sentence for sentence in check_shares(problem, swapped))
    assert any("are given away" in s for s in check_shares(problem, replace(shares, amounts=shares.amounts * 1.01)))
    assert any("total value" in s for s in check_shares(problem, replace(shares, value=shares.value * 1.01)))
    assert any("prove a bound" in s for s in check_shares(problem, replace(shares, multipliers=shares.multipliers + 1)))
    assert any("above its bound" in s for s in check_shares(problem, replace(shares, bound=shares.value * 0.9)))
    unequal = replace(non_cooperative(problem), amounts=problem.equal_split)
    assert any("must be equal" in sentence for sentence in check_shares(problem, unequal))
