"""The simulator verifies a plan before `place` shows it."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hetis
from benchmarks.measuring.seats import with_more_seats
from hetis.formats.documents import load_plan
from hetis.planner.cli import place as placing_verb
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server import resource_views
from hetis.planner.convert.plans import OBJECTIVE_KINDS, result_to_proto
from hetis.planner.report.figures import digits, seconds
from hetis.planner.report.page import key_figures
from hetis.planner.report.page.pages import ShownPlan, plans_page
from hetis.planner.report.plan import headline, render_plan
from hetis.planner.report.promises import beside_equal_stages, simple_setups
from hetis.planner.use_cases.climbing import Climbed
from hetis.planner.use_cases.place import simulated_plan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.record.parts import Requested, Verified
from hetis.planner.use_cases.request import PlacementRequest
from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.planner.use_cases.service_level import (
    DEFAULT,
    Latency,
    ServiceLevel,
    Statistic,
    requested_level,
    share_within,
)
from hetis.planner.use_cases.simulation.engine_settings import at_settings, with_all_seats
from hetis.planner.use_cases.simulation.judging import _attained, measured
from hetis.planner.use_cases.simulation.representative import RepresentativePart
from hetis.planner.use_cases.simulation.simulate import Question, Simulated, answer, default_rate, seats_of
from hetis.planner.use_cases.sources import load_inputs
from hetis.planner.use_cases.verification import latency_curve, rates
from hetis.planner.use_cases.verification.outcome import (
    AS_PLANNED,
    OUT_OF_TIME,
    STOPPED_EARLY,
    missed,
    misses,
    noted_if_stopped,
    rate_to_simulate,
    restated,
    settings_of,
)
from hetis.planner.use_cases.verification.rates import (
    LONGER,
    TriedRate,
    kept_plan,
    num_requests_of,
    simulated_at,
)
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Summary
from hetis.simulator.running import never, silent
from hetis.simulator.steadiness import Estimate
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.budget import silent as unreported
from hetis.solver.check import check_plan
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Objective, ObjectiveKind, Plan, ReplicaPlan, Role
from hetis.solver.problem import EngineSettings, PlacementProblem
from hetis.v1 import plan_pb2
from tests.planner.command_line import invoke
from tests.planner.report.test_reports import text_of
from tests.planner.use_cases.simulation.test_simulate import CLUSTER, no_mixed_factor

__all__ = ["no_mixed_factor"]  # for every test here, too

Placed = tuple[Plan, PlacementProblem]


def no_progress(_rate_rps: float, _given: int, _total: int) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-2-7B on two A100, verified."""
    folder = tmp_path_factory.mktemp("placed")
    (folder / "cluster.yaml").write_text(CLUSTER)
    out = folder / "plan.json"
    done = invoke("place", "-c", str(folder / "cluster.yaml"), "-m", "Llama-2-7B", "-w", "500/100", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "Simulated" in done.stdout
    assert "Uniform" in done.stdout
    return out


@pytest.fixture(scope="module")
def pair(placed: Path) -> Placed:
    found = load_plan_and_problem(str(placed))
    return found.plan, found.problem


@pytest.fixture(scope="module")
def run(pair: Placed) -> TriedRate:
    """The plan at its rate."""
    limits = pair[0].objective
    found = simulated_at(*pair, default_rate(*pair), limits, seed=0, budget=Budget(), report=silent)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def one_run(pair: Placed) -> Summary:
    limits = Objective(ttft_limit_s=None, tpot_limit_s=None)
    found = simulated_at(*pair, 1.0, limits, seed=0, budget=Budget(), report=silent)
    return found.summary


def drawn(plan: Plan) -> str:
    """Return the words of a plan's first lines, however they are wrapped."""
    return " ".join(text_of(headline(plan), width=160).split())


def again(plan: Plan, problem: PlacementProblem) -> Plan:
    return kept_plan(plan, problem, seed=0, budget=Budget(), report=no_progress)


def test_the_saved_plan_says_what_a_second_simulation_says(placed: Path, pair: Placed) -> None:
    plan, problem = pair
    saved = Verified.of(load_plan(placed)).verification
    assert saved == Verified.of(again(plan, problem)).verification
    assert saved.rate_rps == pytest.approx(default_rate(plan, problem))
    assert saved.kept == (not misses(saved, plan))


def test_a_limit_that_no_rate_keeps_is_missed_by_name(pair: Placed) -> None:
    plan, problem = pair
    hasty = replace(plan, objective=replace(plan.objective, ttft_limit_s=1e-4))
    simulated = again(hasty, problem)
    found = Verified.of(simulated).verification
    assert not found.kept
    assert found.kept_rps is None
    assert any(clause.startswith("TTFT p95") for clause in misses(found, hasty))
    assert any("TTFT p95" in sentence for sentence in missed(simulated, PlacementSettings().gap_target))


UNCOUNTED = SimpleNamespace(counts=SimpleNamespace(iterations=0, arrived=0))  # metrics of a run that costs nothing


def at_rate(plan: Plan, problem: PlacementProblem, factor: float) -> Plan:
    """Return the plan as if it served so many times its rate."""
    return replace(restated(plan, problem, factor * plan.result.utilisation), inputs={}, notes=())


def test_too_high_a_rate_is_missed_and_the_lower_one_that_is_kept_is_the_value(pair: Placed) -> None:
    plan, problem = pair
    crowded = at_rate(plan, problem, 1.5)
    kept = again(crowded, problem)
    record = Verified.of(kept)
    found = record.verification
    assert found.kept
    assert record.model_value == crowded.result.value
    assert 0.25 * crowded.result.value <= kept.result.value < crowded.result.value
    assert kept.result.value == pytest.approx(found.kept_rps)
    assert found.rate_rps == found.kept_rps
    assert kept.result.bound == crowded.result.bound
    assert not check_plan(replace(kept, inputs=plan.inputs), problem)
    assert Verified.of(again(replace(kept, inputs={}), problem)).verification.kept


def test_a_plan_that_keeps_more_has_that_as_its_value_up_to_its_bound(pair: Placed) -> None:
    plan, problem = pair
    half = at_rate(plan, problem, 0.5)
    more = again(half, problem)
    assert more.result.value == pytest.approx(1.5 * half.result.value)
    assert Verified.of(more).verification.rate_rps == pytest.approx(more.result.value)
    assert Verified.of(more).model_value is None
    assert not check_plan(replace(more, inputs=plan.inputs), problem)
    bounded = replace(half, result=replace(half.result, bound=1.12 * half.result.value))
    assert again(bounded, problem).result.value == pytest.approx(1.1 * half.result.value)


@pytest.mark.parametrize(
    ("short_s", "long_s", "asked", "kept", "sure"),
    [
        ((0.6, 0.05), None, 1, True, True),  # p95 TTFT and its half width in seconds, for a limit of 1 s
        ((1.3, 0.05), None, 1, False, False),
        ((0.87, 0.05), (0.88, 0.02), 2, True, True),
        ((0.87, 0.05), (1.4, 0.1), 2, False, False),  # queues had not filled up in the shorter run
        ((1.3, 0.5), (0.97, 0.05), 2, True, False),
        ((0.98, 0.05), (1.01, 0.05), 2, True, False),  # a miss within the error
        ((0.98, 0.05), (1.05, 0.1), 2, False, False),  # a miss beyond the error
    ],
)
def test_a_longer_run_decides_where_the_limit_is_close(
    pair: Placed, one_run: Summary, monkeypatch: pytest.MonkeyPatch, short_s: tuple[float, float],
    long_s: tuple[float, float] | None, asked: int, kept: bool, sure: bool,
) -> None:  # fmt: skip
    plan, problem = pair
    limits, numbers = Objective(ttft_limit_s=1.0, tpot_limit_s=None), list[int]()

    def answer(_plan: Plan, _problem: PlacementProblem, question: Question, **_: object) -> SimpleNamespace:
        numbers.append(question.num_requests)
        value, half_width = (short_s, long_s or short_s)[len(numbers) - 1]
        summary = replace(one_run, steady=True, ttft_p95_s=Estimate(value=value, half_width=half_width))
        return SimpleNamespace(complete=True, summary=summary, run=None, runs=(UNCOUNTED,))

    monkeypatch.setattr(rates, "answer", answer)
    found = simulated_at(plan, problem, 1.0, limits, seed=0, budget=Budget(), report=silent)
    assert (found.kept, found.sure) == (kept, sure)
    assert numbers == [num_requests_of(plan) * times for times in (1, LONGER)][:asked]
    assert found.num_requests == numbers[-1]


@pytest.mark.parametrize(("other_s", "kept"), [(0.98, True), (1.3, False)])
def test_other_traffic_has_to_keep_a_limit_that_is_close(
    pair: Placed, one_run: Summary, monkeypatch: pytest.MonkeyPatch, other_s: float, kept: bool
) -> None:
    plan, problem = pair
    planned_rps, seeds = default_rate(plan, problem), list[int]()

    def answer(_plan: Plan, _problem: PlacementProblem, question: Question, **_: object) -> SimpleNamespace:
        (seed,) = question.seeds
        seeds.append(seed)
        value = 0.5 if question.load.rate_rps < planned_rps else (0.97, other_s)[seed]
        p95_s = Estimate(value=value, half_width=0.05)
        summary = replace(one_run, steady=True, ttft_p95_s=p95_s, attainment=0.95)
        return SimpleNamespace(complete=True, summary=summary, run=None, runs=(UNCOUNTED,))

    monkeypatch.setattr(rates, "answer", answer)
    limits = replace(plan.objective, ttft_limit_s=1.0, tpot_limit_s=None)
    simulated = again(replace(plan, objective=limits), problem)
    assert seeds[:3] == [0, 0, 1]  # a probe and a run, then other traffic
    assert Verified.of(simulated).verification.ttft_p95_s == (0.97 if kept else 0.5)
    assert simulated.result.value == pytest.approx((1.0 if kept else 0.97) * planned_rps)


@pytest.mark.parametrize(("split_s", "dispatched"), [(0.5, None), (0.97, True), (1.3, True)])
def test_heads_are_dispatched_where_the_planned_split_is_not_clearly_enough(
    pair: Placed, one_run: Summary, monkeypatch: pytest.MonkeyPatch, split_s: float, dispatched: bool | None
) -> None:
    plan, problem = pair

    def answer(_plan: Plan, _problem: PlacementProblem, question: Question, **_: object) -> SimpleNamespace:
        p95_s = Estimate(value=0.4 if question.settings.dispatch else split_s, half_width=0.05)
        summary = replace(one_run, steady=True, ttft_p95_s=p95_s, attainment=0.95)
        return SimpleNamespace(complete=True, summary=summary, run=None, runs=(UNCOUNTED,))

    monkeypatch.setattr(rates, "answer", answer)
    monkeypatch.setattr(rates, "_has_workers", lambda _plan: True)
    limits = replace(plan.objective, ttft_limit_s=1.0, tpot_limit_s=None)
    found = Verified.of(again(replace(plan, objective=limits), problem)).verification
    assert found.kept
    assert (found.dispatched, found.ttft_p95_s) == (dispatched, 0.4 if dispatched else split_s)
    assert settings_of(found).dispatch == bool(dispatched)


@pytest.fixture(scope="module")
def whole_run(pair: Placed) -> Simulated:
    """Return a run of 2,000 requests at the planned rate."""
    plan, problem = pair
    load = Load(
        lengths=problem.workload, max_position=problem.model.max_position, arrivals=Arrivals.DRAWN,
        rate_rps=default_rate(plan, problem),
    )  # fmt: skip
    question = Question(
        load=load, num_requests=2000, seeds=(0,), settings=AS_PLANNED, limits=plan.objective, keep_run=True
    )
    return answer(plan, problem, question, processes=1, is_cancelled=never, report=silent)


def test_a_run_is_judged_by_the_statistics_that_are_asked_for(whole_run: Simulated) -> None:
    summary, run = whole_run.summary, whole_run.run
    limits = Objective(ttft_limit_s=1.0, tpot_limit_s=0.1)
    usual = measured(ServiceLevel(), summary, None, limits)
    p95, mean = summary.ttft_p95_s, summary.mean_tpot_s
    assert [one[:4] for one in usual.limited] == [
        (p95.value - p95.half_width, p95.value, p95.value + p95.half_width, 1.0),
        (mean.value - mean.half_width, mean.value, mean.value + mean.half_width, 0.1),
    ]
    assert [one.close for one in usual.limited] == [0.9, 1.0]
    assert not usual.seconds
    others = measured(ServiceLevel(ttft=Statistic.P99, tpot=Statistic.P50), summary, run, limits)
    assert others.seconds == pytest.approx({"TTFT": summary.ttft_s.p99, "TPOT": summary.tpot_s.p50})
    assert [one.value for one in others.limited] == list(others.seconds.values())
    assert all(one.low < one.value < one.high for one in others.limited)
    assert others.limited[0].high - others.limited[0].value > p95.half_width  # a tail further out is less certain
    unlimited = Objective(ttft_limit_s=None, tpot_limit_s=None)
    assert measured(ServiceLevel(ttft=Statistic.P99), summary, run, unlimited).limited == ()


def test_a_run_is_judged_by_the_share_of_requests_that_keep_all_limits(whole_run: Simulated) -> None:
    summary, run, share = whole_run.summary, whole_run.run, ServiceLevel(attainment=0.9)
    inside = run.arrival_s >= summary.warm_up_s
    ttft = (run.first_token_s - run.arrival_s)[inside]
    limit_s = float(np.percentile(ttft, 80))
    found = measured(share, summary, run, Objective(ttft_limit_s=limit_s, tpot_limit_s=None))
    (missing,) = found.limited
    assert missing.value == found.missed["TTFT"] == pytest.approx(0.2, abs=1 / len(ttft))
    assert missing.limit == pytest.approx(0.1)
    assert missing.limit < missing.low < missing.value, "surely missed"
    both = measured(share, summary, run, Objective(ttft_limit_s=limit_s, tpot_limit_s=1e-6))
    assert (both.limited[0].value, both.missed["TPOT"]) == (1.0, 1.0)
    never = measured(share, summary, run, Objective(ttft_limit_s=1e6, tpot_limit_s=None)).limited[0]
    assert never.value == 0.0
    assert never.high == pytest.approx(3 / len(ttft))  # a run without a miss does not prove that there are none
    lost = replace(run, finished_s=np.full_like(run.finished_s, np.nan))
    assert measured(share, summary, lost, Objective(ttft_limit_s=1e6, tpot_limit_s=None)).limited[0].value == 1.0


@pytest.mark.parametrize(
    ("share", "asked", "said"),
    [(0.876, 0.9, "87.6%"), (0.99878, 0.999, "99.878%"), (0.9996, 1.0, "99.9600%"), (0.9999, 0.999, "99.990%")],
)
def test_a_share_is_not_rounded_to_the_one_asked_for(share: float, asked: float, said: str) -> None:
    assert share_within(share, asked) == said


def test_runs_are_long_enough_for_the_share_that_may_miss(pair: Placed) -> None:
    plan, _ = pair
    lengths = [
        num_requests_of(replace(plan, inputs={"service_level": asdict(ServiceLevel(attainment=share))}))
        for share in (0.5, 0.99, 0.999, 1.0)
    ]
    assert lengths == [num_requests_of(plan), 5000, 8_000, 8_000]


@pytest.mark.parametrize("level", [ServiceLevel(attainment=1.0), ServiceLevel(ttft=Statistic.P99, tpot=Statistic.P50)])
def test_the_rate_that_is_kept_follows_what_is_asked_for(pair: Placed, level: ServiceLevel) -> None:
    plan, problem = pair
    usual = Verified.of(plan).verification
    assert usual is not None
    asked = replace(plan, inputs={**plan.inputs, "service_level": json.loads(json.dumps(asdict(level)))})
    assert Requested.of(asked).service_level == level
    found = again(asked, problem)
    verification = Verified.of(found).verification
    assert verification is not None
    if level.attainment is None:
        assert (verification.ttft_p95_s, verification.tpot_mean_s) == (usual.ttft_p95_s, usual.tpot_mean_s)
        assert verification.ttft_s is not None
        assert verification.tpot_s is not None
        assert verification.ttft_s > usual.ttft_p95_s
        assert f"TTFT p99 {seconds(verification.ttft_s)}, TPOT p50 {seconds(verification.tpot_s)}" in drawn(found)
    else:
        assert verification.kept == (verification.attainment == 1.0)
        assert "100% asked for" in drawn(found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attainment", "0"], "must be above 0 and at most 100%"),
        (["--attainment", "90"], "must be above 0 and at most 100%, did you mean 90%?"),
        (["--ttft-statistic", "p42"], "'p42' is not one of"),
    ],
)
def test_levels_that_mean_nothing_are_refused(placed: Path, options: list[str], said: str) -> None:
    cluster = str(placed.with_name("cluster.yaml"))
    done = invoke("place", "-c", cluster, "-m", "Llama-2-7B", "-w", "500/100", *options)
    assert done.exit_code == ExitCode.INVALID
    assert said in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"attainment": 0.9, "tpot": Statistic.P99}, "no statistic is taken: leave out --tpot-statistic"),
        (
            {"attainment": 0.9, "verify": False},
            "--attainment can only be checked in the simulation, which --no-verify skips",
        ),
        (
            {"tpot": Statistic.MEAN, "objective": Objective(tpot_limit_s=None)},
            "--tpot-statistic is given, but TPOT has no limit",
        ),
        ({"attainment": 0.9, "objective": Objective(ttft_limit_s=None, tpot_limit_s=None)}, "neither TTFT nor TPOT"),
        ({"attainment": 90.0}, "attainment is 90, must be above 0 and at most 1"),
    ],
)
def test_levels_that_contradict_themselves_are_refused(asked: dict[str, Any], said: str) -> None:
    usual = {"ttft": None, "tpot": None, "attainment": None, "objective": Objective(), "verify": True}
    assert requested_level(**usual) == ServiceLevel()  # type: ignore[arg-type]
    with pytest.raises(InvalidProblemError, match=said):
        requested_level(**{**usual, **asked})  # type: ignore[arg-type]


