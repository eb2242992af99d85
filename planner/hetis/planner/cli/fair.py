"""``hetis-plan fair FILE``: fair shares of a mixed fleet among tenants."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode

FAIR_EXAMPLES = """Examples:\n
  hetis-plan fair examples/tenants.yaml\n
  hetis-plan fair examples/tenants.yaml --rule non-cooperative --claims 50\n
  hetis-plan fair examples/tenants.yaml --rounds 12 -o json"""


class FairRule(StrEnum):
    """Rules by name; a test keeps this in step with `hetis.solver.shares.problem.Rule`."""

    COOPERATIVE = "cooperative"
    NON_COOPERATIVE = "non-cooperative"
    GAVEL = "gavel"
    GANDIVA_FAIR = "gandiva-fair"
    EQUAL_SPLIT = "equal-split"


@verb()
def fair(
    terminal: Terminal,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A ShareProblem file, or - for standard input.")],
    rule: Annotated[
        FairRule, typer.Option("--rule", help="How to share. The other rules are compared below the shares.")
    ] = FairRule.COOPERATIVE,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, max=10_000, help="Also list whole GPUs for so many rounds.")
    ] = 0,
    claims: Annotated[
        int,
        typer.Option(
            "--claims", min=0, max=10_000, help="Also try so many false claims of every job, up and down: who gains?"
        ),
    ] = 0,
) -> ExitCode:
    """Share GPUs of several types among tenants, and show what is fair about it.

    Cooperative shares (OEF) have the most total value without envy; non-cooperative ones make it useless to claim
    larger speed-ups than one has. Speed-ups stand in the file, or come from placements of a model on each GPU type.
    """
    import time

    from hetis.formats.documents import load_share_problem
    from hetis.planner.cli.native_output import no_native_output
    from hetis.planner.cli.searching import run_interruptibly
    from hetis.planner.report.fair import fair_document, render_fair
    from hetis.planner.use_cases.fair import share_out
    from hetis.solver.budget import Budget
    from hetis.solver.shares.problem import Rule

    inputs = load_share_problem(file)
    first = Rule(rule.value)
    rules = (first, *(other for other in Rule if other is not first))
    budget = Budget(clock=time.monotonic)
    with no_native_output():
        found = run_interruptibly(
            lambda: share_out(inputs, rules, budget=budget, tell=terminal.say, rounds=rounds, claims=claims),
            cancelled=budget.cancelled,
            on_cancel=lambda: terminal.say("stopping after this step; Ctrl-C again leaves at once"),
        )
    terminal.emit(lambda: fair_document(found), lambda: render_fair(found))
    return ExitCode.OK
