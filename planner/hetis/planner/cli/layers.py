"""``hetis-plan layers``: which contiguous layers every node of a chain or mesh should hold."""

from __future__ import annotations

from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import options, quantities
from hetis.planner.cli.exit_codes import ExitCode

LAYERS_EXAMPLES = "Example: hetis-plan layers examples/layers-24.yaml"

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A LayersProblem file, or - for standard input.")]
LimitOption = Annotated[
    float,
    typer.Option(
        "--time-limit",
        parser=quantities.positive_duration,
        metavar="TIME",
        help="Return the best placement found by then.",
    ),
]
CompareOption = Annotated[
    bool, typer.Option("--compare/--no-compare", help="Also find the placement of most flow and judge it alike.")
]


@verb()
def layers(
    terminal: Terminal,
    file: FileArgument,
    *,
    time_limit: LimitOption = "60s",  # type: ignore[assignment]  # defaults go through the parser, too
    seed: options.SeedOption = 0,
    compare: CompareOption = True,
) -> ExitCode:
    """Decide which contiguous layers each one-node stage holds, and prove how good that is.

    The rate is the sustained one: KV room limits the requests in flight, and each makes a token per round trip.

    Ctrl-C once prints the best placement so far; twice leaves at once.
    """
    import time

    from hetis.formats.layers_problem import load_layers_problem
    from hetis.planner.cli.searching import search_interruptibly
    from hetis.planner.report.layers import layers_document, render_layers
    from hetis.planner.use_cases.layers import is_compiled, place_layers
    from hetis.solver.budget import Budget

    problem = load_layers_problem(file)
    if not is_compiled():
        terminal.say("compiling the solver, once on this machine; half a minute")
    budget = Budget(time_limit_s=time_limit, clock=time.monotonic)
    found = search_interruptibly(
        terminal,
        lambda report: place_layers(problem, budget=budget, seed=seed, compare=compare, report=report),
        unit="requests/s",
        cancelled=budget.cancelled,
        so_far="the best placement",
    )
    terminal.emit(lambda: layers_document(found), lambda: render_layers(found))
    return ExitCode.INTERRUPTED if budget.cancelled.is_set() else ExitCode.OK
