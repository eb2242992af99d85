"""``hetis-plan place``: files in, a plan with its proof out."""

from __future__ import annotations

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import options
from hetis.planner.cli.dry_run import DryRunOption, say_what_would_be_solved
from hetis.planner.cli.exit_codes import ExitCode
from hetis.solver.plan import ObjectiveKind


@verb()
def place(
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
    price_pins: options.PricePinsOption = False,
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
    survive: options.SurviveOption = None,
    simplest_within: options.SimplestWithinOption = "0",  # type: ignore[assignment]
    time_limit: options.TimeLimitOption = "60s",  # type: ignore[assignment]  # defaults go through the parser, too
    gap: options.GapOption = "0.1%",  # type: ignore[assignment]
    seed: options.SeedOption = 0,
    threads: options.ThreadsOption = 1,
    profile_error: options.ProfileErrorOption = None,
    out: options.OutOption = None,
    html: options.HtmlOption = None,
    strict: options.StrictOption = False,
    verify: options.VerifyOption = True,
    dry_run: DryRunOption = False,
    other_engines: options.OtherEnginesOption = True,
) -> ExitCode:
    """Decide which GPUs form which replicas, and prove how good that is.

    Ctrl-C once prints and saves the best plan so far; twice leaves at once.
    """
    from hetis.planner.cli.families import engine_rules, engine_settings
    from hetis.planner.cli.html_pages import refuse_page
    from hetis.planner.cli.placement_run import PlacementRun
    from hetis.planner.cli.plan_files import refuse_unwritable
    from hetis.planner.use_cases.place import PlacementRequest, Settings, load, pose
    from hetis.planner.use_cases.sources import ReplicaLimits, ordered

    if out is not None:
        refuse_unwritable(out)
    refuse_page(html, beside=out)
    limits = ReplicaLimits(max_stages=max_stages, max_gpus=max_gpus, min_layers=min_layers, max_nodes=max_nodes)
    request = PlacementRequest(
        cluster=cluster,
        model=model,
        workload=workload,
        prefix_hit_rate=prefix_hit_rate,
        profiles=profile or (),
        weights=weights,
        kv=kv,
        mtp=mtp,
        pins=pin or (),
        forbids=forbid or (),
        objective=objective,
        demand_rps=rate,
        ttft_s=ttft,
        tpot_s=tpot,
        settings=Settings(
            strategy=strategy,
            roles=ordered(roles or ()),
            engine=engine_rules(engine, strategy, limits),
            time_limit_s=time_limit,
            gap_target=gap,
            seed=seed,
            threads=threads,
            simplest_within=simplest_within,
            survive="" if survive is None else survive.value,
        ),
        engine_settings=engine_settings(max_num_seqs, chunk_tokens, kv_blocks),
        verify=verify,
        other_engines=other_engines,
        price_pins=price_pins,
        profile_error=profile_error,
    )
    loaded = load(request)
    problem = pose(request, loaded)
    if dry_run:
        return say_what_would_be_solved(
            terminal, [(loaded.inputs, problem.objective)], strategies=[strategy], solves=1, time_limit_s=time_limit,
            engine=None if problem.family.engine is None else problem.family.engine.name,
        )  # fmt: skip
    return PlacementRun(
        terminal=terminal, request=request, loaded=loaded, problem=problem, out=out, html=html, strict=strict
    ).finish()
