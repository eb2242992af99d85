"""The real solver process."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.formats.documents import from_data
from hetis.planner.jobs.frames import JobFrame
from hetis.planner.jobs.messages import FoundPlan, PosedProblem, posed_from_json
from hetis.planner.jobs.pool import Begun, PoolSettings, SearchEvent, SolverPool
from hetis.planner.jobs.process import SolverProcess
from hetis.planner.jobs.searching import solve
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.saved_plans import problem_of_plan
from hetis.planner.use_cases.service_level import ServiceLevel, Statistic
from hetis.planner.use_cases.sources import engine_rules, load_inputs
from hetis.solver.budget import Progress
from hetis.solver.check import check_plan
from hetis.solver.engine_rules import EngineSettings
from hetis.solver.errors import InfeasibleError
from hetis.solver.plan import Objective, Plan, Role
from hetis.v1 import plan_pb2

EXAMPLES = Path(__file__).parents[3] / "examples"
PAPER, TWO_CARDS = str(EXAMPLES / "paper.yaml"), str(EXAMPLES / "two-cards.yaml")


@pytest.fixture(scope="module")
def posed() -> PosedProblem:
    loaded = load_inputs(cluster=PAPER, model="Llama-2-70B", workload="azure_conv_2023")
    return PosedProblem(loaded=loaded, objective=Objective(), settings=settings_of("hetis"))


def settings_of(strategy: str) -> PlacementSettings:
    return PlacementSettings(strategy=strategy, engine=engine_rules(None, strategy))


def search_for(posed: PosedProblem) -> list[SearchEvent]:
    async def scenario() -> list[SearchEvent]:
        pool = SolverPool(PoolSettings())
        pool.start()
        try:
            search = pool.reserve("test")
            search.begin(posed.to_json(), time_limit_s=posed.settings.time_limit_s)
            async with asyncio.timeout(180):
                return [news async for news in search.events()]
        finally:
            await pool.stop()

    return asyncio.run(scenario())


def test_a_posed_problem_survives_the_way(posed: PosedProblem) -> None:
    assert posed_from_json(posed.to_json()) == posed
    assert posed_from_json(posed.to_json()).to_json() == posed.to_json()
    split = replace(posed, settings=replace(posed.settings, roles=(Role.PREFILL, Role.DECODE)))
    assert posed_from_json(split.to_json()) == split
    assert posed_from_json(split.to_json()).problem().family.roles == (Role.PREFILL, Role.DECODE)
    chosen = EngineSettings(max_num_seqs=64, chunk_tokens=(256, 512))
    kept = replace(posed, loaded=posed.loaded.at(chosen))
    assert posed_from_json(kept.to_json()) == kept
    assert posed_from_json(kept.to_json()).problem().family.engine_settings == chosen
    assert b"engine_settings" not in posed.to_json()
    level = ServiceLevel(ttft=Statistic.P99, attainment=0.9)
    held = replace(posed, verify=False, service_level=level)
    assert posed_from_json(held.to_json()) == held


def test_a_problem_that_was_posed_before_there_were_roles_and_levels_can_be_read(posed: PosedProblem) -> None:
    data = json.loads(posed.to_json())
    del data["settings"]["roles"], data["verify"], data["service_level"]
    assert posed_from_json(json.dumps(data).encode()) == posed


def test_a_search_reports_what_it_does_and_finds_a_plan_that_holds(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_inputs(cluster=TWO_CARDS, model="Llama-2-7B", workload="humaneval_lengths")  # simulated quickly
    level = ServiceLevel(ttft=Statistic.P99)  # with this limit, one that simulated traffic misses
    goal, settings = Objective(ttft_limit_s=0.04), settings_of("hexgen")
    posed = PosedProblem(loaded=loaded, objective=goal, settings=settings, service_level=level)
    begun, *progress, found = search_for(posed)
    assert begun is Begun.BEGUN
    assert progress
    assert all(isinstance(news, Progress) for news in progress)
    times_s = [news.elapsed_s for news in progress if isinstance(news, Progress)]
    assert times_s == sorted(times_s)
    bounds = [news.bound for news in progress if isinstance(news, Progress) and "simulating" in news.phase]
    assert bounds
    assert None not in bounds
    assert isinstance(found, FoundPlan)
    plan = from_data(json.loads(found.document))
    assert isinstance(plan, Plan)
    assert check_plan(plan, problem_of_plan(plan, "plan").problem) == ()
    assert any(isinstance(news, Progress) and news.phase.startswith("simulating ") for news in progress)
    simulated = Verified.of(plan).verification
    assert simulated is not None
    said = plan_pb2.PlanResult.FromString(found.result).verification
    assert (said.rate_rps, said.kept, said.ttft_p95_s) == (simulated.rate_rps, simulated.kept, simulated.ttft_p95_s)
    assert said.kept, "the value is the rate that is kept"
    assert capfd.readouterr().out == ""  # HiGHS prints, but not to this stdout


def test_a_plan_is_held_to_the_level_that_is_asked_for_or_not_simulated(posed: PosedProblem) -> None:
    def answered(asked: PosedProblem) -> tuple[plan_pb2.PlanResult, int]:
        phases: list[str] = []
        answer = solve(asked, cancelled=threading.Event(), report=lambda _: None, begin=phases.append)
        assert isinstance(answer, FoundPlan)
        assert phases[0] == "searching"
        return plan_pb2.PlanResult.FromString(answer.result), phases.count("verifying")

    lenient = replace(posed, settings=replace(posed.settings, strategy="uniform"))
    held, num_found = answered(replace(lenient, service_level=ServiceLevel(attainment=0.5)))
    assert (held.verification.kept, num_found) == (True, 1)
    assert any("simulated traffic must keep 50% of the requests" in note for note in held.notes)
    unseen, num_found = answered(replace(lenient, verify=False))
    assert (unseen.HasField("verification"), num_found) == (False, 0)


@pytest.mark.parametrize("when", ["0 of", "1,0"])
def test_a_plan_whose_simulation_is_cancelled_is_answered_as_it_was_found(posed: PosedProblem, when: str) -> None:
    cancelled = threading.Event()

    def call_off(progress: Progress) -> None:
        if progress.phase.startswith("simulating ") and f", {when}" in progress.phase:
            cancelled.set()

    uniform = replace(posed, settings=replace(posed.settings, strategy="uniform"))
    answer = solve(uniform, cancelled=cancelled, report=call_off)
    assert cancelled.is_set()
    assert isinstance(answer, FoundPlan)
    result = plan_pb2.PlanResult.FromString(answer.result)
    assert result.status in (plan_pb2.SOLVE_STATUS_OPTIMAL, plan_pb2.SOLVE_STATUS_FEASIBLE)
    assert not result.HasField("verification")


def test_what_cannot_be_is_proved_with_reasons(posed: PosedProblem) -> None:
    tight = replace(posed, objective=Objective(tpot_limit_s=1e-6))
    outcome = search_for(tight)[-1]
    assert isinstance(outcome, InfeasibleError)
    assert outcome.reasons


def test_a_search_that_is_called_off_keeps_its_incumbent(posed: PosedProblem) -> None:
    cancelled = threading.Event()

    def call_off(progress: Progress) -> None:
        if progress.incumbent is not None:
            cancelled.set()

    answer = solve(posed, cancelled=cancelled, report=call_off)
    assert isinstance(answer, FoundPlan)
    result = plan_pb2.PlanResult.FromString(answer.result)
    assert result.status in (plan_pb2.SOLVE_STATUS_INTERRUPTED, plan_pb2.SOLVE_STATUS_OPTIMAL)
    assert result.value > 0


async def test_a_process_ends_when_its_service_is_gone(posed: PosedProblem) -> None:
    process = await SolverProcess.start()
    async with asyncio.timeout(60):
        ready = await process.receive()
        assert ready is not None
        assert ready.kind == "ready"
        process.send(JobFrame(kind="solve", fields={}, payload=posed.to_json()))
        await process.receive()
        process._stdin.close()  # as the kernel does for a service that has died
        assert await process.ended() == 0
