"""A plan that misses a limit when simulated is planned again for a tighter one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from benchmarks.measuring.instances import fleet, problem
from hetis.planner.use_cases.record.forms import Tightening, Verification
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.verification import choosing, rates
from hetis.planner.use_cases.verification.choosing import TTFT, verified_plan
from hetis.planner.use_cases.verification.lower_rates import KeptRate, StoppedError
from hetis.planner.use_cases.verification.rates import no_progress
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError
from hetis.solver.plan import Objective, ObjectiveKind, Plan, ReplicaPlan, SolveResult, StagePlan, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem

ASKED_S = 0.5
FIRST_RPS, BOUND_RPS = 10.0, 11.0


def posed(objective: Objective | None = None) -> PlacementProblem:
    goal = Objective(ttft_limit_s=ASKED_S) if objective is None else objective
    return problem(fleet("one node", (1, 4, "L4")), model="Llama-3.1-8B", workload="500/50", objective=goal)


def plan_of(value: float, *, ttft_s: float, objective: Objective) -> Plan:
    stage = StagePlan(
        gpu="L4", tp=1, copies=1, first_layer=0, num_layers=32, devices=("a/0",), kv_head_groups_kept=8
    )  # fmt: skip
    replica = ReplicaPlan(
        rate=value / 0.9, ttft_s=ttft_s, tpot_s=0.05, micro_batch=8, in_flight=1, chunk_tokens=512, kv_tokens=10_000,
        stages=(stage,),
    )  # fmt: skip
    result = SolveResult(
        status=Status.FEASIBLE, objective=objective.kind, value=value, bound=1.1 * value, gap=0.1, unit=objective.unit,
        solve_s=1.0,
    )  # fmt: skip
    return Plan(strategy="hetis", family="all", result=result, objective=objective, replicas=(replica,))


class Fleet:
    """A fake search and simulator: plans by the TTFT limit of their search, and the rates that they keep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, values: Mapping[float, float], kept: Mapping[float, float]):
        self.limits_s, self._values, self._kept = list[float](), values, kept
        self.searched_from_rps = dict[float, float]()  # by the planned rate of plans whose lower rates were searched
        monkeypatch.setattr(choosing, "simulate_at_planned_rate", self.at_planned_rate)
        monkeypatch.setattr(choosing, "with_more_seats", lambda plan, *_: plan)  # KV has no room for more

    def find(self, searched: PlacementProblem) -> Plan:
        limit_s = searched.objective.ttft_limit_s or 0.0
        self.limits_s.append(limit_s)
        for least_s, value in sorted(self._values.items(), reverse=True):
            if limit_s >= least_s:
                return plan_of(value, ttft_s=limit_s, objective=searched.objective)
        raise InfeasibleError(("none",))

    def at_planned_rate(self, plan: Plan, *, problem: PlacementProblem, **_: object) -> rates.AtPlannedRate:
        assert plan.objective == problem.objective, "simulated against the limits that were asked for"
        rate_rps = plan.result.value
        is_kept = self._kept[rate_rps] == rate_rps
        found = Verification(
            rate_rps=rate_rps, num_requests=1_000, kept=is_kept, steady=True, ttft_p95_s=0.4 if is_kept else 0.6,
            tpot_mean_s=0.05, attainment=0.9, kept_rps=rate_rps if is_kept else None,
        )  # fmt: skip

        def kept_below(at_least_rps: float) -> KeptRate | None:
            self.searched_from_rps[rate_rps] = at_least_rps
            kept_rps = self._kept[rate_rps]
            return KeptRate(kept_rps, 4_000, is_confirmed=True) if kept_rps >= at_least_rps else None

        return rates.AtPlannedRate(plan, found, kept_below)

    def settled(
        self, objective: Objective | None = None, *, equal_rps: float | None = None, is_short: bool = False
    ) -> Plan:
        """Return the plan that is shown; ``equal_rps`` is the rate of a plan of equal stages."""
        given = posed(objective)
        first = plan_of(FIRST_RPS, ttft_s=0.48, objective=given.objective)
        first = replace(first, inputs={"seed": 0})
        equal = None if equal_rps is None else plan_of(equal_rps, ttft_s=0.3, objective=given.objective)
        return verified_plan(
            first, given, self.find, seed=0, budget=Budget(), report=no_progress,
            is_short=lambda: is_short, equal_stages=lambda: equal and replace(equal, strategy="uniform"),
        )  # fmt: skip


