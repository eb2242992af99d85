"""``--dry-run``: check a whole call (files, names, options and their combination), and solve nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.solver.plan import Objective

if TYPE_CHECKING:
    from hetis.planner.use_cases.sources import Inputs

DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        rich_help_panel="Search",
        help="Check the whole call, say what would be solved, and stop: every file, name and option, and whether the "
        "results could be written.",
    ),
]


def say_what_would_be_solved(
    terminal: Terminal,
    problems: Sequence[tuple[Inputs, Objective]],
    *,
    strategies: Sequence[str],
    solves: int,
    time_limit_s: float,
    engine: str | None = None,
) -> ExitCode:
    """Print the answer to a call without errors.

    Args:
        problems: what would be planned.
        strategies: families of plans, or heuristics.
        solves: number of searches, one after another, each with the time limit.
        engine: whose rules plans would keep; None: any.
    """
    from rich.text import Text

    from hetis.planner.report.comparison import goal_line
    from hetis.planner.report.figures import plural, seconds

    terminal.emit(
        lambda: {
            "kind": "DryRun",
            "problems": [
                {
                    "model": inputs.model.name,
                    "cluster": inputs.cluster.name,
                    "gpus": inputs.cluster.num_gpus(),
                    "workload": inputs.workload.name,
                    "objective": objective.kind.value,
                    "ttft_limit_s": objective.ttft_limit_s,
                    "tpot_limit_s": objective.tpot_limit_s,
                    "demand_rps": objective.demand_rps,
                }
                for inputs, objective in problems
            ],
            "strategies": list(strategies),
            "engine": engine,
            "solves": solves,
            "time_limit_s": time_limit_s,
        },
        lambda: Text("\n").join(
            [
                *(
                    Text.assemble(
                        ("ok", "green"),
                        f"  {inputs.model.name} on {inputs.cluster.name} ({plural(inputs.cluster.num_gpus(), 'GPU')}) "
                        f"for {inputs.workload.name}: {goal_line(objective).plain}",
                    )
                    for inputs, objective in problems
                ),
                Text(
                    f"    would be solved by {', '.join(strategies)}{f' for {engine}' if engine else ''}, "
                    f"{plural(solves, 'time')} {seconds(time_limit_s)} at most; nothing was"
                ),
            ]
        ),
    )
    return ExitCode.OK
