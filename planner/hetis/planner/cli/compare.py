"""``hetis-plan compare``: several strategies on the same problem, side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import options
from hetis.planner.cli.dry_run import DryRunOption, say_what_would_be_solved
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.families import ALL_STRATEGIES
from hetis.solver.plan import ObjectiveKind, Status

if TYPE_CHECKING:
    from hetis.planner.use_cases.compare import Compared
    from hetis.solver.budget import Report


@verb()
def compare(
    terminal: Terminal,
    *,
    cluster: options.ClusterOption,
    model: options.ModelOption,
    workload: options.WorkloadOption,
    profile: options.ProfilesOption = None,
    objective: options.ObjectiveOption = ObjectiveKind.GOODPUT,
    rate: options.RateOption = None,
    ttft: options.TtftOption = None,
    tpot: options.TpotOption = None,
    pin: options.PinsOption = None,
    forbid: options.ForbidsOption = None,
    strategies: options.StrategiesOption = ALL_STRATEGIES,  # type: ignore[assignment]  # defaults go through the parser
    time_limit: options.TimeLimitOption = "60s",  # type: ignore[assignment]
    gap: options.GapOption = "0.1%",  # type: ignore[assignment]
    seed: options.SeedOption = 0,
    threads: options.ThreadsOption = 1,
    out: options.PlansFolderOption = None,
    html: options.HtmlOption = None,
    dry_run: DryRunOption = False,
) -> ExitCode:
    """Plan by several strategies and show their plans side by side, checked alike.

    Every strategy has the whole time limit. One without a plan is a row with its reason.

    Ctrl-C once ends the strategy at work and shows what there is; twice leaves at once.
    """
    from hetis.planner.cli.html_pages import refuse_page, save_page
    from hetis.planner.cli.plan_files import refuse_unwritable_plans, save_plans
    from hetis.planner.cli.searching import search_interruptibly
    from hetis.planner.jobs.kernels import compile_kernels
    from hetis.planner.report.comparison import comparison_document, render_comparison
    from hetis.planner.use_cases import place as placing
    from hetis.planner.use_cases.compare import compare_strategies
    from hetis.planner.use_cases.sources import load_inputs
    from hetis.solver.budget import Budget

    if out is not None:
        refuse_unwritable_plans(out, strategies.names)
    refuse_page(html)
    loaded = load_inputs(cluster=cluster, model=model, workload=workload, profiles=profile or ())
    loaded = loaded.with_will(pins=pin or (), forbids=forbid or ())
    placing.require_demand(objective, rate, loaded.inputs.workload)
    goal = placing.objective(objective, ttft_s=ttft, tpot_s=tpot, demand_rps=rate)
    settings = placing.Settings(time_limit_s=time_limit, gap_target=gap, seed=seed, threads=threads)
    if dry_run:
        return say_what_would_be_solved(
            terminal, [(loaded.inputs, goal)], strategies=strategies.names, solves=len(strategies.names),
            time_limit_s=time_limit,
        )  # fmt: skip
    cancelled = threading.Event()

    def work(report: Report) -> tuple[Compared, ...]:
        compile_kernels(loaded.inputs.cluster.num_gpus(), strategies.names, report=report)
        return compare_strategies(
            loaded,
            goal,
            settings,
            strategies.names,
            budget=lambda: Budget(time_limit_s=time_limit, clock=time.monotonic, cancelled=cancelled),
            report=report,
        )

    compared = search_interruptibly(terminal, work, unit=goal.unit, cancelled=cancelled, so_far="the plans")
    if out is not None:
        save_plans(terminal, out, {outcome.strategy: outcome.plan for outcome in compared if outcome.plan is not None})
    if html is not None:
        from hetis.planner.report.page.pages import comparison_page

        save_page(terminal, comparison_page(compared, loaded.inputs, goal), html)
    terminal.emit(
        lambda: comparison_document(compared, loaded.inputs, goal),
        lambda: render_comparison(compared, loaded.inputs, goal),
    )
    return ExitCode.INTERRUPTED if cancelled.is_set() else _judge(compared)


def _judge(compared: Sequence[Compared]) -> ExitCode:
    """Success where there is something to choose from and nothing is broken."""
    from hetis.planner.use_cases.compare import FAILED

    if any(outcome.status == FAILED for outcome in compared):
        return ExitCode.INTERNAL
    if any(outcome.plan is not None for outcome in compared):
        return ExitCode.OK
    every = {outcome.status for outcome in compared}
    return ExitCode.INFEASIBLE if every == {Status.INFEASIBLE.value} else ExitCode.NO_PLAN
