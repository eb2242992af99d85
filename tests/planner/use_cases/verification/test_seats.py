"""Engines run as many requests as their KV has room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hetis.planner.use_cases.place import pose
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.request import PlacementRequest
from hetis.planner.use_cases.simulation.engine_settings import at_settings, with_all_seats
from hetis.planner.use_cases.simulation.simulate import Question, answer, default_rate, seats_of
from hetis.planner.use_cases.verification import rates
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import never, silent
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.engine_rules import EngineSettings
from hetis.solver.plan import Plan, Role
from tests.planner.command_line import EXAMPLES
from tests.planner.use_cases.simulation.test_simulate import no_mixed_factor
from tests.planner.use_cases.verification.verifying import Placed, at_rate, drawn, no_progress
from tests.simulator.more_seats import with_more_seats

__all__ = ["no_mixed_factor"]  # for every test here, too


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


def test_slow_replicas_fill_as_the_queue_model_assumes() -> None:
    """L4s hold a request for three times as long: with equally many for their rates most of their seats stay empty."""
    wanted = PlacementRequest(
        cluster=str(EXAMPLES / "h100-l4.yaml"), model="Qwen2.5-32B", workload="500/2000", engine="vllm"
    )
    posed = pose(wanted)
    plan = posed.prove(lambda _: None).plan
    assert {one.devices()[0].split("/")[0] for one in plan.replicas} == {"h100", "l4-0", "l4-1"}
    found = rates.simulated_at(
        plan, posed.problem, plan.result.value, plan.objective, seed=1, budget=Budget(), report=silent
    )
    assert found is not None
    assert found.kept


def test_a_plan_promises_what_it_keeps_behind_the_router_that_its_export_configures(tmp_path: Path) -> None:
    """nginx sends no request to a full replica, other targets draw replicas whatever these hold."""
    path = tmp_path / "cluster.yaml"
    nodes = [f"  - {{name: n{gpu.lower()}, gpus: [{{type: {gpu}, count: 2}}]}}" for gpu in ("A10G", "RTX-3090")]
    network = "network: {bandwidth: 100Gbps, latency: 20us}"
    path.write_text("\n".join(["apiVersion: hetis/v1", "kind: Cluster", "name: two", "nodes:", *nodes, network]))
    wanted = PlacementRequest(cluster=str(path), model="Llama-3.1-8B", workload="azure_conv_2023", rung="node")
    posed = pose(wanted)
    made = posed.prove(lambda _: None)
    turns, drawn_by_weight = (
        replace(posed, settings=replace(posed.settings, target=target)).verify(made, lambda _: None).plan
        for target in ("", "kserve")
    )
    found = [Verified.of(one).verification for one in (turns, drawn_by_weight)]
    assert [one and one.router for one in found] == [None, "weighted-random"]
    assert drawn_by_weight.result.value < 0.97 * turns.result.value
    assert not check_plan(drawn_by_weight, made.problem)
    assert "simulated behind nginx, as exports configure it" in drawn(turns)
    assert "simulated behind a router that draws by weight, as exports configure it" in drawn(drawn_by_weight)
