"""Problems of engines' families, and the value of the plan that is found for one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.placement.families import run_by
from hetis.solver.plan import ObjectiveKind, Plan, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import (
    ENGINE,
    PLUGIN,
    make_model,
    make_node,
    make_problem,
    make_profile,
    problems,
)
from tests.solver.searching import plan_or_none, worth

REL = 1e-6
EXAMPLES = settings().max_examples
WITH_WORKERS = run_by(
    Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(1, 4, 16), chunk_tokens=(64,)),
    EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2),
)
FEW_GPUS = replace(WITH_WORKERS, engine=EngineRules(name="vllm-hetis", max_stages=3, max_gpus=2))
PLAIN = replace(WITH_WORKERS, max_pool=0, engine=EngineRules(name="vllm", max_stages=3))
LARGE_STAGES = replace(
    WITH_WORKERS, engine=EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2, min_layers=2)
)
CHARGED = run_by(replace(WITH_WORKERS, engine=None), replace(ENGINE, max_stages=3, max_pooled_stages=2, plugin=PLUGIN))
FAMILIES = (WITH_WORKERS, CHARGED, PLAIN, FEW_GPUS, LARGE_STAGES)


def value_of(problem: PlacementProblem, strategy: str = "hetis") -> float:
    """Return the value of the plan found, which the checker accepts and which is proved the best."""
    plan = plan_or_none(problem, strategy=strategy, gap_target=0.0)
    if plan is None:
        return worth(None, problem)
    assert check_plan(plan, problem) == ()
    assert plan.result.status is Status.OPTIMAL
    return plan.result.value


def a_problem(data: st.DataObject) -> PlacementProblem:
    """Draw a problem of any family and objective, whose model may be cut anywhere."""
    family = data.draw(st.sampled_from(FAMILIES))
    problem = data.draw(problems(max_gpus=5, kinds=tuple(ObjectiveKind), family=family))
    assume(not problem.model.forbidden_cuts)
    return problem


def a_plan(**changes: object) -> tuple[Plan, PlacementProblem]:
    """Two stages, each with a worker, and their problem."""
    slow, fast = make_profile("B", usable_bytes=6_000_000), make_profile("A", usable_bytes=9_000_000)
    problem = make_problem(
        [make_node("a", "A", nodes=2), make_node("b", "B", nodes=4)],
        profiles={"A": fast, "B": slow},
        model=make_model(num_layers=6),
        family=WITH_WORKERS,
    )
    return solve_placement(problem, strategy="hetis"), replace(problem, **changes)  # type: ignore[arg-type]
