"""Options of `dispatch` and `redispatch`, and the stage they choose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli import quantities

if TYPE_CHECKING:
    from hetis.planner.use_cases.stage_sources import LoadedStage

DISPATCH_EXAMPLES = """\
Examples:

hetis-plan dispatch --state examples/dispatch/a100-l4.yaml --request 8000/300 --explain

hetis-plan dispatch --plan plan.json --request 8000/300 --out state.json
"""
REDISPATCH_EXAMPLES = """\
Examples:

hetis-plan redispatch --state examples/dispatch/drifted.yaml --explain

hetis-plan redispatch --state examples/dispatch/draining.yaml --budget 10GiB --out state.json
"""

_INPUTS, _SEARCH, _RESULT = "Inputs", "Search", "Result"

StateOption = Annotated[
    str | None,
    typer.Option(
        "--state", metavar="FILE", rich_help_panel=_INPUTS, show_default=False, help="A DispatchState file; - is stdin."
    ),
]
RequiredStateOption = Annotated[
    str, typer.Option("--state", metavar="FILE", rich_help_panel=_INPUTS, help="A DispatchState file; - is stdin.")
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="PLAN",
        rich_help_panel=_INPUTS,
        show_default=False,
        help="Instead of --state: a placement plan, one stage of which is taken with nothing running.",
    ),
]
ReplicaOption = Annotated[
    int, typer.Option("--replica", min=0, rich_help_panel=_INPUTS, help="Replica of the plan, from 0.")
]
StageOption = Annotated[
    int, typer.Option("--stage", min=1, rich_help_panel=_INPUTS, help="Stage of that replica, from 1.")
]
RequestsOption = Annotated[
    str | None,
    typer.Option(
        "--requests",
        metavar="FILE",
        rich_help_panel=_INPUTS,
        show_default=False,
        help="New requests: a DispatchRequests file, or its list alone.",
    ),
]
RequestOption = Annotated[
    list[str] | None,
    typer.Option(
        "--request",
        metavar="CONTEXT/OUTPUT",
        rich_help_panel=_INPUTS,
        show_default=False,
        help="A new request by its tokens, such as 8000/300; repeatable.",
    ),
]
ExactOption = Annotated[
    bool, typer.Option("--exact", rich_help_panel=_SEARCH, help="Search whole head groups to the best (MILP).")
]
ExactLimitOption = Annotated[
    float,
    typer.Option(
        "--time-limit",
        parser=quantities.positive_duration,
        metavar="TIME",
        rich_help_panel=_SEARCH,
        help="How long --exact may take.",
    ),
]
ExplainOption = Annotated[bool, typer.Option("--explain", rich_help_panel=_RESULT, help="Say why, in words.")]
StateOutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        rich_help_panel=_RESULT,
        show_default=False,
        help="Save the state that this leads to; .yaml or .yml for YAML, anything else is JSON.",
    ),
]
ThetaOption = Annotated[
    float,
    typer.Option(
        "--theta",
        parser=quantities.ratio,
        metavar="SHARE",
        rich_help_panel=_SEARCH,
        help="Deviation from the ideal makespan that triggers.",
    ),
]
BudgetOption = Annotated[
    int | None,
    typer.Option(
        "--budget",
        parser=quantities.size,
        metavar="SIZE",
        rich_help_panel=_SEARCH,
        show_default="no limit",
        help="Most KV to move, such as 10GiB.",
    ),
]
PatienceOption = Annotated[
    float,
    typer.Option(
        "--patience",
        parser=quantities.share,
        metavar="SHARE",
        rich_help_panel=_SEARCH,
        help="A move must pay within this share of its request's remaining steps.",
    ),
]
LeastGainOption = Annotated[
    float,
    typer.Option(
        "--least-gain",
        parser=quantities.ratio,
        metavar="SHARE",
        rich_help_panel=_SEARCH,
        help="Of the makespan; for less nothing moves unless memory is short.",
    ),
]
AheadOption = Annotated[
    int,
    typer.Option("--ahead", min=0, max=10**6, rich_help_panel=_SEARCH, help="Decode steps that growth is foreseen."),
]
RefillOption = Annotated[
    float | None,
    typer.Option(
        "--refill",
        parser=quantities.positive_duration,
        metavar="TIME",
        rich_help_panel=_SEARCH,
        show_default="400us",
        help="What prefilling a token of an evicted request again takes.",
    ),
]
ShortOption = Annotated[
    bool,
    typer.Option("--strict", rich_help_panel=_RESULT, help="Exit 5 when KV blocks stay short or on draining devices."),
]


def chosen_stage(
    terminal: Terminal, *, state: str | None, plan: str | None, replica: int, stage: int, profiles: Sequence[str]
) -> LoadedStage:
    """Load the stage of a state file or of a plan, whichever was given.

    Raises:
        typer.BadParameter: neither or both were given.
        DocumentError: the file is not usable.
    """
    if (state is None) == (plan is None):
        raise typer.BadParameter("give one of --state and --plan")
    if state is not None:
        from hetis.planner.use_cases.stage_sources import load_stage

        return load_stage(state, profiles=profiles)
    assert plan is not None
    if profiles:
        raise typer.BadParameter("--profile goes with --state: a plan holds its profiles")
    from hetis.planner.use_cases.stage_of_plan import load_stage_of_plan

    return load_stage_of_plan(plan, replica=replica, stage=stage)


def announce_compilation(terminal: Terminal) -> None:
    """Explain why the first run on a machine takes a minute."""
    from hetis.planner.use_cases.dispatch import is_compiled

    if not is_compiled():
        terminal.say("compiling the solver, once: this takes a minute or two")
