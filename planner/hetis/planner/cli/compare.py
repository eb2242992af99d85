"""``hetis-plan compare``: several strategies on the same problem, side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import families, options
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
    prefix_hit_rate: options.PrefixHitRateOption = None,
    weights: options.WeightsOption = None,
    kv: options.KvOption = None,
    mtp: options.MtpOption = None,
    profile: options.ProfilesOption = None,
    objective: options.ObjectiveOption = ObjectiveKind.GOODPUT,
    rate: options.RateOption = None,
    ttft: options.TtftOption = None,
    tpot: options.TpotOption = None,
    pin: options.PinsOption = None,
    forbid: options.ForbidsOption = None,
    strategies: options.StrategiesOption = None,
    engine: options.EnginesOption = None,
    max_stages: options.MaxStagesOption = None,
    max_gpus: options.MaxGpusOption = None,
    min_layers: options.MinLayersOption = None,
    max_nodes: options.MaxNodesOption = None,
    max_num_seqs: options.MaxNumSeqsOption = None,
    chunk_tokens: options.ChunkTokensOption = None,
    kv_blocks: options.KvBlocksOption = None,
    time_limit: options.TimeLimitOption = "60s",  # type: ignore[assignment]
    gap: options.GapOption = "0.1%",  # type: ignore[assignment]
    seed: options.SeedOption = 0,
    threads: options.ThreadsOption = 1,
    out: options.PlansFolderOption = None,
    html: options.HtmlOption = None,
    dry_run: DryRunOption = False,
) -> ExitCode:
    """Plan by several strategies, or for several engines, and show the plans side by side, checked alike.

    Each has the whole time limit. One without a plan is a row with its reason.

    Ctrl-C once ends the strategy at work and shows what there is; twice leaves at once.
    """
    from hetis.planner.cli.html_pages import refuse_page, save_page
    from hetis.planner.cli.plan_files import refuse_unwritable_plans, save_plans
    from hetis.planner.cli.searching import search_interruptibly
    from hetis.planner.jobs.kernels import compile_kernels
    from hetis.planner.report.comparison import comparison_document, render_comparison
    from hetis.planner.use_cases import place as placing
    from hetis.planner.use_cases.compare import compare_engines
    from hetis.planner.use_cases.precision import in_precision
    from hetis.planner.use_cases.sources import ReplicaLimits, load_inputs
    from hetis.solver.budget import Budget

    compares_engines = engine is not None and len(engine.names) > 1
    names = (strategies or families.strategies(options.DEFAULT_STRATEGY if compares_engines else ALL_STRATEGIES)).names
    limits = ReplicaLimits(max_stages=max_stages, max_gpus=max_gpus, min_layers=min_layers, max_nodes=max_nodes)
    rules = families.rules_of_engines(engine, limits)
    if out is not None:
        refuse_unwritable_plans(out, [f"{name}-{e}" for name in names for e in rules] if engine is not None else names)
    refuse_page(html)
    loaded = load_inputs(
        cluster=cluster, model=model, workload=workload, profiles=profile or (), prefix_hit_rate=prefix_hit_rate
    )
    loaded = in_precision(
        loaded.with_constraints(pins=pin or (), forbids=forbid or ()), weights=weights, kv=kv, mtp=mtp
    )
    loaded = loaded.at(families.engine_settings(max_num_seqs, chunk_tokens, kv_blocks))
    placing.require_demand(objective, rate, loaded.inputs.workload)
    goal = placing.objective(objective, ttft_s=ttft, tpot_s=tpot, demand_rps=rate)
    settings = placing.Settings(time_limit_s=time_limit, gap_target=gap, seed=seed, threads=threads)
    if dry_run:
        return say_what_would_be_solved(
            terminal, [(loaded.inputs, goal)], strategies=names, solves=len(names) * len(rules),
            time_limit_s=time_limit,
        )  # fmt: skip
    cancelled = threading.Event()

    def work(report: Report) -> tuple[Compared, ...]:
        for for_engine in {one is not None for one in rules.values()}:
            compile_kernels(loaded.inputs.cluster.num_gpus(), names, for_engine=for_engine, report=report)
        compared = compare_engines(
            loaded,
            goal,
            settings,
            names,
            rules,
            budget=lambda: Budget(time_limit_s=time_limit, clock=time.monotonic, cancelled=cancelled),
            report=report,
        )
        return compared if engine is not None else tuple(replace(outcome, engine=None) for outcome in compared)

    compared = search_interruptibly(terminal, work, unit=goal.unit, cancelled=cancelled, so_far="the plans")
    if out is not None:
        save_plans(terminal, out, {outcome.name: outcome.plan for outcome in compared if outcome.plan is not None})
    if html is not None:
        from hetis.planner.report.page.pages import comparison_page

        save_page(terminal, comparison_page(compared, loaded.inputs, goal), html)
    terminal.emit(
        lambda: comparison_document(compared, loaded.inputs, goal),
        lambda: render_comparison(compared, loaded.inputs, goal),
    )
    return ExitCode.INTERRUPTED if cancelled.is_set() else _judge(compared)


def _judge(compared: Sequence[Compared]) -> ExitCode:
    """Return success if there is something to choose from and nothing is broken."""
    from hetis.planner.use_cases.compare import FAILED

    if any(outcome.status == FAILED for outcome in compared):
        return ExitCode.INTERNAL
    if any(outcome.plan is not None for outcome in compared):
        return ExitCode.OK
    every = {outcome.status for outcome in compared}
    return ExitCode.INFEASIBLE if every == {Status.INFEASIBLE.value} else ExitCode.NO_PLAN