def test_a_saved_plan_says_what_it_is_held_to(placed: Path, tmp_path: Path) -> None:
    out, cluster = tmp_path / "plan.json", str(placed.with_name("cluster.yaml"))
    asked = ["place", "-c", cluster, "-m", "Llama-2-7B", "-w", "500/100", "--ttft-statistic", "p99", "--out", str(out)]
    assert "TTFT p99" in invoke(*asked).stdout
    assert json.loads(out.read_text())["inputs"]["service_level"] == {"ttft": "p99", "tpot": "mean", "attainment": None}
    assert "TTFT p99" in invoke("explain", str(out)).stdout


def test_a_plan_is_headed_and_simulated_by_the_rate_that_it_keeps(pair: Placed) -> None:
    plan, problem = pair
    less = at_rate(plan, problem, 0.7)
    less = replace(less, inputs={**plan.inputs, "model_value": plan.result.value})
    kept, planned = (f"{digits(one.result.value, 4)} requests/s" for one in (less, plan))
    assert f"Goodput {kept} kept in simulation; by the model {planned}; proven" in drawn(less)
    assert f"Goodput {planned} proven" in drawn(plan)
    dear, cheap = (float(re.findall(r"([\d.]+) USD per million", drawn(one))[0]) for one in (less, plan))
    assert dear / cheap == pytest.approx(1 / 0.7, rel=0.01)
    never = replace(less, result=replace(less.result, value=0.0, utilisation=0.0))
    assert "Goodput none of the rates tried keeps the limits in simulation; by the model" in drawn(never)
    beside = {"equal_stages_value": 0.5 * plan.result.value}
    for one, more in (
        (less, "by the model, by replicas of equal stages (not simulated); this plan by the model 100% more"),
        (never, "this plan: --strategy uniform); this plan by the model 100% more"),
        (plan, "stages; this plan 100% more"),
    ):
        shown = replace(one, inputs={**one.inputs, **beside})
        assert beside_equal_stages(shown).endswith(more)
        page = plans_page([ShownPlan(name="one", plan=shown, problem=problem)])
        assert "+100%" in page
        assert ("by the model; equal stages, not simulated" in page) is (one is not plan)
    [simple] = simple_setups(replace(less, inputs={**less.inputs, "simple_setups": {"2": 0.5 * plan.result.value}}))
    assert simple.endswith("50% less by the model")
    for one in (less, plan):
        assert rate_to_simulate(one, problem) == pytest.approx(one.result.value)
        demanded = replace(one, objective=replace(plan.objective, demand_rps=0.01))
        assert rate_to_simulate(demanded, problem) == rate_to_simulate(one, problem), "a plan promises its own rate"
        dearest = replace(demanded, objective=replace(demanded.objective, kind=ObjectiveKind.COST))
        assert rate_to_simulate(dearest, problem) == 0.01
    missing = replace(Verified.of(plan).verification, kept=False, ttft_p95_s=3451.0, steady=None)
    [clause] = misses(missing, plan)
    assert clause == "TTFT p95 3,451 s of 2 s"


