"""Verbs that read a plan: ``explain``, ``check`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.outputs import refuse_unwritable_page, save_page
from hetis.planner.cli.parameters.options import PlanArgument, group, option, verb
from hetis.planner.cli.searching import Interruptible
from hetis.planner.report.figures import plural
from hetis.solver.budget import Budget

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.planner.use_cases.saved_plans import PlanAndProblem
    from hetis.planner.use_cases.verification.latency_curve import Curve

REPORT_EXAMPLES = """Examples:\n
  hetis-plan report plan.json\n
  hetis-plan report today.json next.json --simulate --out next-quarter.html\n
  hetis-plan place -c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --out - | hetis-plan report - --out -"""

# Proved by the search; a plan file contains only the result of the proof.
ON_TRUST = ("result.bound", "result.solve_s", "prices.dual", "runners_up", "notes", "inputs")


@verb()
def explain(terminal: Terminal, plan: PlanArgument) -> ExitCode:
    """Show where memory and time go, what limits each replica, what GPUs are worth, and why some are idle."""
    from hetis.planner.report.explanation import render_explanation
    from hetis.planner.use_cases.json_values import document, fields_of, json_value
    from hetis.solver.check.waiting import queueing
    from hetis.solver.placement.explanation import explain_plan

    (found,) = _load_and_check(terminal, [plan])
    explanation, waits = explain_plan(found.plan, found.problem), queueing(found.plan, found.problem)
    of_plan = fields_of(found.plan, "strategy", "result", "prices", "runners_up", "notes")
    terminal.emit(
        lambda: document("Explanation", **of_plan, **json_value(explanation), queueing=waits),
        lambda: render_explanation(found.plan, explanation, waits, wide=terminal.is_wide),
    )
    return ExitCode.OK


@verb()
def check(terminal: Terminal, plan: PlanArgument) -> ExitCode:
    """Check a plan against the inputs saved in it: devices, layers, memory, links, rates, limits, value.

    So is what it records to be left without its worst node or zone. The bound and the prices are not checked: the
    search proved them, and they are not derived again. Nor are the additional results: other setups, simulation, notes.
    """
    from hetis.planner.use_cases.json_values import json_value
    from hetis.planner.use_cases.surviving import check_recorded_losses
    from hetis.solver.check import check_plan

    (found,) = _load(terminal, [plan])
    violations = check_plan(found.plan, found.problem)
    violations = violations or check_recorded_losses(found.plan, found.problem)

    def table() -> RenderableType:
        from rich.text import Text

        if violations:
            return Text("\n".join(f"violated: {violation}" for violation in violations), style="red")
        replicas = plural(len(found.plan.replicas), "replica")
        gpus = plural(sum(len(replica.devices()) for replica in found.plan.replicas), "GPU")
        return Text.assemble(
            (f"the plan is valid: {replicas} on {gpus}, their numbers recomputed\n", "green"),
            "not checked: the bound and the prices, whose proof is not in the plan file, and additional "
            "results: other setups, simulation, notes",
        )

    answer = {"ok": not violations, "violations": json_value(violations), "taken_on_trust": list(ON_TRUST)}
    terminal.emit(lambda: answer, table)
    return ExitCode.INVALID if violations else ExitCode.OK


def _load(terminal: Terminal, paths: list[str]) -> list[PlanAndProblem]:
    """Read the plans, and warn of the oddities of each once."""
    from hetis.planner.use_cases.saved_plans import load_plan_and_problem

    found = [load_plan_and_problem(path) for path in paths]
    for warning in dict.fromkeys(warning for one in found for warning in one.warnings):
        terminal.warn(warning)
    return found


def _load_and_check(terminal: Terminal, paths: list[str]) -> list[PlanAndProblem]:
    """Read the plans, and warn of those whose figures the checker does not confirm: they are shown as true."""
    found = _load(terminal, paths)
    for path, one in zip(paths, found, strict=True):
        warn_if_wrong(terminal, path, one)
    return found


def warn_if_wrong(terminal: Terminal, path: str, found: PlanAndProblem) -> None:
    """Warn of a plan that the checker does not confirm."""
    from hetis.planner.use_cases.saved_plans import unconfirmed

    for warning in unconfirmed(found, path):
        terminal.warn(warning)


# --- report


@group
class ReportOptions:
    simulate: bool = option(
        "--simulate: Simulate every plan at rates up to and beyond the planned one, and draw it.", False
    )
    out: Path = option("--out FILE: HTML file to write; - writes to standard output.", Path("report.html"))


@verb(prints_data=False)
def report(
    terminal: Terminal,
    plans: Annotated[list[str], typer.Argument(metavar="PLAN...", help="Plan files, or - for standard input.")],
    *,
    given: ReportOptions,
) -> ExitCode:
    """Write an HTML page about plans for decision makers: what they serve, at what cost, where, and why.

    The page is self-contained, has light and dark modes, and can be printed. Several plans are compared before each is
    shown.
    """
    from hetis.planner.report.page.pages import ShownPlan, plans_page

    refuse_unwritable_page(given.out)
    found = _load_and_check(terminal, plans)
    long = Interruptible(terminal)
    curves = [_curve(one, long) if given.simulate else None for one in found]
    shown = [
        ShownPlan(name=name, plan=one.plan, problem=one.problem, curve=curve)
        for name, one, curve in zip(_names(plans), found, curves, strict=True)
    ]
    save_page(terminal, lambda: plans_page(shown), given.out)
    return long.code()


def _curve(found: PlanAndProblem, long: Interruptible) -> Curve | None:
    from hetis.planner.use_cases.verification.latency_curve import latency_curve

    budget = Budget(cancelled=long.cancelled)
    return long.simulate(lambda news: latency_curve(found.plan, found.problem, budget=budget, report=news))


def _names(paths: list[str]) -> list[str]:
    """Return the names of the plans on the page: their files' stems, or whole paths if two stems are equal."""
    if len(paths) == 1:
        return ["The plan"]
    stems = [Path(path).stem if path != "-" else "standard input" for path in paths]
    return stems if len(set(stems)) == len(stems) else paths
