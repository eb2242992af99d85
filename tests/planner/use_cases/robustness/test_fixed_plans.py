"""A plan that stays, under other profiles."""

from __future__ import annotations

import pytest

from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan
from hetis.planner.use_cases.robustness.profile_errors import (
    scaled,
    tp_sizes,
    used_fits,
)
from hetis.solver.cluster import Link
from hetis.solver.profile import Fit, FitScope, Profile
from tests.models import replace
from tests.planner.use_cases.robustness.studied import FLEETS, planned, posed
from tests.solver.check import test_roles as test_check_roles


@pytest.mark.parametrize("fleet", FLEETS)
def test_the_own_profiles_give_what_the_plan_says(fleet: str) -> None:
    plan, problem = planned(fleet), posed(fleet)
    reach = FixedPlan(plan, problem).as_planned(problem.profiles)
    assert reach.rate == pytest.approx(plan.result.value, rel=1e-9)
    assert reach.ttft_s == pytest.approx(max(r.ttft_s for r in plan.replicas), rel=1e-9)
    assert reach.tpot_s == pytest.approx(max(r.tpot_s for r in plan.replicas), rel=1e-9)


@pytest.mark.parametrize("fleet", FLEETS)
def test_doubling_all_times_halves_the_rate_and_doubles_latencies(fleet: str) -> None:
    """Links have latencies that are in no profile: without them all times double."""
    problem = posed(fleet)
    network = replace(problem.cluster.network, default=replace(problem.cluster.network.default, latency_s=0.0))
    groups = tuple(
        replace(group, nic=None if group.nic is None else replace(group.nic, latency_s=0.0))
        for group in problem.cluster.node_groups
    )
    problem = replace(problem, cluster=replace(problem.cluster, network=network, node_groups=groups))
    fixed = FixedPlan(planned(fleet), problem)
    once, twice = fixed.as_planned(problem.profiles), fixed.as_planned(scaled(problem.profiles, 2.0))
    assert twice.rate == pytest.approx(once.rate / 2, rel=1e-9)
    assert twice.ttft_s == pytest.approx(2 * once.ttft_s, rel=1e-9)
    assert twice.tpot_s == pytest.approx(2 * once.tpot_s, rel=1e-9)


def test_a_split_plan_serves_what_both_sides_and_the_links_between_zones_let_through() -> None:
    """Prefill in the east, decode in both zones: on a slow link the west decodes what the link brings, no more."""
    for between in (Link(bytes_per_s=4e8, latency_s=1e-3), Link(bytes_per_s=2e5, latency_s=1e-3)):
        problem = test_check_roles.the_problem(between=between)
        plan = test_check_roles.sound(problem)
        prefill, east, west, unified = (replica.rate for replica in plan.replicas)
        over_link = between.bytes_per_s / (120 * 6 * 2 * 256)  # requests/s; a prompt's KV has P L G kvb bytes
        routed = min(prefill, east + min(west, over_link))
        found = FixedPlan(plan, problem)
        assert found.as_planned({}).rate == pytest.approx(plan.result.utilisation * (unified + routed))


@pytest.mark.parametrize("fleet", FLEETS)
def test_fits_of_other_models_change_nothing(fleet: str) -> None:
    problem, plan = posed(fleet), planned(fleet)
    foreign = {
        gpu: replace(
            profile,
            fits=(*(replace(fit, scope=FitScope(model="another")) for fit in scaled_fits(profile)), *profile.fits),
        )
        for gpu, profile in problem.profiles.items()
    }
    kept = used_fits(foreign, problem.model, tp_sizes(plan, problem))
    assert all(len(kept[gpu].fits) <= len(profile.fits) for gpu, profile in problem.profiles.items())
    fixed = FixedPlan(plan, problem)
    assert fixed.as_planned(kept) == fixed.as_planned(problem.profiles)


def scaled_fits(profile: Profile) -> tuple[Fit, ...]:
    return scaled({profile.gpu: profile}, 3.0)[profile.gpu].fits


@pytest.mark.parametrize("fleet", FLEETS)
def test_as_started_a_plan_meets_its_limits_or_serves_nothing(fleet: str) -> None:
    problem, plan = posed(fleet), planned(fleet)
    fixed = FixedPlan(plan, problem)
    for factor in (0.5, 0.9, 1.0, 1.1, 1.5, 3.0, 100.0):
        profiles = scaled(problem.profiles, factor)
        reach, kept = fixed.as_started(profiles), fixed.as_planned(profiles)
        assert not reach.misses(problem.objective)
        assert reach.rate >= kept.rate * (1 - 1e-9) or kept.misses(problem.objective)
    assert reach.rate == 0.0  # a hundred times slower: no batch is within the limits