def test_a_single_limit_is_not_called_both(pair: Placed) -> None:
    plan, _ = pair
    kept = replace(plan, inputs={**plan.inputs, "verification": {**plan.inputs["verification"], "kept": True}})
    alone = replace(kept, objective=replace(plan.objective, ttft_limit_s=None))
    for output in (drawn, page_of):
        assert "% within both" in output(kept)
        assert "% within the limit" in output(alone)
        assert "both" not in output(alone)


def test_a_limit_that_is_kept_up_to_chance_is_said_to_be_exceeded(pair: Placed) -> None:
    plan, _ = pair
    limit_s = plan.objective.tpot_limit_s
    assert limit_s is not None
    over = {**plan.inputs["verification"], "kept": True, "tpot_mean_s": 1.01 * limit_s}
    shown = f"TPOT mean {seconds(1.01 * limit_s)}"
    kept = replace(plan, inputs={**plan.inputs, "verification": over})
    assert f"{shown} (over {seconds(limit_s)} by chance)" in drawn(kept)
    within = replace(plan, inputs={**plan.inputs, "verification": {**over, "tpot_mean_s": limit_s}})
    assert "by chance" not in drawn(within)


def test_without_limits_or_when_nobody_waits_nothing_is_simulated(pair: Placed) -> None:
    plan, problem = pair
    bare = replace(plan, inputs={})
    unlimited = replace(bare, objective=replace(plan.objective, ttft_limit_s=None, tpot_limit_s=None))
    assert "verification" not in again(unlimited, problem).inputs
    cancelled = threading.Event()
    cancelled.set()
    left = kept_plan(bare, problem, seed=0, budget=Budget(cancelled=cancelled), report=no_progress)
    assert left == replace(bare, notes=(*bare.notes, STOPPED_EARLY))
    assert noted_if_stopped(unlimited, Budget(cancelled=cancelled)) is unlimited, "there was nothing to simulate"


