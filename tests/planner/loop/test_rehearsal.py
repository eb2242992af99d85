"""Rehearsals: what following traffic costs and keeps, what losses of nodes do, and curves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.loop import rehearsal
from hetis.planner.loop.curves import STEP_S, TrafficCurve, composed_curve, read_curve, unevenness
from hetis.planner.loop.decision import Decision, InForce, Verdict, kept_rate
from hetis.planner.loop.drift import Expected
from hetis.planner.loop.forecast import History
from hetis.planner.loop.rehearsal import LoopFollower, NodeEvent, Rehearsal, RememberingSearch, rehearse
from hetis.planner.loop.rivals import Static, ThresholdScaling, plan_for_peak, rehearse_all
from hetis.planner.loop.settings import LoopSettings
from hetis.planner.use_cases.describing import with_inputs
from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.cluster import node_of
from hetis.solver.errors import InvalidProblemError
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.replanning.transition import Action, Step
from tests.planner.command_line import invoke
from tests.planner.loop.served import SETTINGS, fleet, plan_for

HOUR = 60  # steps
MIX = plan_for(6.0).problem.workload


def curve(*rates: float, history: int = 24) -> TrafficCurve:
    """Hours of equal rates, after a history of hours at the first."""
    hours = [rates[0]] * history + list(rates)
    return TrafficCurve(
        name="hours", rates=np.repeat(hours, HOUR), mixes=((0.0, MIX),), start_s=history * HOUR * STEP_S
    )


def loop(settings: LoopSettings | None = None) -> LoopFollower:
    return LoopFollower(settings or LoopSettings(), RememberingSearch())


def test_a_static_plan_costs_its_price_and_misses_what_is_above_its_rate() -> None:
    found = rehearse(plan_for(6.0), curve(5.0, 30.0, 1.0, 1.0), Static())
    price = price_of_plan(plan_for(6.0).plan, fleet())
    assert price is not None
    assert found.usd == pytest.approx(4 * price)
    assert found.gpu_hours == pytest.approx(4 * len(plan_for(6.0).plan.devices()))
    assert found.requests == pytest.approx(37 * 3600)
    assert found.outside > 30 / 37  # the queue of the second hour lasts into the third
    assert found.changes == ()


def test_the_loop_follows_a_rise_and_a_fall() -> None:
    start = plan_for(6.0)
    found = rehearse(start, curve(5.0, 12.0, 3.0, 3.0), loop())
    most = max(one.capacity_rps for one in found.changes)
    assert most >= 12
    assert found.changes[-1].capacity_rps < 0.75 * most
    assert found.changes[-1].gpus < max(one.gpus for one in found.changes)
    # From the jump until it is noticed and replicas have started: two minutes of an hour, and the queue of these.
    assert found.outside < 12 / 23 * 6 / 60
    assert found.alarms >= 1


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_changes_are_made_in_an_hour_than_a_policy_allows(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question wants a change."""
    between = plan_for(6.0), plan_for(12.0)
    step = Step(action=Action.START, replicas=(0,), seconds=60.0, capacity=6.0, capacity_after=12.0)

    def decided(history: History, in_force: InForce, _settings: LoopSettings, **_more: object) -> Decision:
        return Decision(
            verdict=Verdict.CHANGE, reason="any", made_s=history.end_s, expires_s=history.end_s, demand_rps=5.0,
            capacity_rps=6.0, expected=Expected(low_rps=1.0, high_rps=12.0),
            next=between[in_force.found.plan.replicas == between[0].plan.replicas],
            found=cast(Replanning, SimpleNamespace(transition=SimpleNamespace(steps=(step,)))),
        )  # fmt: skip

    monkeypatch.setattr(rehearsal, "decide", decided)
    found = rehearse(between[0], curve(*[5.0] * 4), loop(LoopSettings(changes_per_hour=most)))
    times_s = [one.at_s for one in found.changes]
    assert len(times_s) == 4 * most
    assert all(after - before >= 3600 for before, after in zip(times_s, times_s[most:], strict=False))