def test_a_plan_that_keeps_its_limits_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fleet(monkeypatch, {}, {FIRST_RPS: FIRST_RPS})
    found = fake.settled()
    assert fake.limits_s == []
    assert Verified.of(found).tightened is None
    assert found.notes == ()


def test_a_missed_limit_is_tightened_by_planned_over_simulated_then_half_as_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share = ASKED_S / 0.6
    fake = Fleet(monkeypatch, {0.42: 9.0, 0.3: 8.0}, {FIRST_RPS: 5.0, 9.0: 9.0, 8.0: 8.0})
    found = fake.settled()
    assert fake.limits_s == pytest.approx([0.48 * share, 0.48 * share**0.5])
    assert found.result.value == 9.0
    assert Verified.of(found).tightened == Tightening(name=TTFT, asked_s=ASKED_S, planned_s=fake.limits_s[1])


def test_a_limit_that_is_still_missed_is_tightened_as_much_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fleet(monkeypatch, {0.35: 9.0, 0.3: 8.0}, {FIRST_RPS: 5.0, 9.0: 6.0, 8.0: 8.0})
    assert fake.settled().result.value == 8.0
    assert fake.limits_s == pytest.approx([0.48 * ASKED_S / 0.6, 0.48 * (ASKED_S / 0.6) ** 2])


def test_lower_rates_are_simulated_only_if_the_plan_would_be_shown_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {FIRST_RPS: 5.0, 9.0: 6.0, 8.0: 8.0}
    fake = Fleet(monkeypatch, {0.35: 9.0, 0.3: 8.0}, kept)
    fake.settled()
    assert fake.searched_from_rps == pytest.approx({9.0: 8.4, FIRST_RPS: 8.4}), "8 at its own rate, and a little more"
    fake = Fleet(monkeypatch, {0.35: 9.0, 0.3: 8.0}, {**kept, 8.0: 6.5})
    found = fake.settled()
    assert fake.searched_from_rps == {8.0: 0.0, 9.0: 6.5, FIRST_RPS: 6.5}
    assert found.result.value == 8.0
    assert "(10 requests/s) keeps the limits at less than 6.5 requests/s" in found.notes[0]


