"""The differences between two plan files."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.planner.use_cases.compare import Figures, figures_of
from hetis.planner.use_cases.sources import Inputs, inputs_from_documents, load_plan_and_problem
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import PlanChange, plan_change
from hetis.solver.workload import WorkloadMoments


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """Two plans and their differences. ``same_model``: weights can be kept. ``warnings`` limit the comparison."""

    before: Plan
    after: Plan
    figures_before: Figures
    figures_after: Figures
    same_model: bool
    warnings: tuple[str, ...]
    change: PlanChange


def diff_plans(before: str, after: str) -> PlanDiff:
    """Read two plans and compare them; devices of the same name are taken to be the same GPU.

    Raises:
        DocumentError: a plan, or a document in it, is not usable.
    """
    old, new = load_plan_and_problem(before), load_plan_and_problem(after)
    old_inputs, new_inputs = _inputs(old.plan, before), _inputs(new.plan, after)
    same_model = old_inputs.model == new_inputs.model
    return PlanDiff(
        before=old.plan,
        after=new.plan,
        figures_before=figures_of(old.plan, old_inputs),
        figures_after=figures_of(new.plan, new_inputs),
        same_model=same_model,
        warnings=(*old.warnings, *new.warnings, *_differences(old_inputs, new_inputs, old.plan, new.plan)),
        change=plan_change(old.plan, new.plan, new_inputs.model, _moments(old.problem), same_model=same_model),
    )


def _inputs(plan: Plan, name: str) -> Inputs:
    return inputs_from_documents(plan.inputs.get("documents"), name)


def _moments(problem: PlacementProblem) -> WorkloadMoments:
    return problem.workload.moments(block_tokens=problem.assumptions.block_tokens)


def _differences(old: Inputs, new: Inputs, before: Plan, after: Plan) -> list[str]:
    """Return the reasons why the rates of the two plans are not comparable."""
    found = []
    if old.model != new.model:
        found.append(f"the plans serve different models: {old.model.name} and {new.model.name}; nothing is kept")
    if old.workload != new.workload:
        found.append(f"the plans are for different traffic: {old.workload.name} and {new.workload.name}")
    if before.objective != after.objective:
        found.append("the plans have different objectives or limits")
    changed = sorted(gpu for gpu in old.profiles.keys() & new.profiles.keys() if old.profiles[gpu] != new.profiles[gpu])
    if changed:
        found.append(f"the plans were made with different profiles of {', '.join(changed)}")
    return found