@pytest.mark.parametrize("share", [0.9, 0.95, 0.98])
def test_noise_changes_nothing_that_leaves_room_and_never_leads_back(share: float) -> None:
    """At a steady rate that leaves a tenth, or less than chance, of what the plan in force keeps.

    Less is ended once, by a plan whose replicas stay, and then by the cheapest.
    """
    start = plan_for(8.0)
    rate = share * kept_rate(start.plan, start.problem)
    found = rehearse(start, curve(*[rate] * 6), loop(), seed=3)
    assert found.outside == 0.0
    assert len(found.changes) <= (2 if share > 0.9 else 0)
    plans = [start.plan.replicas, *(one.next.plan.replicas for one in found.changes)]
    assert len(set(plans)) == len(plans)


def test_without_a_history_the_plan_stays_until_five_minutes_are_known() -> None:
    found = rehearse(plan_for(6.0), curve(2.0, history=0), loop())
    assert found.changes
    assert min(one.at_s for one in found.changes) >= 300


def test_a_perfect_forecast_is_late_only_where_every_way_leads_through_less() -> None:
    """One replica of few restarts with other settings, for seconds."""
    traffic = curve(3.0, 4.0, 8.0, 12.0, 6.0, 3.0)
    found = rehearse(plan_for(6.0), traffic, LoopFollower(LoopSettings(), RememberingSearch(), traffic))
    assert found.outside < 0.005
    assert len(found.changes) >= 2


def test_a_lost_node_is_replaced_and_not_paid() -> None:
    start = plan_for(8.0)
    lost = node_of(start.plan.devices()[0])
    events = [NodeEvent(at_s=1800, node=lost), NodeEvent(at_s=7200, node=lost, joins=True)]
    traffic = curve(7.0, 7.0, 7.0)
    without, with_loop = (rehearse(start, traffic, one, events=events) for one in (Static(), loop()))
    assert without.outside > 0.4
    assert with_loop.outside < 0.1
    assert without.gpu_hours < 3 * len(start.plan.devices())


def test_threshold_scaling_adds_and_removes_replicas_of_the_peak() -> None:
    peak = plan_for(12.0)
    found = rehearse(peak, curve(3.0, 3.0, 10.0, 3.0), ThresholdScaling(peak, LoopSettings().costs, 0.7))
    assert len(found.changes) >= 3
    assert found.gpu_hours < 4 * len(peak.plan.devices())
    assert 0 < found.outside < 0.2


def test_all_follow_the_same_arrivals_and_saving_costs_little() -> None:
    traffic = curve(3.0, 11.0, 3.0)
    found = {one.name: one for one in rehearse_all(plan_for(6.0, each=3), traffic, LoopSettings())}
    assert list(found) == ["static", "threshold 70%", "perfect forecast", "loop"]
    assert len({one.requests for one in found.values()}) == 1

    def usd(one: Rehearsal) -> float:
        assert one.usd is not None
        return one.usd

    assert found["static"].outside == 0.0
    assert usd(found["perfect forecast"]) < 0.8 * usd(found["static"])
    assert usd(found["loop"]) < 0.9 * usd(found["static"])


def test_the_plan_for_the_peak_serves_the_peak_of_every_mix() -> None:
    traffic = curve(3.0, 6.0).with_lengths(25 * 3600, prompts=3.0, outputs=1.0)
    found = plan_for_peak(plan_for(6.0), traffic, LoopSettings())
    for rate, (_, mix) in zip((3.0, 6.0), traffic.mixes, strict=True):
        assert kept_rate(found.plan, replace(found.problem, workload=mix)) >= rate


# --- curves


