"""``hetis-plan explain PLAN``: why the plan is as it is."""

from __future__ import annotations

from hetis.formats.command_line.terminal import OutputFormat, Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.options import PlanArgument


@verb()
def explain(terminal: Terminal, plan: PlanArgument) -> ExitCode:
    """Show where memory and time go, what limits every replica, what GPUs are worth, why some idle."""
    from hetis.planner.report.explanation import render_explanation
    from hetis.planner.use_cases.json_values import json_value
    from hetis.planner.use_cases.sources import load_plan_and_problem
    from hetis.solver.placement.explanation import explain_plan

    found = load_plan_and_problem(plan)
    for warning in found.warnings:
        terminal.warn(warning)
    explanation = explain_plan(found.plan, found.problem)

    def document() -> dict[str, object]:
        return {
            "apiVersion": "hetis/v1",
            "kind": "Explanation",
            "strategy": found.plan.strategy,
            "result": json_value(found.plan.result),
            "prices": json_value(found.plan.prices),
            "runners_up": json_value(found.plan.runners_up),
            "notes": list(found.plan.notes),
            **json_value(explanation),
        }

    wide = terminal.output is OutputFormat.WIDE
    terminal.emit(document, lambda: render_explanation(found.plan, explanation, wide=wide))
    return ExitCode.OK
