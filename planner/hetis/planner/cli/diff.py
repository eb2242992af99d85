"""``hetis-plan diff A B``: what it takes to go from one plan to another."""

from __future__ import annotations

from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode

DIFF_EXAMPLES = """Examples:\n
  hetis-plan diff running.json next.json\n
  hetis-plan diff running.json next.json -o json | jq .change.counts"""


@verb()
def diff(
    terminal: Terminal,
    before: Annotated[str, typer.Argument(metavar="A", help="The plan of before: a plan file, or -.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The plan after it: a plan file, or -.")],
) -> ExitCode:
    """Compare two plans: replicas kept, changed, new and gone, weights to load, KV dropped, rate and cost.

    Replicas are matched by the GPUs they hold and the layers on them. Devices of the same name are the same GPU.
    """
    from hetis.planner.report.plan_diff import diff_document, render_diff
    from hetis.planner.use_cases.diff import diff_plans

    if before == after == "-":
        raise typer.BadParameter("only one of the plans can come from standard input")
    found = diff_plans(before, after)
    terminal.emit(lambda: diff_document(found), lambda: render_diff(found))
    return ExitCode.OK
