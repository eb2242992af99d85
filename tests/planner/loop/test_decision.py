"""Decisions: shortages, savings, other requests, lost nodes, and nothing at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.planner.loop.decision import InForce, Verdict, decide, is_short, is_spare, kept_rate, solve
from hetis.planner.loop.drift import Drift
from hetis.planner.loop.forecast import History, Window
from hetis.planner.loop.settings import LoopSettings
from hetis.planner.use_cases.other_fleets.replan import PosedReplan
from hetis.planner.use_cases.prices import price_of_plan
from hetis.solver.advice import without_nodes
from hetis.solver.check import check_plan
from hetis.solver.cluster import node_of
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import ObjectiveKind
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.traffic import SECONDS, TOKENS, Histogram, TrafficSketch
from tests.planner.loop.served import fleet, plan_for, steady

LONG_AGO = -1e9


def in_force(demand_rps: float, **changes: object) -> InForce:
    return replace(InForce(found=plan_for(demand_rps), fleet=fleet(), since_s=LONG_AGO), **changes)


def test_a_plan_that_serves_its_demand_at_least_cost_is_kept() -> None:
    found = decide(steady(8.0), in_force(8.2), LoopSettings())
    assert found.verdict is Verdict.KEEP
    assert found.found is None
    assert found.capacity_rps == pytest.approx(kept_rate(plan_for(8.2).plan, plan_for(8.2).problem))
    assert "keeps its limits up to" in found.reason


def test_a_shortage_is_ended_by_a_checked_plan_whose_steps_never_serve_less() -> None:
    found = decide(steady(12.0), in_force(6.0), LoopSettings())
    assert found.verdict is Verdict.CHANGE
    assert found.found is not None
    assert check_plan(found.next.plan, found.next.problem) == ()
    assert kept_rate(found.next.plan, found.next.problem) >= 12.0 * (1 - 1e-6)
    assert found.found.transition.lowest >= found.found.transition.before * (1 - 1e-6)
    assert 0 < found.gain <= found.bound
    assert found.unit == "requests/s"
    assert found.usd_per_hour is not None
    assert found.usd_per_hour > 0


@given(st.floats(1.0, 14.0), st.floats(1.1, 3.0))
@settings(max_examples=4)
def test_the_way_out_of_a_shortage_serves_no_less_than_now_while_cards_are_idle(before_rps: float, more: float) -> None:
    """Brute force: every order of the steps, and cards that replicas of the plan in force could be repeated on."""
    now = in_force(round(before_rps))
    capacity = kept_rate(now.found.plan, now.found.problem)
    demand_rps = capacity * more
    found = decide(steady(demand_rps), now, LoopSettings())
    if found.verdict is not Verdict.CHANGE:
        return
    assert found.found is not None
    way = found.found.transition
    idle = len(list(fleet().devices())) - len(now.found.plan.devices())
    if idle >= len(now.found.plan.devices()) * (more - 1) + 1:  # the same replicas once more would do
        assert way.lowest >= way.before * (1 - 1e-6)
    assert way.lowest == pytest.approx(way.best_lowest)


def test_a_way_that_serves_less_gives_way_to_one_whose_replicas_stay() -> None:
    """The first answer stops what serves: here by a search that is told nothing of what runs."""
    now, horizons = in_force(6.0), list[float]()

    def stops_all(posed: PosedReplan, settings: LoopSettings) -> Replanning:
        horizons.append(settings.costs.horizon_s)
        found = solve(posed, settings)
        stops = settings.costs.horizon_s == LoopSettings().costs.horizon_s
        return replace(found, transition=replace(found.transition, lowest=0.0)) if stops else found

    found = decide(steady(12.0), now, LoopSettings(), solve=stops_all)
    assert found.found is not None
    assert found.found.transition.lowest >= found.found.transition.before * (1 - 1e-6)
    assert len(horizons) == 2
    assert kept_rate(found.next.plan, found.next.problem) >= 12.0 * (1 - 1e-6)


def test_first_tokens_that_are_late_count_the_plan_as_slow_as_it_serves() -> None:
    """It serves 5 of 6 requests/s though its model says more: by so much more is planned for."""
    history = steady(6.0)
    firsts = Histogram.of_values(SECONDS, [30.0] * 50)
    windows = tuple(
        Window(start_s=history.end_s - 10 * k, traffic=TrafficSketch(seconds=10, arrivals=60, ttft_s=firsts))
        for k in range(6, 0, -1)
    )
    history = replace(history, recent=windows)
    alarm = Drift(what="ttft_s", rises=True, value=1.0, band=(0.0, 0.5), since_s=history.end_s - 60, edge=5.0)
    usual, slow = (decide(history, in_force(8.2), LoopSettings(), drift=one) for one in (None, alarm))
    assert usual.capacity_rps > 6.0
    assert slow.capacity_rps == pytest.approx(5.0)
    assert slow.verdict is Verdict.CHANGE
    assert kept_rate(slow.next.plan, slow.next.problem) >= 6.0 * usual.capacity_rps / 5.0 * (1 - 1e-6)


def test_cards_go_back_when_demand_falls_and_the_saving_is_bounded() -> None:
    found = decide(steady(4.0), in_force(12.0), LoopSettings())
    assert found.verdict is Verdict.CHANGE
    before, after = (price_of_plan(plan, fleet()) for plan in (plan_for(12.0).plan, found.next.plan))
    assert before is not None
    assert after is not None
    assert found.usd_per_hour == pytest.approx(after - before)
    assert 0 < found.gain <= found.bound
    assert found.gain == pytest.approx(before - after, rel=0.05)  # less what the change costs
    assert kept_rate(found.next.plan, found.next.problem) >= 4.0 * (1 - 1e-6)


def test_nothing_is_given_back_soon_after_a_change() -> None:
    history = steady(4.0)
    recent = in_force(12.0, since_s=history.end_s - 60)
    assert decide(history, recent, LoopSettings()).verdict is Verdict.KEEP
    assert decide(history, recent, LoopSettings(cool_down_s=30)).verdict is Verdict.CHANGE


def test_more_than_the_fleet_serves_gets_all_that_it_serves_and_then_nothing() -> None:
    found = decide(steady(500.0), in_force(6.0), LoopSettings())
    assert found.verdict is Verdict.CHANGE
    assert len(found.next.plan.devices()) == 12
    then = InForce(found=found.next, fleet=fleet(), since_s=LONG_AGO)
    again = decide(steady(500.0), then, LoopSettings())
    assert again.verdict is Verdict.CANNOT
    assert "no change serves more" in again.reason
    fewer = decide(steady(4.0), then, LoopSettings())  # the objective is still least cost
    assert fewer.verdict is Verdict.CHANGE
    assert len(fewer.next.plan.devices()) < 12


def test_a_lost_node_is_replaced() -> None:
    lost = node_of(plan_for(8.0).plan.devices()[0])
    left = without_nodes(fleet(), [lost])
    found = decide(steady(7.5), in_force(8.0, fleet=left), LoopSettings())
    assert found.capacity_rps < 7.5
    assert found.verdict is Verdict.CHANGE
    assert lost not in {node_of(device) for device in found.next.plan.devices()}
    assert kept_rate(found.next.plan, found.next.problem) >= 7.5 * (1 - 1e-6)


def longer_prompts(end_s: float, tokens: float) -> tuple[Window, ...]:
    """Half an hour of prompts with so many tokens."""
    counts = [0.0] * (len(TOKENS.edges) + 1)
    counts[next(k for k, edge in enumerate(TOKENS.edges) if tokens <= edge)] = 400.0
    prompts = Histogram(scale=TOKENS, counts=tuple(counts), total=400 * tokens)
    outputs = Histogram.of_buckets(TOKENS, {100: 400}, 400 * 100)
    traffic = TrafficSketch(seconds=60, arrivals=400, prompt_tokens=prompts, output_tokens=outputs)
    return tuple(Window(start_s=end_s - 60 * k, traffic=traffic) for k in range(30, 0, -1))


def test_longer_prompts_are_a_shortage_at_the_same_rate() -> None:
    history = steady(8.0)
    history = replace(history, recent=longer_prompts(history.end_s, 4000))
    drift = Drift(
        what="prompt_tokens", rises=True, value=1.0, band=(0.0, 0.1), since_s=history.end_s - 1800, edge=500.0
    )
    usual, drifted = (decide(history, in_force(8.2), LoopSettings(), drift=one) for one in (None, drift))
    assert usual.verdict is Verdict.KEEP
    assert drifted.capacity_rps < 0.6 * usual.capacity_rps
    assert drifted.verdict is Verdict.CHANGE
    moments = drifted.next.problem.workload.moments()
    assert moments.mean_prompt == pytest.approx(4000, rel=0.01)


def test_a_drift_of_the_rate_is_believed_before_the_history() -> None:
    drift = Drift(what="rate", rises=True, value=14.0, band=(7.0, 9.0), since_s=200 * 300 - 40)
    found = decide(steady(8.0), in_force(8.2), LoopSettings(), drift=drift)
    assert found.verdict is Verdict.CHANGE
    assert kept_rate(found.next.plan, found.next.problem) >= 14.0 * (1 - 1e-6)


def test_an_alarm_about_the_rate_is_forgotten_once_the_recent_rate_shows_it() -> None:
    history = steady(8.0)
    drift = Drift(what="rate", rises=True, value=14.0, band=(7.0, 9.0), since_s=history.end_s - 601)
    assert decide(history, in_force(8.2), LoopSettings(), drift=drift).verdict is Verdict.KEEP


def test_a_shortage_is_seen_in_the_last_minutes_before_a_question_is_due() -> None:
    minutes = np.full(180, 8.0)
    history, usual = replace(steady(8.0), minutes=minutes), LoopSettings()
    assert not is_short(history, 8.2, usual)
    assert is_short(history, 7.0, usual)
    assert is_short(replace(history, minutes=np.append(minutes, [12.0, 12.0])), 8.2, usual)
    assert not is_short(replace(history, minutes=np.zeros(0)), 0.0, usual)  # nothing is known yet


def test_much_less_demand_is_asked_about_before_a_question_is_due_unless_a_change_is_recent() -> None:
    usual = LoopSettings()
    history = replace(steady(8.0), minutes=np.full(180, 8.0))
    assert not is_spare(history, 8.2, LONG_AGO, usual)
    assert is_spare(history, 9.0, LONG_AGO, usual)
    assert not is_spare(history, 9.0, history.end_s - usual.cool_down_s + 1, usual)
    assert not is_spare(steady(8.0), 9.0, LONG_AGO, usual)  # no minutes are known


def test_a_jump_is_a_shortage_at_once_if_it_is_no_chance() -> None:
    def after(*arrivals: float) -> History:
        windows = (
            Window(start_s=20.0 * k, traffic=TrafficSketch(seconds=20, arrivals=n)) for k, n in enumerate(arrivals)
        )
        return replace(steady(8.0), minutes=np.full(180, 8.0), recent=tuple(windows))

    assert not is_short(after(160, 160, 190), 8.8, LoopSettings())
    assert is_short(after(160, 160, 260), 8.8, LoopSettings())
    assert not is_short(after(260, 160, 160, 160), 8.8, LoopSettings())  # it is over


def test_a_peak_beyond_the_time_that_is_looked_ahead_keeps_no_cards() -> None:
    day = np.full(288, 4.0)
    day[6:14] = 12.0  # every day, half an hour from now
    history = replace(steady(4.0), rates=np.tile(day, 10))
    soon, later = (decide(history, in_force(12.5), LoopSettings(look_ahead_s=look_s)) for look_s in (900.0, 3600.0))
    kept = [kept_rate(one.next.plan, one.next.problem) for one in (soon, later)]
    assert kept[0] < 8
    assert kept[1] >= 12 * (1 - 1e-6)


def test_what_is_expected_has_the_dispersion_of_recent_counts() -> None:
    windows = tuple(
        Window(start_s=60.0 * k, traffic=TrafficSketch(seconds=60, arrivals=480 + 120 * (k % 2))) for k in range(30)
    )
    found = decide(replace(steady(8.0), recent=windows), in_force(8.2), LoopSettings())
    assert found.expected.dispersion == pytest.approx(120**2 / 2 / 540, rel=0.01)
    assert found.expected.high_rps >= found.capacity_rps


def test_most_goodput_changes_nothing_while_requests_are_the_same() -> None:
    goodput = plan_for(0.0, ObjectiveKind.GOODPUT)
    now = InForce(found=goodput, fleet=fleet(), since_s=LONG_AGO)
    assert decide(steady(4.0), now, LoopSettings()).verdict is Verdict.KEEP
    assert decide(steady(500.0), now, LoopSettings()).verdict is Verdict.CANNOT


def test_a_proposal_expires_when_the_next_question_is_due() -> None:
    found = decide(steady(8.0), in_force(8.2), LoopSettings(every_s=120))
    assert found.expires_s == found.made_s + 120


def test_settings_are_checked() -> None:
    with pytest.raises(InvalidProblemError, match="every_s is 0, must be 1 to 86400"):
        LoopSettings(every_s=0)
