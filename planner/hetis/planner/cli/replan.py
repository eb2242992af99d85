"""``hetis-plan replan``: from the running plan to the next one, after nodes have joined or left."""

from __future__ import annotations

import threading
import time
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import options, quantities, words
from hetis.planner.cli.dry_run import DryRunOption, say_what_would_be_solved
from hetis.planner.cli.exit_codes import ExitCode

REPLAN_EXAMPLES = """Examples:\n
  hetis-plan replan --from running.json --cluster fewer-nodes.yaml --out next.json\n
  hetis-plan replan --from running.json --cluster more-nodes.yaml --max-moves 8\n
  hetis-plan replan --from running.json --cluster fleet.yaml --workload 8000/300 --horizon 24h --restart 90s"""

_CHANGE = "What a change costs"

FromOption = Annotated[
    str, typer.Option("--from", metavar="PLAN", rich_help_panel="Inputs", help="The plan that runs: a plan file, or -.")
]
ModelCheckOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|FILE",
        autocompletion=words.model_names,
        rich_help_panel="Inputs",
        show_default=False,
        help="Refuse a plan of another model; its own is used in any case.",
    ),
]
NewWorkloadOption = Annotated[
    str | None,
    typer.Option(
        "--workload",
        "-w",
        metavar="NAME|FILE|P/O",
        autocompletion=words.workload_names,
        rich_help_panel="Inputs",
        show_default="the plan's",
        help="The traffic as it is now.",
    ),
]
MaxMovesOption = Annotated[
    int | None,
    typer.Option(
        "--max-moves",
        min=0,
        metavar="N",
        rich_help_panel=_CHANGE,
        show_default="any number",
        help="GPUs of the new plan that may do something else than before.",
    ),
]
HorizonOption = Annotated[
    float,
    typer.Option(
        "--horizon",
        parser=quantities.positive_duration,
        metavar="TIME",
        rich_help_panel=_CHANGE,
        help="How long the new plan will last: what the change loses is spread over it.",
    ),
]
RestartOption = Annotated[
    float,
    typer.Option(
        "--restart",
        parser=quantities.positive_duration,
        metavar="TIME",
        rich_help_panel=_CHANGE,
        help="From stopping an engine to serving again, without reading weights.",
    ),
]
LoadOption = Annotated[
    float,
    typer.Option(
        "--load",
        parser=quantities.bandwidth,
        metavar="BANDWIDTH",
        rich_help_panel=_CHANGE,
        help="At which every GPU reads its weights.",
    ),
]


@verb()
def replan(
    terminal: Terminal,
    *,
    running: FromOption,
    cluster: options.ClusterOption,
    workload: NewWorkloadOption = None,
    prefix_hit_rate: options.PrefixHitRateOption = None,
    model: ModelCheckOption = None,
    profile: options.ProfilesOption = None,
    rate: options.RateOption = None,
    max_moves: MaxMovesOption = None,
    horizon: HorizonOption = "1h",  # type: ignore[assignment]  # defaults go through the parser, too
    restart: RestartOption = "30s",  # type: ignore[assignment]
    load: LoadOption = "2GB/s",  # type: ignore[assignment]
    time_limit: options.TimeLimitOption = "60s",  # type: ignore[assignment]
    gap: options.GapOption = "0.1%",  # type: ignore[assignment]
    seed: options.SeedOption = 0,
    threads: options.ThreadsOption = 1,
    out: options.OutOption = None,
    html: options.HtmlOption = None,
    dry_run: DryRunOption = False,
) -> ExitCode:
    """Plan again from a running plan: keep what is worth keeping, count what a change costs, and order its steps.

    Objective, limits, strategy, engine, roles and constraints are those of the running plan. The cluster is what is
    there now: nodes that it lacks are gone, others have joined. Ctrl-C once takes the best answer so far; twice leaves
    at once.
    """
    from hetis.planner.cli.html_pages import refuse_page, save_page_or_tell
    from hetis.planner.cli.plan_files import STDOUT, refuse_unwritable, save_or_tell
    from hetis.planner.cli.searching import search_interruptibly
    from hetis.planner.report.replan import render_replan, replan_document
    from hetis.planner.use_cases import replan as replanning
    from hetis.planner.use_cases.place import Settings
    from hetis.solver.budget import Budget
    from hetis.solver.replanning.change import ChangeCosts

    if out is not None:
        refuse_unwritable(out)
    refuse_page(html, beside=out)
    if running == cluster == "-":
        raise typer.BadParameter("only one of --from and --cluster can come from standard input")
    settings = Settings(time_limit_s=time_limit, gap_target=gap, seed=seed, threads=threads)
    posed = replanning.load_replanning(
        running=running, cluster=cluster, workload=workload, model=model, profiles=profile or (), rate_rps=rate,
        settings=settings, prefix_hit_rate=prefix_hit_rate,
    )  # fmt: skip
    for warning in posed.warnings:
        terminal.warn(warning)
    if dry_run:
        engine = posed.problem.family.engine
        return say_what_would_be_solved(
            terminal, [(posed.loaded.inputs, posed.problem.objective)], strategies=[posed.settings.strategy], solves=1,
            time_limit_s=time_limit, engine=None if engine is None else engine.name,
        )  # fmt: skip
    costs = ChangeCosts(horizon_s=horizon, restart_s=restart, load_bytes_per_s=load)
    cancelled = threading.Event()
    budget = Budget(time_limit_s=time_limit, clock=time.monotonic, cancelled=cancelled)
    found = search_interruptibly(
        terminal,
        lambda report: replanning.replan(posed, costs, max_moves, budget=budget, report=report),
        unit=posed.problem.objective.unit,
        cancelled=cancelled,
        so_far="the best answer",
    )
    saved = out is None or save_or_tell(terminal, found.plan, out)
    if html is not None:
        from hetis.planner.report.page.pages import replan_page

        saved = save_page_or_tell(terminal, replan_page(found, posed, costs), html) and saved
    if out != STDOUT:
        terminal.emit(lambda: replan_document(found, posed, costs), lambda: render_replan(found, posed, costs))
    if not saved:
        return ExitCode.INTERNAL
    return ExitCode.INTERRUPTED if cancelled.is_set() else ExitCode.OK