def test_a_plan_that_was_to_be_simulated_and_was_not_says_so(pair: Placed) -> None:
    """Ctrl-C during the search returns the best plan so far, whose figures are the model's alone."""
    plan, problem = pair
    budget = Budget()
    assert noted_if_stopped(replace(plan, inputs={}), budget).notes == plan.notes, "--no-verify"
    budget.cancelled.set()
    assert noted_if_stopped(plan, budget) is plan, "Ctrl-C came after the simulation"
    stopped = noted_if_stopped(
        replace(plan, inputs={k: v for k, v in plan.inputs.items() if k != "verification"}), budget
    )
    assert "Simulated no: stopped before that; all values are the model's" in drawn(stopped)
    assert STOPPED_EARLY in " ".join(text_of(render_plan(stopped), width=160).split())
    page = plans_page([ShownPlan(name="stopped", plan=stopped, problem=problem)])
    assert "stopped before its simulation ended" in page


def test_a_simulation_that_exceeds_its_time_limit_is_ended_and_decides_nothing(placed: Path, pair: Placed) -> None:
    cluster, (plan, problem) = str(placed.with_name("cluster.yaml")), pair
    loaded = load_inputs(cluster=cluster, model="Llama-2-7B", workload="500/100", profiles=())
    bare, looks = replace(plan, inputs={}), itertools.count()

    def simulated(limit_s: float, plan: Plan = bare) -> Plan:
        return simulated_plan(
            Climbed(plan=plan, problem=problem), loaded, PlacementSettings(), level=DEFAULT, report=unreported,
            budget=Budget(time_limit_s=limit_s, clock=lambda: float(next(looks))),
        ).plan  # fmt: skip

    assert simulated(math.inf).inputs["verification"] == plan.inputs["verification"], "as ever, however long it takes"
    demanded = replace(bare, objective=replace(bare.objective, demand_rps=0.01))
    assert simulated(math.inf, demanded).inputs["verification"] == plan.inputs["verification"], "at the planned rate"
    assert simulated(math.inf, demanded).objective == demanded.objective
    began = next(looks)
    stopped = simulated(500.0)
    assert next(looks) - began < 600, "within a run of 4,000 requests, before each of which the time is read"
    assert "verification" not in stopped.inputs
    assert stopped.notes == (*bare.notes, OUT_OF_TIME)
    assert missed(stopped, 1.0) == [OUT_OF_TIME], "--strict promises nothing undecided"
    assert "Simulated not decided in the time limit; all values are the model's" in drawn(stopped)
    assert "not decided" in plans_page([ShownPlan(name="stopped", plan=stopped, problem=problem)])


