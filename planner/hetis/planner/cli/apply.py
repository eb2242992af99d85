"""``hetis-plan apply``: give the planner clusters and profiles from files, solve on it, put plans in force."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli import options
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.rollback import DryRunOption, NoWaitOption
from hetis.planner.cli.server_verb import server_verb
from hetis.solver.plan import ObjectiveKind

if TYPE_CHECKING:
    from hetis.planner.client import Client

APPLY_EXAMPLES = """Examples:

  hetis-plan apply cluster.yaml l4-profile.yaml

  hetis-plan apply -c cluster.yaml -m Llama-2-70B -w 8000/300 --activate

  hetis-plan apply --plan plan.json --activate

  hetis-plan apply --activate plans/night"""

_INPUTS = "To solve"
_PLAN = "Plan"


@server_verb()
def apply(
    terminal: Terminal,
    client: Client,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE|PLAN]...", show_default=False, help="Cluster and Profile files; a plan to activate."
        ),
    ] = None,
    *,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            "-c",
            metavar="FILE|NAME",
            rich_help_panel=_INPUTS,
            show_default=False,
            help="The fleet: a file, which is applied first, or a cluster that is there.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="NAME|FILE", rich_help_panel=_INPUTS, show_default=False, help="As at place."
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload",
            "-w",
            metavar="NAME|FILE|P/O",
            rich_help_panel=_INPUTS,
            show_default=False,
            help="As at place.",
        ),
    ] = None,
    prefix_hit_rate: options.PrefixHitRateOption = None,
    weights: options.WeightsOption = None,
    kv: options.KvOption = None,
    mtp: options.MtpOption = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="FILE|NAME",
            rich_help_panel=_INPUTS,
            show_default=False,
            help="Profile to use: a file, which is applied first, or one that is there; repeatable.",
        ),
    ] = None,
    objective: options.ObjectiveOption = ObjectiveKind.GOODPUT,
    rate: options.RateOption = None,
    ttft: options.TtftOption = None,
    tpot: options.TpotOption = None,
    survive: options.SurviveOption = None,
    strategy: options.StrategyOption = options.DEFAULT_STRATEGY,
    roles: options.RolesOption = None,
    engine: options.EngineOption = None,
    max_stages: options.MaxStagesOption = None,
    max_gpus: options.MaxGpusOption = None,
    min_layers: options.MinLayersOption = None,
    max_nodes: options.MaxNodesOption = None,
    max_num_seqs: options.MaxNumSeqsOption = None,
    chunk_tokens: options.ChunkTokensOption = None,
    kv_blocks: options.KvBlocksOption = None,
    time_limit: options.TimeLimitOption = "60s",  # type: ignore[assignment]  # defaults go through the parser, too
    gap: options.GapOption = "0.1%",  # type: ignore[assignment]
    seed: options.SeedOption = 0,
    threads: options.ThreadsOption = 1,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan", metavar="FILE", rich_help_panel=_PLAN, show_default=False, help="Import a Plan file instead."
        ),
    ] = None,
    name: Annotated[
        str,
        typer.Option("--name", metavar="ID", rich_help_panel=_PLAN, show_default="chosen there", help="Of the plan."),
    ] = "",
    activate: Annotated[
        bool, typer.Option("--activate", rich_help_panel=_PLAN, help="Put the plan in force and wait until it is.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", rich_help_panel=_PLAN, show_default=False, help="Save the Plan as JSON."),
    ] = None,
    no_wait: NoWaitOption = False,
    dry_run: DryRunOption = False,
) -> ExitCode:
    """Create or update clusters and profiles, solve on the planner, import plans, put plans in force.

    Ctrl-C while waiting stops nothing: the plan goes on, and how to come back to it is said.
    """
    from hetis.planner.cli.applying import Application, Goal
    from hetis.planner.cli.families import engine_rules, engine_settings
    from hetis.planner.use_cases.sources import ReplicaLimits

    limits = ReplicaLimits(max_stages=max_stages, max_gpus=max_gpus, min_layers=min_layers, max_nodes=max_nodes)
    engine_rules(engine, strategy, limits)
    goal = Goal(
        cluster=cluster,
        model=model,
        workload=workload,
        prefix_hit_rate=prefix_hit_rate,
        profiles=tuple(profile or ()),
        objective=objective,
        rate_rps=rate,
        ttft_s=ttft,
        tpot_s=tpot,
        strategy=strategy,
        roles=roles or frozenset(),
        weights=weights,
        kv=kv,
        mtp=mtp,
        survive="" if survive is None else survive.value,
        engine=engine,
        limits=limits,
        engine_settings=engine_settings(max_num_seqs, chunk_tokens, kv_blocks),
        time_limit_s=time_limit,
        gap_target=gap,
        seed=seed,
        threads=threads,
    )
    return Application(
        terminal=terminal,
        client=client,
        activate=activate,
        wait=not no_wait,
        dry_run=dry_run,
        plan_id=name,
        out=out,
    ).run(files=tuple(what or ()), goal=goal, plan_file=plan)
