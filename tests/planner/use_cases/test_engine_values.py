"""The values of other engines' plans next to a plan, by the real solver, on a fleet where every engine has one."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.planner.use_cases.engine_values import with_engine_values
from hetis.planner.use_cases.place import pose, search
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import for_engine
from hetis.planner.use_cases.record.forms import EngineValue
from hetis.planner.use_cases.record.parts import OtherEngines
from hetis.planner.use_cases.request import PlacementRequest, objective
from hetis.planner.use_cases.sources import LoadedInputs, engine_rules, load_inputs
from hetis.solver.budget import Budget, silent
from hetis.solver.plan import AttentionWorkerPool, KvRoute, ObjectiveKind, Plan, Role
from tests.fleets import fleet

FLEET = fleet("workers pay here", "h100: 1 H100-SXM-80GB", "p100: 2 P100-PCIe-12GB")
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedInputs:
    path: Path = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    path.write_text(FLEET, encoding="utf-8")
    return load_inputs(cluster=str(path), model="Qwen2.5-32B", workload="16000/1000")


def placed(
    loaded: LoadedInputs, engine: str, *, ttft_s: float = math.inf, **limits: int
) -> tuple[Plan, list[EngineValue]]:
    """Return a plan for an engine, and its values of the others."""
    goal = objective(ObjectiveKind.GOODPUT, ttft_s=ttft_s, tpot_s=0.1, demand_rps=None)
    settings = PlacementSettings(engine=engine_rules(engine, "hetis", **limits))
    problem = for_engine(loaded, settings.engine).inputs.problem(goal, "hetis", engine=settings.engine)
    plan = search(problem, settings, budget=Budget(clock=time.monotonic), report=silent)
    asked = {"seed": 0, "budget": Budget(), "report": silent, "evaluated": {}}
    return plan, OtherEngines.of(with_engine_values(plan, problem, **asked)).values  # type: ignore[arg-type]


def test_every_engine_s_plan_says_what_the_others_own_plans_reach(loaded: LoadedInputs) -> None:
    plans = {name: placed(loaded, name) for name in ("vllm-hetis", "vllm", "sglang")}
    values = {name: plan.result.value for name, (plan, _) in plans.items()}
    assert values["sglang"] < values["vllm"] < values["vllm-hetis"], "SGLang leaves less memory to KV"
    for name, (_, others) in plans.items():
        assert {other.engine for other in others} == values.keys() - {name}
        for other in others:
            assert other.value == pytest.approx(values[other.engine], rel=RELATIVE), (name, other)
            assert other.bound == pytest.approx(values[other.engine], rel=RELATIVE), (name, other)
    (of_plain,) = (other for other in plans["vllm"][1] if other.engine == "vllm-hetis")
    (of_hetis,) = (other for other in plans["vllm-hetis"][1] if other.engine == "vllm")
    assert of_plain.lacks == of_hetis.lacks == ("attention workers",)


def test_what_no_engine_runs_is_named(tmp_path: Path) -> None:
    """KV that goes from one vendor's GPUs to another's, and attention workers of models that have none."""
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET.replace("P100-PCIe-12GB, count: 2", "MI210-64GB, count: 1"), encoding="utf-8")
    loaded = load_inputs(cluster=str(path), model="gpt-oss-20b", workload="1000/1000")
    goal = objective(ObjectiveKind.GOODPUT, ttft_s=math.inf, tpot_s=0.1, demand_rps=None)
    problem = loaded.inputs.problem(goal, "hetis", engine=engine_rules("vllm", "hetis"))
    plan, _ = placed(loaded, "vllm")
    ours = plan.replicas[0]
    prefill, decode = replace(ours, role=Role.PREFILL), replace(ours, role=Role.DECODE)
    decode = replace(decode, stages=(replace(ours.stages[0], gpu="MI210-64GB", devices=("p100/0",)),))
    pool = AttentionWorkerPool(stage=0, gpu="MI210-64GB", devices=("p100/0",), kv_head_groups=1)
    for changed, lacks in (
        ({"replicas": (prefill, decode), "kv_routes": (KvRoute(prefill=0, decode=1, rate=0.1),)},
         "KV exchanged by GPUs of several vendors"),
        ({"replicas": (replace(ours, attention_workers=(pool,)),)},
         "attention workers for this model"),
    ):  # fmt: skip
        asked = {"seed": 0, "budget": Budget(time_limit_s=0.0), "report": silent, "evaluated": {}}
        told = with_engine_values(replace(plan, **changed), problem, **asked)  # type: ignore[arg-type]
        (hetis,) = (other for other in OtherEngines.of(told).values if other.engine == "vllm-hetis")
        assert hetis.lacks == (lacks,)


def test_a_plan_that_gave_up_value_has_no_other_engines_beside_it(tmp_path: Path) -> None:
    """They would seem to reach what the plan gave up for its simplicity."""
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET, encoding="utf-8")
    plain, simple = (
        pose(
            PlacementRequest(
                cluster=str(path), model="Qwen2.5-32B", workload="16000/1000", simplest_within=share, engine="vllm"
            )
        )
        .prove(silent)
        .plan
        for share in ("0", "5%")
    )
    assert OtherEngines.of(plain).values
    assert not OtherEngines.of(simple).values
    assert any("the simplest plan within 5.0%" in note for note in simple.notes)
    assert simple.result.value >= 0.95 * plain.result.value, "prompts wait less for replicas that are not the fastest"


def test_without_time_a_plan_says_that_nothing_was_looked_for(loaded: LoadedInputs) -> None:
    goal = objective(ObjectiveKind.GOODPUT, ttft_s=float("inf"), tpot_s=0.1, demand_rps=None)
    settings = PlacementSettings(engine=engine_rules("vllm-hetis", "hetis"))
    problem = loaded.inputs.problem(goal, "hetis", engine=settings.engine)
    plan = search(problem, settings, budget=Budget(clock=time.monotonic), report=silent)
    told = with_engine_values(plan, problem, seed=0, budget=Budget(time_limit_s=0.0), report=silent, evaluated={})
    plain, _ = OtherEngines.of(told).values
    assert (plain.lacks, plain.why_not) == (("attention workers",), "no time was left")
    assert plain.equal_stages
    assert plain.value == pytest.approx(placed(loaded, "vllm")[0].result.value, rel=RELATIVE), "one card, one stage"
    assert replace(told, inputs=plan.inputs) == plan
