"""The simulator verifies a plan before `place` shows it."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hetis.formats.documents import load_plan
from hetis.planner.cli import place as placing_verb
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.report.figures import digits
from hetis.planner.report.page.pages import ShownPlan, plans_page
from hetis.planner.report.plan import render_plan
from hetis.planner.use_cases.climbing import Climbed
from hetis.planner.use_cases.place import PosedPlacement, simulated_plan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.request import PlacementRequest
from hetis.planner.use_cases.service_level import (
    DEFAULT,
)
from hetis.planner.use_cases.simulation.simulate import Question, default_rate
from hetis.planner.use_cases.sources import load_inputs
from hetis.planner.use_cases.verification import rates
from hetis.planner.use_cases.verification.outcome import (
    OUT_OF_TIME,
    STOPPED_EARLY,
    missed,
    misses,
    noted_if_stopped,
    settings_of,
)
from hetis.planner.use_cases.verification.rates import LONGER, kept_plan, longest_of, num_requests_of, simulated_at
from hetis.planner.use_cases.verification.tried_rate import MOST_GROWTH, TriedRate
from hetis.simulator.metrics import Summary
from hetis.simulator.running import silent
from hetis.simulator.steadiness import Estimate
from hetis.solver.budget import Budget
from hetis.solver.budget import silent as unreported
from hetis.solver.check import check_plan
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem
from tests.planner.command_line import invoke
from tests.planner.report.test_reports import text_of
from tests.planner.use_cases.simulation.test_simulate import no_mixed_factor
from tests.planner.use_cases.verification.verifying import UNCOUNTED, Placed, again, at_rate, drawn, no_progress

__all__ = ["no_mixed_factor"]  # for every test here, too


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
    assert Verified.of(more).model_value == half.result.value
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
    num = num_requests_of(plan)
    note = (
        f"{found.result.value:.4g} requests/s kept the limits in a run of {num:,} requests, which longer runs have not"
    )
    assert [note in one for one in found.notes] == [True] * (not in_time)


def test_a_rate_that_a_run_kept_up_to_chance_is_shown_where_time_ends_before_any_was_kept_for_sure(
    pair: Placed, run: TriedRate, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, problem = pair
    planned_rps, chance_rps = default_rate(plan, problem), list[float]()

    def tried(*args: Any, **options: Any) -> TriedRate | None:
        if chance_rps:
            return None
        kept = args[2] < 0.9 * planned_rps
        chance_rps.extend([args[2]] * kept)
        return replace(run, kept=kept, within=False, sure=False, close=kept)

    monkeypatch.setattr(rates, "simulated_at", tried)
    found = again(replace(plan, inputs={}, notes=()), problem)
    assert Verified.of(found).verification.kept_rps == pytest.approx(chance_rps[0])
    assert any("which longer runs have not" in one for one in found.notes)


def test_of_the_runs_that_kept_a_rate_before_time_ended_the_longest_is_shown(
    pair: Placed, run: TriedRate, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, problem = pair
    planned_rps, is_over = default_rate(plan, problem), threading.Event()

    def tried(*args: Any, **options: Any) -> TriedRate | None:
        kept, num_requests = args[2] < 0.9 * planned_rps, options["lengths"][0]
        is_long = kept and num_requests == longest_of(plan)
        if is_over.is_set():
            return None
        if is_long:
            is_over.set()
        return replace(run, num_requests=num_requests, kept=kept, within=is_long, sure=is_long, close=False)

    monkeypatch.setattr(rates, "simulated_at", tried)
    found = again(replace(plan, inputs={}, notes=()), problem)
    assert Verified.of(found).verification.num_requests == longest_of(plan) > num_requests_of(plan)
    assert f"in a run of {longest_of(plan):,} requests, which longer runs have not" in "".join(found.notes)


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
        (lambda seed, length: True, 2 * MOST_GROWTH, 1.0),
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


@pytest.mark.parametrize(
    ("options", "search_s", "simulation_s"),
    [((), 60.0, 120.0), (("--time-limit", "10s"), 10.0, 30.0), (("--time-limit", "60s"), 60.0, 60.0)],
)
def test_a_time_limit_that_is_given_limits_the_simulation_too(
    placed: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], search_s: float, simulation_s: float
) -> None:
    asked = list[PlacementRequest]()

    def finish(_terminal: object, posed: PosedPlacement, *_: object) -> ExitCode:
        asked.append(posed.request)
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
