"""Two saved plans and what differs between them."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.planner.use_cases.comparing.plan_figures import Figures, figures_of
from hetis.planner.use_cases.saved_plans import PlanAndProblem, differing_fields, load_plan_and_problem
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.plan import Plan
from hetis.solver.replanning.change import PlanChange, plan_change


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """Two plans and their differences. ``same_model``: weights can be kept. ``warnings`` limit the comparison."""

    before: PlanAndProblem
    after: PlanAndProblem
    figures: tuple[Figures, Figures]
    same_model: bool
    warnings: tuple[str, ...]
    change: PlanChange


def diff_plans(before: str, after: str) -> PlanDiff:
    """Read two plans and compare them; devices of the same name are assumed to be the same GPU.

    Raises:
        DocumentError: a plan, or a document in it, is not usable.
    """
    old, new = load_plan_and_problem(before), load_plan_and_problem(after)
    replaced = None if old.inputs.model == new.inputs.model else old.inputs.model
    return PlanDiff(
        before=old,
        after=new,
        figures=(figures_of(old.plan, old.inputs), figures_of(new.plan, new.inputs)),
        same_model=replaced is None,
        warnings=(*old.warnings, *new.warnings, *_differences(old.inputs, new.inputs, old.plan, new.plan)),
        change=plan_change(old.plan, new.plan, new.inputs.model, old.problem.moments_of_ranges(), replaced=replaced),
    )


def _differences(old: Inputs, new: Inputs, before: Plan, after: Plan) -> list[str]:
    """Return the reasons why the rates of the two plans cannot be compared."""
    found = []
    if old.model.name == new.model.name and (others := differing_fields(old.model, new.model)):
        found.append(f"the plans serve {old.model.name} with other {', '.join(others)}; nothing is kept")
    elif old.model != new.model:
        found.append(f"the plans serve different models: {old.model.name} and {new.model.name}; nothing is kept")
    if old.workload != new.workload:
        found.append(f"the plans are for different traffic: {old.workload.name} and {new.workload.name}")
    if before.objective != after.objective:
        found.append("the plans have different objectives or limits")
    changed = sorted(gpu for gpu in old.profiles.keys() & new.profiles.keys() if old.profiles[gpu] != new.profiles[gpu])
    if changed:
        found.append(f"the plans were made with different profiles of {', '.join(changed)}")
    return found
