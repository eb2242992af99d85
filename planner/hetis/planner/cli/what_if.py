"""``hetis-plan what-if``: the same problem on another fleet, and what to buy next."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import fleet_options, options
from hetis.planner.cli.dry_run import DryRunOption, say_what_would_be_solved
from hetis.planner.cli.exit_codes import ExitCode
from hetis.solver.plan import ObjectiveKind

if TYPE_CHECKING:
    from hetis.planner.use_cases.what_if import Side

WHAT_IF_EXAMPLES = """Examples:\n
  hetis-plan what-if -c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --add 4xL4 --remove r3090-0\n
  hetis-plan what-if -c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --add 4xA100-PCIe-80GB --node-like a100\n
  hetis-plan what-if -c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --buy-next --count 4\n
  hetis-plan what-if -c examples/paper.yaml -m Llama-2-70B -w 1024/256 --buy-next --market L4=0.70,L40S -o json"""


@verb()
def what_if(
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
    add: fleet_options.AddOption = None,
    remove: fleet_options.RemoveOption = None,
    node_like: fleet_options.NodeLikeOption = None,
    gpus_per_node: fleet_options.GpusPerNodeOption = None,
    zone: fleet_options.ZoneOption = None,
    nic: fleet_options.NicOption = None,
    buy_next: fleet_options.BuyNextOption = False,
    market: fleet_options.MarketOption = None,
    count: fleet_options.CountOption = 1,
    objective: options.ObjectiveOption = ObjectiveKind.GOODPUT,
    rate: options.RateOption = None,
    ttft: options.TtftOption = None,
    tpot: options.TpotOption = None,
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
    html: options.HtmlOption = None,
    dry_run: DryRunOption = False,
) -> ExitCode:
    """Solve before and after a change of the fleet, and say what the two proofs imply of the difference.

    With --buy-next every GPU type of the market is added in turn and solved for. Every solve has the whole time limit;
    Ctrl-C once shows what there is, twice leaves at once.
    """
    from hetis.planner.cli.families import engine_rules, engine_settings
    from hetis.planner.cli.html_pages import refuse_page, save_page
    from hetis.planner.cli.searching import search_interruptibly
    from hetis.planner.report import what_if as report
    from hetis.planner.use_cases import place as placing
    from hetis.planner.use_cases import purchases
    from hetis.planner.use_cases import what_if as asking
    from hetis.planner.use_cases.precision import in_precision
    from hetis.planner.use_cases.sources import ReplicaLimits, load_inputs, ordered
    from hetis.solver.budget import Budget
    from hetis.solver.cluster import Link

    _refuse_half_a_question(buy_next=buy_next, changes=bool(add or remove), market=market is not None)
    refuse_page(html)
    loaded = load_inputs(
        cluster=cluster, model=model, workload=workload, profiles=profile or (), prefix_hit_rate=prefix_hit_rate
    )
    placing.require_demand(objective, rate, loaded.inputs.workload)
    goal = placing.objective(objective, ttft_s=ttft, tpot_s=tpot, demand_rps=rate)
    limits = ReplicaLimits(max_stages=max_stages, max_gpus=max_gpus, min_layers=min_layers, max_nodes=max_nodes)
    settings = placing.Settings(
        strategy=strategy,
        roles=ordered(roles or ()),
        engine=engine_rules(engine, strategy, limits),
        time_limit_s=time_limit,
        gap_target=gap,
        seed=seed,
        threads=threads,
    )
    loaded = in_precision(loaded, weights=weights, kv=kv, mtp=mtp)
    loaded = loaded.at(engine_settings(max_num_seqs, chunk_tokens, kv_blocks))
    fleet = loaded.inputs.cluster
    card = None if nic is None else Link(bytes_per_s=nic, latency_s=fleet.network.default.latency_s)
    wanted = purchases.read(
        fleet, add=add or (), remove=remove or (), market=(market, count) if buy_next else None,
        like=node_like, gpus_per_node=gpus_per_node, zone=zone, nic=card,
    )  # fmt: skip
    if dry_run:
        asking.changed_inputs(loaded, wanted.change)
        solves = 1 + (len(wanted.market) if buy_next else 1)
        return say_what_would_be_solved(
            terminal, [(loaded.inputs, goal)], strategies=[strategy], solves=solves,
            time_limit_s=time_limit, engine=None if settings.engine is None else settings.engine.name,
        )  # fmt: skip
    cancelled = threading.Event()

    def budget() -> Budget:
        return Budget(time_limit_s=time_limit, clock=time.monotonic, cancelled=cancelled)

    searching = partial(search_interruptibly, terminal, unit=goal.unit, cancelled=cancelled, so_far="the plans")
    if buy_next:
        bought = searching(
            lambda news: asking.buy_next(
                loaded, goal, settings, wanted.market, wanted.change.shape, budget=budget, report=news
            )
        )
        if html is not None:
            from hetis.planner.report.page.pages import buy_next_page

            save_page(terminal, buy_next_page(bought), html)
        terminal.emit(lambda: report.buy_next_document(bought), lambda: report.render_buy_next(bought))
        sides = [bought.before, *(offer.after for offer in bought.offers)]
    else:
        found = searching(
            lambda news: asking.what_if(loaded, goal, settings, wanted.change, budget=budget, report=news)
        )
        if html is not None:
            from hetis.planner.report.page.pages import what_if_page

            save_page(terminal, what_if_page(found), html)
        terminal.emit(lambda: report.what_if_document(found), lambda: report.render_what_if(found))
        sides = [found.before, found.after]
    return ExitCode.INTERRUPTED if cancelled.is_set() else _judge(sides)


def _refuse_half_a_question(*, buy_next: bool, changes: bool, market: bool) -> None:
    import typer

    if buy_next and changes:
        raise typer.BadParameter("--buy-next asks about the fleet as it is: leave out --add and --remove")
    if market and not buy_next:
        raise typer.BadParameter("--market is for --buy-next")
    if not buy_next and not changes:
        raise typer.BadParameter("nothing to ask: --add, --remove or --buy-next")


def _judge(sides: list[Side]) -> ExitCode:
    """Return success if any fleet has a plan."""
    from hetis.solver.plan import Status

    if any(side.outcome.plan is not None for side in sides):
        return ExitCode.OK
    proved = all(side.outcome.status == Status.INFEASIBLE.value for side in sides)
    return ExitCode.INFEASIBLE if proved else ExitCode.NO_PLAN
