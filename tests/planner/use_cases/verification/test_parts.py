"""Of a large fleet a part is simulated, at its share of every rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import hetis
from hetis.planner.cli.server import resource_views
from hetis.planner.convert.plans import OBJECTIVE_KINDS, result_to_proto
from hetis.planner.report.page.pages import ShownPlan, plans_page
from hetis.planner.report.plan import headline
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.planner.use_cases.simulation.engine_settings import at_settings
from hetis.planner.use_cases.simulation.representative import RepresentativePart
from hetis.planner.use_cases.simulation.simulate import Question, default_rate
from hetis.planner.use_cases.verification import latency_curve, rates
from hetis.planner.use_cases.verification.rates import simulated_at
from hetis.planner.use_cases.verification.tried_rate import TriedRate
from hetis.simulator.metrics import Summary
from hetis.simulator.running import silent
from hetis.simulator.steadiness import Estimate
from hetis.solver.budget import Budget
from hetis.solver.engine_rules import EngineSettings
from hetis.solver.plan import ObjectiveKind, Plan, ReplicaPlan
from hetis.solver.problem import PlacementProblem
from hetis.v1 import plan_pb2
from tests.planner.report.test_reports import text_of
from tests.planner.use_cases.simulation.test_simulate import no_mixed_factor
from tests.planner.use_cases.verification.verifying import UNCOUNTED, Placed, again, drawn, page_of

__all__ = ["no_mixed_factor"]  # for every test here, too


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
