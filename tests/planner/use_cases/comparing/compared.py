"""A comparison whose solver is a test's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hetis.planner.use_cases.comparing import compare as comparing
from hetis.planner.use_cases.comparing.compare import Searches, compare_strategies
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.sources import load_inputs
from hetis.solver.budget import Budget, silent
from hetis.solver.engine_rules import EngineRules
from hetis.solver.plan import Objective, Plan
from tests.planner import plans
from tests.planner.command_line import EXAMPLES

LOADED = load_inputs(cluster=str(EXAMPLES / "paper.yaml"), model="Llama-2-70B", workload="1024/256")


SIMULATED = ["compare", "--cluster", str(EXAMPLES / "paper.yaml"), "-m", "Llama-2-70B", "-w", "1024/256"]


COMMAND = [*SIMULATED, "--no-verify"]


UNLIMITED = Objective(ttft_limit_s=None, tpot_limit_s=None)


Outcome = tuple[float, float] | Exception  # value and bound


Solver = Callable[[Mapping[str, Outcome]], list[str]]


def plan_of(strategy: str, value: float, bound: float, objective: Objective) -> Plan:
    plan = plans.plan(plans.paper_replica())
    gap = abs(bound - value) / value
    result = replace(plan.result, value=value, bound=bound, gap=gap, objective=objective.kind, unit=objective.unit)
    return replace(plan, strategy=strategy, result=result, objective=objective)


def compared(
    strategies: list[str], budget: Budget | None = None, objective: Objective | None = None
) -> dict[str, comparing.Compared]:
    found = compare_strategies(searches(objective or UNLIMITED, lambda: budget or Budget()), strategies)
    return {outcome.strategy: outcome for outcome in found}


def searches(objective: Objective, budget: Callable[[], Budget] = Budget) -> Searches:
    settings = PlacementSettings(engine=EngineRules(name="vllm-hetis"))
    return Searches(loaded=LOADED, objective=objective, settings=settings, budget=budget, report=silent)
