"""Which targets serve all of a plan's traffic, by name, for those who choose a plan by it."""

from __future__ import annotations

from hetis.engines.versions import Engine
from hetis.planner.export import ExportTarget
from hetis.planner.export.replicas import ExportSettings, Launchable, launchable
from hetis.planner.export.targets import carries
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem


def not_carried(plan: Plan, problem: PlacementProblem) -> dict[str, tuple[str, ...]]:
    """Return for each target why it does not serve all of a plan's traffic; empty: it does."""
    rules = problem.family.engine
    engine = Engine.SGLANG if rules is not None and rules.name == Engine.SGLANG else None
    known = dict[Engine | None, Launchable]()  # targets of the same engine start the same processes

    def launch(plan: Plan, model: ModelSpec, settings: ExportSettings) -> Launchable:
        if settings.engine not in known:
            known[settings.engine] = launchable(plan, model, settings)
        return known[settings.engine]

    def reasons(target: ExportTarget) -> tuple[str, ...]:
        return carries(plan, target, model=problem.model, engine=engine, launch=launch).reasons

    return {target.value: reasons(target) for target in ExportTarget}
