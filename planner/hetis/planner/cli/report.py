"""``hetis-plan report PLAN...``: plans as one page of HTML."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import fleet_options, options
from hetis.planner.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from hetis.planner.use_cases.latency_curve import Curve
    from hetis.planner.use_cases.sources import PlanAndProblem
    from hetis.planner.use_cases.what_if import BuyNext

REPORT_EXAMPLES = """Examples:\n
  hetis-plan report plan.json\n
  hetis-plan report plan.json --simulate --buy-next --out all.html\n
  hetis-plan report today.json next.json --simulate --out next-quarter.html\n
  hetis-plan place -c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --out - | hetis-plan report - --out -"""

PlansArgument = Annotated[list[str], typer.Argument(metavar="PLAN...", help="Plan files, or - for standard input.")]
SimulateOption = Annotated[
    bool, typer.Option("--simulate", help="Simulate every plan at rates up to and beyond the planned one, and draw it.")
]
BuyNextOption = Annotated[
    bool,
    typer.Option("--buy-next", help="Say what to buy next: solve again with --count GPUs of every type on the market."),
]
PageOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The page; - for standard output.")]


@verb(prints_data=False)
def report(
    terminal: Terminal,
    plans: PlansArgument,
    simulate: SimulateOption = False,
    buy_next: BuyNextOption = False,
    count: fleet_options.CountOption = 1,
    time_limit: options.TimeLimitOption = "20s",  # type: ignore[assignment]  # defaults go through the parser, too
    out: PageOption = Path("report.html"),
) -> ExitCode:
    """Make one page of HTML of plans, to send to those who decide: what they serve, at which cost, where, and why.

    The page needs no network, is light or dark, and prints. Several plans are compared before each is shown. With
    --buy-next every plan is solved again for each GPU type on the market, each time for --time-limit at most.
    """
    from hetis.planner.cli.html_pages import refuse_unwritable_page, save_page
    from hetis.planner.report.page.pages import ShownPlan, plans_page
    from hetis.planner.use_cases.sources import load_plan_and_problem

    refuse_unwritable_page(out)
    found = [load_plan_and_problem(path) for path in plans]
    for warning in dict.fromkeys(warning for one in found for warning in one.warnings):
        terminal.warn(warning)
    cancelled = threading.Event()
    curves = [_curve(terminal, one, cancelled) if simulate else None for one in found]
    bought = [_market(terminal, one, cancelled, count, time_limit) if buy_next else None for one in found]
    names = _names(plans)
    page = plans_page(
        [
            ShownPlan(name=name, plan=one.plan, problem=one.problem, curve=curve, market=market)
            for name, one, curve, market in zip(names, found, curves, bought, strict=True)
        ]
    )
    save_page(terminal, page, out)
    return ExitCode.INTERRUPTED if cancelled.is_set() else ExitCode.OK


def _curve(terminal: Terminal, found: PlanAndProblem, cancelled: threading.Event) -> Curve | None:
    from hetis.planner.cli.native_output import no_native_output
    from hetis.planner.cli.searching import run_interruptibly
    from hetis.planner.cli.simulation_progress import requests_on_stderr
    from hetis.planner.use_cases.latency_curve import latency_curve

    with no_native_output(), requests_on_stderr(terminal) as news:
        return run_interruptibly(
            lambda: latency_curve(found.plan, found.problem, cancelled=cancelled, report=news),
            cancelled=cancelled,
            on_cancel=lambda: terminal.say("stopping with what was simulated; Ctrl-C again leaves at once"),
        )


def _market(
    terminal: Terminal, found: PlanAndProblem, cancelled: threading.Event, count: int, time_limit_s: float
) -> BuyNext | None:
    """Return what to buy next, or None after Ctrl-C."""
    from hetis.planner.cli.searching import search_interruptibly
    from hetis.planner.use_cases import purchases
    from hetis.planner.use_cases.what_if import buy_next_to_plan
    from hetis.solver.budget import Budget

    if cancelled.is_set():
        return None
    cluster = found.problem.cluster
    shape = purchases.node_shape(cluster, like=None, gpus_per_node=None, zone=None, nic=None)
    return search_interruptibly(
        terminal,
        lambda news: buy_next_to_plan(
            found, purchases.market_of(None, cluster, count), shape, time_limit_s=time_limit_s, report=news,
            budget=lambda: Budget(time_limit_s=time_limit_s, clock=time.monotonic, cancelled=cancelled),
        ),
        unit=found.plan.result.unit, cancelled=cancelled, so_far="the plans",
    )  # fmt: skip


def _names(paths: list[str]) -> list[str]:
    """Return the names of the plans on the page: their files' stems, or whole paths if two stems are equal."""
    if len(paths) == 1:
        return ["The plan"]
    stems = [Path(path).stem if path != "-" else "standard input" for path in paths]
    return stems if len(set(stems)) == len(stems) else paths
