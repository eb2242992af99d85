"""``hetis-plan check PLAN``: whether the plan keeps its promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.options import PlanArgument

if TYPE_CHECKING:
    from rich.console import RenderableType


# Proved by the search; a plan file contains the result of the proof only.
ON_TRUST = ("result.bound", "result.solve_s", "prices.dual", "runners_up", "notes", "inputs")


@verb()
def check(terminal: Terminal, plan: PlanArgument) -> ExitCode:
    """Check a plan against the inputs saved in it: devices, layers, memory, links, rates, limits, value.

    The bound is taken on trust, as are the prices: the search proved them, and they are not derived again. So is what
    stands beside the plan: other setups, losses, simulation, notes.
    """
    from hetis.planner.report.figures import plural
    from hetis.planner.use_cases.json_values import json_value
    from hetis.planner.use_cases.sources import load_plan_and_problem
    from hetis.solver.check import check_plan

    found = load_plan_and_problem(plan)
    for warning in found.warnings:
        terminal.warn(warning)
    violations = check_plan(found.plan, found.problem)

    def table() -> RenderableType:
        from rich.text import Text

        if violations:
            return Text("\n".join(f"broken: {violation}" for violation in violations), style="red")
        replicas = len(found.plan.replicas)
        gpus = sum(len(replica.devices()) for replica in found.plan.replicas)
        return Text.assemble(
            (
                f"the plan holds: {plural(replicas, 'replica')} on {plural(gpus, 'GPU')}, their numbers recomputed\n",
                "green",
            ),
            "taken on trust: the bound and the prices, which the search proved and no plan file proves again, and what "
            "stands beside the plan: other setups, losses, simulation, notes",
        )

    def document() -> dict[str, object]:
        return {"ok": not violations, "violations": json_value(violations), "taken_on_trust": list(ON_TRUST)}

    terminal.emit(document, table)
    return ExitCode.INVALID if violations else ExitCode.OK
