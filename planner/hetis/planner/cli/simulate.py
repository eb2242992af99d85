"""``hetis-plan simulate PLAN``: a plan under real traffic, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import simulation_options as options
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.options import HtmlOption, PlanArgument
from hetis.planner.cli.simulation_options import Router
from hetis.planner.cli.stage_options import announce_compilation

if TYPE_CHECKING:
    from hetis.formats.traces import PrefixHitRate, Trace
    from hetis.planner.use_cases.sources import PlanAndProblem
    from hetis.simulator.metrics import Limits
    from hetis.simulator.values import Fault
    from hetis.solver.plan import Objective, Plan
    from hetis.solver.problem import PlacementProblem
    from hetis.solver.workload import Workload

PICTURES = {".html": "plotly", ".png": "matplotlib"}  # the libraries that draw them


@verb()
def simulate(
    terminal: Terminal,
    plan: PlanArgument,
    *,
    trace: options.TraceOption = None,
    prefix_hit_rate: options.PrefixHitRateOption = None,
    rate: options.RateOption = None,
    cv: options.GapCvOption = 1.0,
    recorded: options.RecordedOption = False,
    saturate: options.SaturateOption = False,
    sweep: options.SweepOption = False,
    tolerance: options.ToleranceOption = "2%",  # type: ignore[assignment]  # defaults go through the parser, too
    ttft: options.TtftOption = None,
    tpot: options.TpotOption = None,
    requests: options.NumRequestsOption = None,
    seeds: options.SeedsOption = 1,
    seed: options.SeedOption = 0,
    until_stable: options.UntilStableOption = False,
    precision: options.PrecisionOption = "5%",  # type: ignore[assignment]
    threads: options.ProcessesOption = 0,
    greedy: options.GreedyOption = False,
    paced: options.PacedOption = False,
    router: options.RouterOption = Router.LEAST_WORK,
    no_dispatch: options.NoDispatchOption = False,
    no_redispatch: options.NoRedispatchOption = False,
    theta: options.ThetaOption = "50%",  # type: ignore[assignment]
    max_num_seqs: options.MaxNumSeqsOption = None,
    chunk_tokens: options.ChunkTokensOption = None,
    kv_blocks: options.KvBlocksOption = None,
    fail: options.FailOption = None,
    join: options.JoinOption = None,
    faults: options.FaultsOption = None,
    perfetto: options.PerfettoOption = None,
    requests_csv: options.RequestsCsvOption = None,
    plot: options.PlotOption = None,
    html: HtmlOption = None,
) -> ExitCode:
    """Run a plan under traffic in virtual time, and hold what happens against what it promised.

    Ctrl-C once gives the figures of what was simulated by then; twice leaves at once.
    """
    _refuse_contradictions(
        {"--rate": rate is not None, "--recorded": recorded, "--saturate": saturate, "--sweep": sweep}, cv=cv,
        trace=trace, files={"--perfetto": perfetto, "--requests-csv": requests_csv}, until_stable=until_stable,
    )  # fmt: skip
    from hetis.planner.cli.html_pages import refuse_page

    _refuse_unwritable([path for path in (perfetto, requests_csv, plot) if path is not None], plot)
    refuse_page(html, beside=plot)
    from hetis.planner.cli.simulation_run import SimulationRun
    from hetis.planner.use_cases import simulate as simulating
    from hetis.planner.use_cases.at_settings import at_settings, one_chunk_settings
    from hetis.planner.use_cases.sources import load_plan_and_problem
    from hetis.planner.use_cases.verify import rate_to_simulate
    from hetis.simulator.arrivals import Arrivals, Load
    from hetis.simulator.values import Settings

    found = load_plan_and_problem(plan)
    for warning in found.warnings:
        terminal.warn(warning)
    if not found.plan.replicas:
        terminal.error("the plan has no replicas: there is nothing to simulate")
        return ExitCode.INVALID
    if not no_dispatch and any(replica.attention_workers for replica in found.plan.replicas):
        announce_compilation(terminal)
    drawn = not recorded and not saturate
    load = Load(
        lengths=_lengths(terminal, found, plan, trace, prefix_hit_rate),
        max_position=found.problem.model.max_position,
        arrivals=Arrivals.RECORDED if recorded else Arrivals.SATURATED if saturate else Arrivals.DRAWN,
        rate_rps=rate_to_simulate(found.plan, found.problem) if drawn and rate is None else rate,
        gap_cv=cv,
    )
    # The traffic stays that of the plan as it is.
    given = one_chunk_settings(max_num_seqs=max_num_seqs, chunk_tokens=chunk_tokens, kv_blocks=kv_blocks)
    started = at_settings(found.plan, found.problem, given)
    found = replace(found, plan=started.plan, problem=started.problem)
    num_requests = requests or simulating.default_requests(found.plan, load)
    question = simulating.Question(
        load=load,
        num_requests=num_requests,
        seeds=tuple(range(seed, seed + seeds)),
        settings=Settings(
            discipline="greedy" if greedy else "apart",
            chunks="paced" if paced else "planned",
            router=router.value,
            dispatch=not no_dispatch,
            redispatch=not no_redispatch and not no_dispatch,
            theta=theta,
            faults=_faults(fail, join, faults, found.plan, found.problem),
            sample_every_s=None if sweep else simulating.sample_spacing_s(found.plan, load, num_requests),
            trace=perfetto is not None,
        ),
        limits=_limits(found.plan.objective, ttft, tpot),
        sweeps=sweep,
        tolerance=tolerance,
        precision=precision if until_stable else None,
        engine_settings=given,
        changes=started.changes,
        keep_run=any(path is not None for path in (perfetto, requests_csv, plot, html)) and not sweep,
    )
    return SimulationRun(
        terminal=terminal,
        plan=found.plan,
        problem=found.problem,
        question=question,
        processes=threads,
        perfetto=perfetto,
        requests_csv=requests_csv,
        plot=plot,
        html=html,
    ).finish()


def _lengths(
    terminal: Terminal, found: PlanAndProblem, path: str, trace: str | None, prefix_hit_rate: PrefixHitRate | None
) -> Trace | Workload:
    """Return the requests of a trace, or else those that the plan was made for."""
    from hetis.formats.workload import with_prefix_hits
    from hetis.planner.use_cases.simulate import load_lengths, planned_lengths

    if trace is None:
        return with_prefix_hits(planned_lengths(found.plan, path), prefix_hit_rate)
    lengths, planned = load_lengths(trace, prefix_hit_rate), found.problem.workload.prefix_hit_rate
    if planned and not lengths.prefix_hit_rate and prefix_hit_rate is None:
        terminal.warn(
            f"{lengths.name} says nothing of prefix caches, of which the plan expects"
            f" {planned:.3g} of prompt tokens: every prompt is computed; see --prefix-hit-rate"
        )
    return lengths


def _refuse_contradictions(
    modes: dict[str, bool], *, cv: float, trace: str | None, files: dict[str, Path | None], until_stable: bool
) -> None:
    """Refuse options that contradict each other, before anything is read."""
    pairs = (("--saturate", "--rate"), ("--saturate", "--recorded"), ("--saturate", "--sweep"), ("--sweep", "--rate"))
    for one, other in (*pairs, ("--sweep", "--recorded")):
        if modes[one] and modes[other]:
            raise typer.BadParameter(f"{one} and {other} cannot be combined")
    if modes["--recorded"] and trace is None:
        raise typer.BadParameter("--recorded needs --trace: the plan holds lengths only")
    if cv != 1.0 and (modes["--recorded"] or modes["--saturate"]):
        raise typer.BadParameter("--cv is for arrivals that are drawn, not for --recorded or --saturate")
    if modes["--sweep"] and until_stable:
        raise typer.BadParameter("--sweep and --until-stable cannot be combined: give --requests and --seeds")
    for name, path in files.items():
        if modes["--sweep"] and path is not None:
            raise typer.BadParameter(f"{name} shows one run: it goes without --sweep")


def _refuse_unwritable(paths: list[Path], plot: Path | None) -> None:
    from hetis.planner.cli.plan_files import refuse_missing_library, refuse_unwritable

    for path in paths:
        refuse_unwritable(path)
    if plot is not None:
        if plot.suffix not in PICTURES:
            raise typer.BadParameter(f"{plot} is no picture: --plot takes a name that ends in {' or '.join(PICTURES)}")
        refuse_missing_library(PICTURES[plot.suffix], extra="plots", wanted_by=f"--plot {plot}")


def _limits(objective: Objective, ttft_s: float | None, tpot_s: float | None) -> Limits:
    from hetis.planner.cli.quantities import NO_LIMIT
    from hetis.simulator.metrics import Limits

    def limit(given: float | None, planned: float | None) -> float | None:
        if given is None:
            return planned
        return None if given == NO_LIMIT else given

    return Limits(ttft_s=limit(ttft_s, objective.ttft_limit_s), tpot_s=limit(tpot_s, objective.tpot_limit_s))


def _faults(
    fail: list[str] | None, join: list[str] | None, file: str | None, plan: Plan, problem: PlacementProblem
) -> tuple[Fault, ...]:
    from hetis.planner.use_cases.simulate import faults_of
    from hetis.simulator.records import load_faults
    from hetis.simulator.values import Fault

    given = [
        Fault(at_s=at_s, device=device, joins=joins)
        for texts, joins in ((fail, False), (join, True))
        for device, at_s in map(options.device_at, texts or ())
    ]
    named = faults_of(given, plan, problem, source="--fail, --join")
    listed = faults_of(load_faults(file), plan, problem, source=file) if file is not None else ()
    return tuple(sorted(named + listed, key=lambda fault: fault.at_s))