@pytest.mark.parametrize("kept", [True, False])
def test_a_verdict_needs_only_the_runs_at_the_planned_rate(
    pair: Placed, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """A plan that keeps its limits does so whatever higher rates show; below a missed rate, one must be found."""
    plan, problem = at_rate(*pair, 0.5), pair[1]
    planned_rps, tried_rps = default_rate(plan, problem), list[float]()

    def ended_after_the_first(*args: Any, **options: Any) -> TriedRate | None:
        tried_rps.append(args[2])
        found = simulated_at(*args, **options) if len(tried_rps) <= 2 else None  # a probe, and the run that decides
        return None if found is None else replace(found, kept=kept, close=False)

    monkeypatch.setattr(rates, "simulated_at", ended_after_the_first)
    simulated = again(plan, problem)
    found = Verified.of(simulated).verification
    assert len(tried_rps) == 3
    assert (tried_rps[2] > planned_rps) == kept
    assert (found is not None) == kept
    if found is not None:
        assert (found.kept, found.kept_rps, simulated.notes) == (True, planned_rps, ())
        return
    late = replace(simulated, notes=(*simulated.notes, OUT_OF_TIME))
    assert simulated.notes[0].startswith(f"{rates.MISSES_AT} {planned_rps:.4g} requests/s")
    assert missed(late, 2.0) == list(late.notes)
    assert f"Simulated MISSED at {planned_rps:.4g} requests/s" in drawn(late)
    assert "lower rates not decided in the time limit" in drawn(late)
    assert re.search(r"Goodput \S+ requests/s by the model, .*; MISSED in simulation", drawn(late))
    page = plans_page([ShownPlan(name="late", plan=late, problem=problem)])
    assert "MISSED" in page
    assert "by the model; simulated traffic misses them" in page


@pytest.mark.parametrize("in_time", [True, False])
def test_a_rate_that_only_short_runs_kept_in_time_is_shown_with_a_note(
    pair: Placed, run: TriedRate, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    plan, problem = pair
    cancelled, planned_rps = threading.Event(), default_rate(plan, problem)

    def tried(*args: Any, **options: Any) -> TriedRate | None:
        rate_rps, lengths = args[2], options["lengths"]
        if max(lengths, default=0) > num_requests_of(plan) and not in_time:
            cancelled.set()
        kept = rate_rps < 0.8 * planned_rps
        return None if cancelled.is_set() else replace(run, kept=kept, sure=kept, close=False)

    monkeypatch.setattr(rates, "simulated_at", tried)
    found = kept_plan(
        replace(plan, inputs={}, notes=()), problem, seed=0, budget=Budget(cancelled=cancelled), report=no_progress
    )
    verification = Verified.of(found).verification
    assert verification.kept
    assert found.result.value == pytest.approx(0.79 * planned_rps, rel=0.02)
    assert f"{digits(found.result.value, 4)} requests/s kept in simulation" in drawn(found)
    note = f"{found.result.value:.4g} requests/s kept the limits in a run of 4,000 requests, which longer runs have not"
    assert [note in one for one in found.notes] == [True] * (not in_time)


@pytest.mark.parametrize(
    ("missed", "kept_share"),
    [
        (lambda share, seed, short: share >= 0.9 and not short, 0.9),
        (lambda share, seed, short: share >= 0.7 and seed == 1, 0.7),  # the traffic that no short run has seen
        (lambda share, seed, short: share >= 0.5 or (share >= 0.3 and seed == 1), 0.3),
    ],
)
def test_below_a_missed_rate_one_is_kept_that_long_runs_of_two_kinds_of_traffic_keep(
    pair: Placed,
    run: TriedRate,
    monkeypatch: pytest.MonkeyPatch,
    missed: Callable[[float, int, bool], bool],
    kept_share: float,
) -> None:
    plan, problem = pair
    planned_rps = default_rate(plan, problem)

    def tried(*args: Any, **options: Any) -> TriedRate:
        short = options["lengths"] == (num_requests_of(plan),)
        kept = args[2] < planned_rps and not missed(args[2] / planned_rps, options["seed"], short)
        return replace(run, within=kept, kept=kept, sure=kept, close=False)

    monkeypatch.setattr(rates, "simulated_at", tried)
    found = Verified.of(again(replace(plan, inputs={}, notes=()), problem)).verification
    assert found.kept_rps is not None
    assert 0.93 * kept_share <= found.kept_rps / planned_rps < kept_share


@pytest.mark.parametrize(
    ("sure", "growth", "factor"),
    [
        (lambda seed, length: True, 0.0, rates.HIGHER[0]),
        (lambda seed, length: seed == 0, 0.0, 1.0),
        (lambda seed, length: True, 2 * rates.MOST_GROWTH, 1.0),
    ],
)
def test_a_higher_rate_is_kept_if_two_kinds_of_traffic_keep_it_and_the_wait_hardly_grows(
    pair: Placed,
    run: TriedRate,
    monkeypatch: pytest.MonkeyPatch,
    sure: Callable[[int, tuple[int, ...]], bool],
    growth: float,
    factor: float,
) -> None:
    plan, problem = at_rate(*pair, 0.5), pair[1]
    planned_rps = default_rate(plan, problem)

    def tried(*args: Any, **options: Any) -> TriedRate:
        is_higher = args[2] > planned_rps
        summary = replace(run.summary, steady=True, growth=replace(run.summary.growth, value=growth * is_higher))
        is_sure = not is_higher or sure(options["seed"], options["lengths"])
        return replace(run, summary=summary, within=is_sure, kept=is_sure, sure=is_sure, close=False)

    monkeypatch.setattr(rates, "simulated_at", tried)
    found = Verified.of(again(replace(plan, inputs={}, notes=()), problem)).verification
    assert found.kept_rps == pytest.approx(factor * planned_rps)


# --- engines that may run more requests at once than decode in the saturated plan


def with_seats(plan: Plan, micro_batch: int) -> Plan:
    return replace(plan, replicas=tuple(replace(one, micro_batch=micro_batch) for one in plan.replicas))


def test_seats_are_as_many_as_kv_has_room_for(pair: Placed) -> None:
    plan, problem = with_seats(pair[0], 16), pair[1]
    [first, *_] = plan.replicas
    twice, many = (with_more_seats(plan, problem, factor) for factor in (2.0, 1e4))
    assert [one.seats for one in twice.replicas] == [2 * one.planned_seats for one in plan.replicas]
    assert twice.replicas[0].planned_seats == first.planned_seats
    mean = problem.workload.moments(block_tokens=1).mean_prompt
    assert pair[0].replicas[0].seats <= many.replicas[0].seats <= first.kv_tokens / mean
    assert seats_of(many) == sum(one.max_num_seqs for one in many.replicas)
    assert with_all_seats(twice, problem).replicas[0].micro_batch == 2 * first.micro_batch
    assert with_all_seats(plan, problem) is plan
    alone = with_more_seats(with_seats(plan, 1), problem, 1.5)
    assert {one.seats for one in alone.replicas} == {2 * first.in_flight}
    prefilling = replace(first, role=Role.PREFILL, micro_batch=0)
    of_prefill = replace(plan, replicas=(prefilling,))
    assert with_more_seats(of_prefill, problem, 2.0) == of_prefill
    given = replace(problem.family, engine_settings=EngineSettings(max_num_seqs=seats_of(plan)))
    assert with_more_seats(plan, replace(problem, family=given), 2.0) == plan


def test_engines_with_more_seats_are_simulated_with_them(pair: Placed) -> None:
    """With one seat each, requests wait for it, and with as many as there were they do not."""
    plan, problem = pair
    few = with_seats(plan, 1)
    seats = [one.seats for one in plan.replicas]
    more = replace(
        few, replicas=tuple(replace(one, max_num_seqs=most) for one, most in zip(few.replicas, seats, strict=True))
    )
    load = Load(lengths=problem.workload, max_position=4096, arrivals=Arrivals.DRAWN, rate_rps=default_rate(*pair))
    question = Question(load=load, num_requests=400, seeds=(0,), settings=Settings(), limits=plan.objective)

    def waited(of: Plan, asked: Question) -> float:
        found = answer(of, problem, asked, processes=1, is_cancelled=never, report=silent)
        return found.summary.ttft_p95_s.value

    assert waited(few, question) > 10 * waited(more, question)
    assert waited(more, question) == waited(plan, question)
    asked = at_settings(more, problem, EngineSettings(max_num_seqs=1))
    assert [one.seats for one in asked.plan.replicas] == [1] * len(plan.replicas)


def test_work_that_is_done_ends_simulations_on_any_machine(pair: Placed) -> None:
    plan, problem = pair
    crowded = at_rate(plan, problem, 1.5)
    whole, small = Budget(), Budget(work_limit=30_000)
    decided = Verified.of(rates.kept_plan(crowded, problem, seed=0, budget=whole, report=no_progress)).verification
    assert decided is not None
    assert whole.work > small.work_limit
    stopped = rates.kept_plan(crowded, problem, seed=0, budget=small, report=no_progress)
    assert stopped == rates.kept_plan(crowded, problem, seed=0, budget=Budget(work_limit=30_000), report=no_progress)
    assert small.is_spent()
    assert small.work < 0.5 * whole.work


def test_a_part_that_misses_is_called_a_part(
    pair: Placed, run: TriedRate, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Large fleets, of which a part is simulated, are those that run out of time."""
    plan, problem = pair
    summary = replace(run.summary, ttft_p95_s=Estimate(value=9.5, half_width=0.0))
    runs = iter([replace(run, summary=summary, kept=False, close=False, missed_by_far=True)])
    monkeypatch.setattr(rates, "simulated_part", lambda plan, *_: RepresentativePart(plan=plan, share=0.125))
    monkeypatch.setattr(rates, "simulated_at", lambda *_, **__: next(runs, None))
    [note] = again(replace(plan, notes=()), problem).notes
    assert note.endswith("TTFT p95 9.5 s of 2 s (a part of its replicas at 0.125 of the rate)")


@pytest.mark.parametrize(
    ("options", "search_s", "simulation_s"),
    [((), 60.0, 120.0), (("--time-limit", "10s"), 10.0, 30.0), (("--time-limit", "60s"), 60.0, 60.0)],
)
def test_a_time_limit_that_is_given_limits_the_simulation_too(
    placed: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], search_s: float, simulation_s: float
) -> None:
    asked = list[PlacementRequest]()

    def finish(_terminal: object, request: PlacementRequest, *_: object) -> ExitCode:
        asked.append(request)
        return ExitCode.OK

    monkeypatch.setattr(placing_verb, "finish", finish)
    cluster = str(placed.with_name("cluster.yaml"))
    assert invoke("place", "-c", cluster, "-m", "Llama-2-7B", "-w", "500/100", *options).exit_code == ExitCode.OK
    [request] = asked
    assert request.time_limit_s == search_s
    assert request.simulation_limit_s == simulation_s


def test_cancelled_before_the_first_request_nothing_is_said_of_a_plan(pair: Placed) -> None:
    cancelled = threading.Event()
    cancelled.set()
    assert (
        simulated_at(*pair, 1.0, pair[0].objective, seed=0, budget=Budget(cancelled=cancelled), report=silent) is None
    )


def test_no_verify_leaves_it_out(placed: Path) -> None:
    cluster = str(placed.with_name("cluster.yaml"))
    asked = ["place", "-c", cluster, "-m", "Llama-2-7B", "-w", "500/100", "-o", "json", "-q"]
    assert "verification" not in json.loads(invoke(*asked, "--no-verify").stdout)["inputs"]


@pytest.mark.parametrize(
    ("steady", "growth_s", "calm"),
    [
        (True, (0.0, 0.5), True),  # seconds of wait per second, and the half width
        (True, (0.03, 0.0), False),
        (False, (0.0, 0.0), False),
        (None, (0.005, 0.01), True),  # short, and clear nevertheless
        (None, (0.005, 0.02), False),
        (None, (0.0, math.nan), False),  # an unknown interval
    ],
)
def test_a_wait_that_grows_by_chance_at_most_is_calm(
    one_run: Summary, steady: bool | None, growth_s: tuple[float, float], calm: bool
) -> None:
    value, half_width = growth_s
    summary = replace(one_run, steady=steady, growth=Estimate(value=value, half_width=half_width))
    assert rates.hardly_grows(summary) is calm


# --- plans with more seats than runs can fill


@pytest.fixture(scope="module")
def fleet(placed: Path) -> Placed:
    """24 equal replicas of 16 seats, each on a node of its own: as `place` would make them, but for the proof."""
    found = load_plan_and_problem(str(placed))
    started = at_settings(found.plan, found.problem, EngineSettings(max_num_seqs=16))
    return fleet_of(started.plan, started.problem, 24)


def fleet_of(plan: Plan, problem: PlacementProblem, nodes: int) -> Placed:
    """Return the first replica of a plan once on each of so many nodes."""
    group = replace(problem.cluster.node_groups[0], count=nodes)
    cluster, first = replace(problem.cluster, node_groups=(group,)), plan.replicas[0]

    def on_node(number: int) -> ReplicaPlan:
        stages = tuple(
            replace(stage, devices=tuple(f"{group.node_name(number)}/{name.split('/')[1]}" for name in stage.devices))
            for stage in first.stages
        )
        return replace(first, stages=stages)

    return replace(plan, replicas=tuple(map(on_node, range(nodes))), inputs={}), replace(problem, cluster=cluster)


def runs_of_at_most(monkeypatch: pytest.MonkeyPatch, ordinary: int, to_fill: int) -> None:
    """Let runs be shorter than in `place`, so that small plans have too many seats for them."""
    monkeypatch.setattr(rates, "FEWEST", 10)
    monkeypatch.setattr(rates, "WITHOUT_WORKERS", rates._Most(ordinary, ordinary, to_fill))


@pytest.fixture
def asked(one_run: Summary, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, Question]]:
    """Return what is asked of the simulator, whose answer is always that all limits are kept at ease."""
    questions = list[tuple[Plan, Question]]()
    growth = Estimate(value=0.0, half_width=0.0)
    ttft, tpot = Estimate(value=0.01, half_width=0.0), Estimate(value=0.001, half_width=0.0)
    summary = replace(one_run, steady=True, growth=growth, ttft_p95_s=ttft, mean_tpot_s=tpot, attainment=1.0)

    def answer(plan: Plan, _problem: PlacementProblem, question: Question, **_: object) -> SimpleNamespace:
        questions.append((plan, question))
        return SimpleNamespace(complete=True, summary=summary, run=None, runs=(UNCOUNTED,))

    monkeypatch.setattr(rates, "answer", answer)
    return questions


def test_a_plan_that_its_runs_fill_is_simulated_whole_and_as_ever(
    fleet: Placed, asked: list[tuple[Plan, Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, problem = fleet
    runs_of_at_most(monkeypatch, ordinary=400, to_fill=2 * 24 * 16)  # just enough to fill the seats twice
    found = Verified.of(again(plan, problem)).verification
    assert (found.share, found.too_short) == (None, None)
    rate_rps = default_rate(plan, problem)
    assert [(question.load.rate_rps, question.num_requests, question.seeds) for _, question in asked] == [
        (rate_rps, 768, (0,))
    ]  # fmt: skip
    assert all(simulated == plan for simulated, _ in asked)
    assert (found.rate_rps, found.kept_rps) == (rate_rps, rate_rps)


def test_of_a_plan_with_more_seats_a_part_gets_its_share_of_every_rate(
    fleet: Placed, asked: list[tuple[Plan, Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, problem = fleet
    runs_of_at_most(monkeypatch, ordinary=8 * 6 * 16, to_fill=2 * 24 * 16 - 1)
    found = Verified.of(again(plan, problem)).verification
    rate_rps = default_rate(plan, problem)
    assert (found.rate_rps, found.kept_rps) == (rate_rps, rate_rps), "those of the whole plan"
    assert (found.share, found.too_short, found.num_requests) == (pytest.approx(6 / 24), None, 8 * 6 * 16)
    assert {len(part.replicas) for part, _ in asked} == {6}
    rates_rps = [question.load.rate_rps or 0.0 for _, question in asked]
    assert rates_rps == pytest.approx([found.share * rate_rps])
    cheapest = replace(plan.objective, kind=ObjectiveKind.COST, demand_rps=0.5 * rate_rps)
    demanded = replace(plan, objective=cheapest)
    asked.clear()
    again(demanded, problem)
    assert [question.load.rate_rps for _, question in asked] == [pytest.approx(0.5 * rate_rps * 6 / 24)]


def test_the_part_of_a_large_fleet_behaves_as_the_whole_and_as_a_small_one(
    fleet: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, problem = fleet
    runs_of_at_most(monkeypatch, ordinary=8 * 6 * 16, to_fill=2 * 24 * 16 - 1)  # 6 of 24 replicas
    of_part = Verified.of(again(plan, problem)).verification
    small = fleet_of(plan, problem, 6)
    of_small = Verified.of(again(*small)).verification
    whole = simulated_at(
        plan, problem, default_rate(plan, problem), plan.objective, seed=3, budget=Budget(), report=silent,
        lengths=(8 * 24 * 16,),
    )  # fmt: skip
    assert (of_part.share, of_small.share) == (pytest.approx(6 / 24), None)
    assert of_part.tpot_mean_s == of_small.tpot_mean_s, "the same replicas under the same load"
    assert of_part.rate_rps == pytest.approx(4 * of_small.rate_rps)
    assert of_part.tpot_mean_s == pytest.approx(whole.summary.mean_tpot_s.value, rel=0.05)
    assert of_part.kept == of_small.kept == whole.kept
    empty = simulated_at(
        plan, problem, default_rate(plan, problem), plan.objective, seed=3, budget=Budget(), report=silent,
        lengths=(24 * 16 // 2,),
    )  # fmt: skip
    assert empty.summary.mean_tpot_s.value < 0.93 * of_part.tpot_mean_s, "while seats are empty, it looks too good"


def test_a_run_that_fills_not_even_one_replica_claims_no_more_than_it_saw(
    fleet: Placed, asked: list[tuple[Plan, Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, problem = fleet
    runs_of_at_most(monkeypatch, ordinary=31, to_fill=31)
    simulated = again(plan, problem)
    found = Verified.of(simulated).verification
    assert (found.share, found.too_short) == (pytest.approx(1 / 24), True)
    assert {len(part.replicas) for part, _ in asked} == {1}
    assert found.kept_rps == found.rate_rps, "no higher rate is tried"
    assert len(asked) == 1
    said = drawn(simulated)
    assert "kept up to" not in said
    assert "too short to fill the seats" in said


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (1 / 8, "1/8 of its replicas at 1/8 of the rate"),
        (0.0201, "1/50 of its replicas at 1/50 of the rate"),
        (0.41, "41% of its replicas at 41% of the rate"),
        (0.95, "95% of its replicas at 95% of the rate"),
    ],
)
def test_every_output_says_which_part_was_simulated(pair: Placed, share: float, said: str) -> None:
    plan, _ = pair
    plain = {**plan.inputs["verification"], "kept": True, "share": None, "too_short": None, "dispatched": None}

    def shown(**others: object) -> Plan:
        return replace(plan, inputs={**plan.inputs, "verification": {**plain, **others}})

    part, missing = shown(share=share), shown(share=share, kept=False)
    lines = text_of(headline(part), width=80).splitlines()
    assert any(line.strip() == f"simulated: {said}" for line in lines)
    assert f"simulated: {said}" in drawn(missing)
    assert "simulated: " not in drawn(shown())
    message = result_to_proto(part, b"{}").verification
    assert message.share == share
    assert not message.too_short
    assert f"simulated: {said}" in resource_views._simulated(message, plan_pb2.PlanSpec()).plain
    assert f"simulated: {said}" in page_of(part)
    assert f"simulated: {said}" not in page_of(shown())
    short = result_to_proto(shown(too_short=True), b"{}").verification
    assert not short.HasField("share")
    for text in (resource_views._simulated(short, plan_pb2.PlanSpec()).plain, page_of(shown(too_short=True))):
        assert "too short to fill the seats" in text
    dispatched = shown(dispatched=True)
    message = result_to_proto(dispatched, b"{}").verification
    assert (message.dispatched, short.dispatched) == (True, False)
    viewed = resource_views._simulated(message, plan_pb2.PlanSpec()).plain
    for text in (viewed, page_of(dispatched), text_of(headline(dispatched), width=80)):
        assert "simulated with the heads of every request dispatched, as engines do" in text


def page_of(plan: Plan) -> str:
    return " ".join(f"{tile.value} {tile.note}" for tile in key_figures._simulated(plan))


@pytest.mark.parametrize("kind", [ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT, ObjectiveKind.COST])
def test_every_view_of_a_plan_that_misses_its_limits_says_so(pair: Placed, kind: ObjectiveKind) -> None:
    """Plans of a planner have a spec, imported ones have none."""
    plan, problem = pair
    demand_rps = 2.0 if kind is ObjectiveKind.COST else None
    objective = replace(plan.objective, kind=kind, demand_rps=demand_rps)
    result = replace(plan.result, objective=kind, value=2.0, unit=objective.unit)
    found = {**plan.inputs["verification"], "kept": False, "kept_rps": None}
    missing = replace(plan, objective=objective, result=result, inputs={**plan.inputs, "verification": found})
    spec = plan_pb2.PlanSpec(objective=plan_pb2.Objective(kind=OBJECTIVE_KINDS[kind]))
    answer, value = result_to_proto(missing, b"{}"), f"2.000 {objective.unit}"
    for message in (plan_pb2.Plan(spec=spec, result=answer), plan_pb2.Plan(result=answer)):
        assert resource_views.value_of(message).plain == f"{value}, MISSED"
        assert f"Value {value}, MISSED" in " ".join(text_of(resource_views.plan_summary(message), width=200).split())
    assert "limits MISSED in simulation" in repr(hetis.Plan(value=missing, problem=problem))


def test_curves_are_of_the_part_whose_seats_their_runs_fill(
    fleet: Placed, asked: list[tuple[Plan, Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, problem = fleet
    runs_of_at_most(monkeypatch, ordinary=8 * 6 * 16, to_fill=24 * 16)
    curve = latency_curve.latency_curve(plan, problem, budget=Budget(), report=silent)
    rates_rps = [share * default_rate(plan, problem) for share in latency_curve.SHARES]
    assert [point.rate_rps for point in curve.sweep.points] == pytest.approx(rates_rps)
    assert (curve.share, curve.too_short) == (pytest.approx(6 / 24), False)
    assert [question.load.rate_rps for _, question in asked] == pytest.approx(
        [rate_rps * 6 / 24 for rate_rps in rates_rps]
    )
    page = plans_page([ShownPlan(name="The plan", plan=plan, problem=problem, curve=curve)])
    assert "1/4 of its replicas at 1/4 of the rate" in page
    asked.clear()
    runs_of_at_most(monkeypatch, ordinary=8 * 6 * 16, to_fill=2 * 24 * 16)
    whole = latency_curve.latency_curve(plan, problem, budget=Budget(), report=silent)
    assert whole.share is None
    assert all(simulated == plan for simulated, _ in asked)


@pytest.mark.parametrize(("missed", "attainment", "is_sure", "is_close"), [
    (0, 1.0, True, False), (1, 1.0, False, False), (0, 0.99, True, False), (10, 0.99, False, True),
])  # fmt: skip
def test_one_miss_refutes_100_percent_and_none_is_sure(
    missed: int, attainment: float, is_sure: bool, is_close: bool
) -> None:
    over = np.zeros(1000)
    over[:missed] = 2.0
    (limited,) = _attained(attainment, {Latency.TTFT: over}, {Latency.TTFT: 1.0}).limited
    assert limited.value == missed / 1000
    assert (limited.high <= limited.limit) is is_sure
    assert (limited.low <= limited.limit < limited.high / limited.close) is is_close