def test_a_plan_below_whose_rate_nothing_is_known_is_said_to_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled, while lower rates of the first plan are simulated."""
    fake = Fleet(monkeypatch, {0.3: 8.0}, {FIRST_RPS: 5.0, 8.0: 8.0})

    def cancelled(plan: Plan, *, problem: PlacementProblem, **_: object) -> rates.AtPlannedRate:
        def kept_below(_: float) -> KeptRate | None:
            raise StoppedError

        return fake.at_planned_rate(plan, problem=problem)._replace(kept_below=kept_below)

    monkeypatch.setattr(choosing, "simulate_at_planned_rate", cancelled)
    found = fake.settled()
    assert found.result.value == 8.0
    assert "(10 requests/s) misses the limits; the bound" in found.notes[0]


def test_the_other_plan_answers_the_first_problem_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Fleet(monkeypatch, {0.3: 8.0}, {FIRST_RPS: 5.0, 8.0: 8.0}).settled()
    assert found.objective.ttft_limit_s == ASKED_S
    assert (found.result.bound, found.result.gap) == pytest.approx((BOUND_RPS, BOUND_RPS / 8.0 - 1.0))
    assert found.result.status is Status.FEASIBLE
    assert found.inputs["seed"] == 0, "the inputs are those of the first"
    assert found.notes == (
        "planned for a TTFT p95 of 0.4 s where 0.5 s are asked for: simulated, the best plan for 0.5 s by the model "
        "(10 requests/s) keeps the limits at less than 8.4 requests/s; the bound is that for 0.5 s",
    )


def test_the_first_plan_stays_if_it_serves_most_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Fleet(monkeypatch, {0.3: 8.0}, {FIRST_RPS: 9.5, 8.0: 8.0}).settled()
    assert found.result.value == FIRST_RPS
    assert Verified.of(found).tightened is None
    verification = Verified.of(found).verification
    assert verification.kept_rps == 9.5


def test_a_little_is_given_up_for_a_plan_that_keeps_its_limits_at_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Fleet(monkeypatch, {0.3: 8.0}, {FIRST_RPS: 8.3, 8.0: 8.0}).settled()
    assert found.result.value == 8.0


def test_the_first_plan_stays_if_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fleet(monkeypatch, {}, {FIRST_RPS: 5.0})
    assert fake.settled().result.value == FIRST_RPS
    assert len(fake.limits_s) == 2


def test_at_a_demanded_rate_the_cheapest_plan_that_keeps_the_limits_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = Objective(kind=ObjectiveKind.GPUS, ttft_limit_s=ASKED_S, demand_rps=1.0)
    fake = Fleet(monkeypatch, {0.42: 12.0, 0.3: 14.0}, {FIRST_RPS: 5.0, 12.0: 12.0, 14.0: 14.0})
    found = fake.settled(goal)
    assert found.result.value == 12.0
    assert "(10 GPUs) misses the limits; the bound" in found.notes[0]
    assert fake.searched_from_rps == {}, "lower rates than the demanded one are of no use"


def test_equal_stages_that_keep_more_are_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Fleet(monkeypatch, {0.3: 8.0}, {FIRST_RPS: 5.0, 8.0: 6.0, 9.5: 9.0}).settled(equal_rps=9.5)
    verification = Verified.of(found).verification
    assert (found.result.value, verification.kept_rps) == (9.5, 9.0)
    assert (found.strategy, found.result.bound, found.inputs["seed"]) == ("hetis", BOUND_RPS, 0)
    assert found.inputs["equal_stages_chosen"] is True
    assert Verified.of(found).is_other_than_best
    assert found.notes == (
        "of equal stages: simulated, the best plan by the model (10 requests/s) keeps the limits at less than 9 "
        "requests/s; the bound is that of all plans",
    )


def test_equal_stages_that_keep_less_are_known_to(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Fleet(monkeypatch, {0.3: 8.0}, {FIRST_RPS: 5.0, 8.0: 8.0, 9.5: 7.0}).settled(equal_rps=9.5)
    assert (found.result.value, found.inputs["equal_stages_chosen"]) == (8.0, False)
    first = Fleet(monkeypatch, {}, {FIRST_RPS: 9.6, 9.5: 9.0}).settled(equal_rps=9.5)
    assert (first.result.value, first.inputs["equal_stages_chosen"]) == (FIRST_RPS, False)
    assert not Verified.of(first).is_other_than_best
    assert "equal_stages_chosen" not in Fleet(monkeypatch, {0.3: 8.0}, {FIRST_RPS: 5.0, 8.0: 8.0}).settled().inputs


def test_equal_stages_are_not_looked_for_if_the_plan_keeps_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fleet(monkeypatch, {}, {FIRST_RPS: FIRST_RPS})
    assert "equal_stages_chosen" not in fake.settled(equal_rps=9.5).inputs, "9.5 is no rate of the fake: not simulated"


def test_lower_rates_come_before_another_search_that_may_use_up_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fleet(monkeypatch, {0.3: 8.0}, {FIRST_RPS: 5.0, 8.0: 8.0, 9.5: 7.0})
    searches = len(fake.limits_s)

    def find(searched: PlacementProblem) -> Plan:
        nonlocal searches
        searches += 1
        assert fake.searched_from_rps == {FIRST_RPS: 0.0, 9.5: 5.0}, "of equal stages only those that would be shown"
        raise InfeasibleError(("none",))

    monkeypatch.setattr(fake, "find", find)
    assert fake.settled(equal_rps=9.5, is_short=True).result.value == 9.5
    assert searches == 2


def test_lower_rates_that_are_known_are_told_from_any_rate_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, given = Fleet(monkeypatch, {}, {FIRST_RPS: 5.0}), posed()
    missing = fake.at_planned_rate(plan_of(FIRST_RPS, ttft_s=0.48, objective=given.objective), problem=given)
    known = missing.with_lower_rates(2.0)
    fake.searched_from_rps.clear()
    found = [known.kept_below(least_rps) for least_rps in (4.0, 5.0, 6.0)]
    assert [one and one.rate_rps for one in found] == [5.0, 5.0, None]
    assert fake.searched_from_rps == {}, "they are not simulated again"


def test_a_search_again_looks_for_no_reasons() -> None:
    budget = Budget(explains=False)
    with pytest.raises(InfeasibleError, match=r"^no plan of the family exists$"):
        solve_placement(posed(Objective(ttft_limit_s=1e-6)), budget=budget)