def test_a_composed_week_has_days_weekends_and_its_peak() -> None:
    week = composed_curve(MIX, days=7, peak_rps=10.0, history_days=7, seed=5)
    by_day = week.rates.reshape(14, -1)
    assert by_day.max(axis=1)[:5].mean() == pytest.approx(10.0, rel=0.15)
    assert by_day.mean(axis=1)[[5, 6, 12, 13]].mean() < 0.8 * by_day.mean(axis=1)[[1, 2, 3, 8, 9, 10]].mean()
    assert (by_day.argmin(axis=1) < 8 * HOUR).mean() > 0.7
    assert week.peak_rps() == week.rates[len(week.rates) // 2 :].max()


def test_unevenness_is_of_a_trace_and_has_mean_one() -> None:
    arrivals = np.sort(
        np.concatenate([[0.0], np.random.default_rng(0).uniform(0, 1800, 3000), np.arange(1800, 3601, 6)])
    )
    found = unevenness(arrivals)
    assert len(found) == 12
    assert found.mean() == pytest.approx(1.0)
    assert found[0] > 5 * found[-1]
    with pytest.raises(InvalidProblemError, match="a trace of 10 s shows nothing"):
        unevenness([0.0, 10.0])


def test_a_curve_is_read_and_every_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    path.write_text("at_s,requests_per_s\n0,1\n3600,2\n7200,4\n")
    found = read_curve(str(path), MIX, history_s=3600)
    assert found.end_s == 3 * 3600
    assert [found.rate_at(at) for at in (0, 3599, 3600, 10_000)] == [1, 1, 2, 4]
    path.write_text("at_s,requests_per_s\n1764633600,1\n1764637200,2\n")
    assert read_curve(str(path), MIX, history_s=0).end_s == 2 * 3600
    for end_s in (1, 1e8):
        path.write_text(f"at_s,requests_per_s\n0,1\n{end_s},2\n")
        with pytest.raises(DocumentError, match="must be a minute to 120 days"):
            read_curve(str(path), MIX, history_s=0)
    path.write_text("at_s,requests_per_s\n0,1\n5,x\n3,-1\n")
    with pytest.raises(DocumentError) as raised:
        read_curve(str(path), MIX, history_s=0)
    assert [problem.line for problem in raised.value.problems] == [3, 4, None]
    path.write_text("time,rate\n0,1\n")
    with pytest.raises(DocumentError, match="has no column at_s and requests_per_s"):
        read_curve(str(path), MIX, history_s=0)


# --- the verb


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = plan_for(2.0, each=2)
    made = with_inputs(
        found.plan, LoadedInputs(inputs=found.inputs, origins={}), SETTINGS, found.problem, found.plan.objective,
        rung="node",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("rehearse") / "plan.json"
    path.write_text(dump(made))
    return str(path)


def test_the_verb_prints_all_on_80_columns_and_as_json(plan: str, tmp_path: Path) -> None:
    rates = tmp_path / "rates.csv"
    rates.write_text("at_s,requests_per_s\n0,1\n86400,1\n88200,2\n")
    asked = ["rehearse", plan, "--curve", str(rates), "--history", "1", "-q"]
    result = invoke(*asked)
    assert result.exit_code == ExitCode.OK, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "perfect forecast" in result.stdout
    found = json.loads(invoke(*asked, "--fail", "l4-0@45min", "--burst", "1.5@10min+10min", "-o", "json").stdout)
    assert [one["name"] for one in found["followers"]] == ["static", "threshold 70%", "perfect forecast", "loop"]
    assert found["curve"]["hours"] == 1


@pytest.mark.parametrize(("options", "message"), [(["--rate", "5"], "those of --curve"), ([], "of which 604800 are")])
def test_a_curve_has_its_own_rates_and_days_after_its_history(
    plan: str, tmp_path: Path, options: list[str], message: str
) -> None:
    rates = tmp_path / "rates.csv"
    rates.write_text("at_s,requests_per_s\n0,3\n3600,4\n")
    result = invoke("rehearse", plan, "--curve", str(rates), *options, "-q")
    assert result.exit_code != ExitCode.OK
    assert message in " ".join((result.stderr + str(result.exception)).split())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--burst", "2@1h", "'2@1h' has no duration, such as 2@30h+20min"),
        ("--burst", "x@1h+1min", "'x@1h+1min' is no factor and time such as 2@30h"),
        ("--longer", "2@900h", "'2@900h' is after the end of the traffic, 168h"),
        ("--fail", "l4-0", "'l4-0' is not a node and a time"),
        ("--join", "l4-0@2h", "'l4-0@2h' joins, but is not lost"),
        ("--fail", "l4-9@1h", "no node 'l4-9' in the cluster"),
        ("--fail", "l4-0@200h", "'l4-0@200h' is after the end of the traffic, 168h"),
        ("--curve", "missing.csv", "missing.csv: cannot be read"),
        ("--coverage", "30%", "coverage is 0.3, must be 0.5 to 0.9999"),
    ],
)
def test_wrong_options_are_named(plan: str, option: str, value: str, message: str) -> None:
    result = invoke("rehearse", plan, option, value, "-q")
    assert result.exit_code != ExitCode.OK
    told = result.stderr if isinstance(result.exception, SystemExit) else str(result.exception)
    assert message in " ".join(told.split())
