"""``hetis-plan place``: files in, a plan with its proof out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hetis.planner.cli import quantities, words
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.terminal import Terminal
from hetis.planner.cli.verb import verb
from hetis.solver.plan import ObjectiveKind


class Strategy(StrEnum):
    """Families of plans; a test keeps this in step with `hetis.solver.placement.strategies.STRATEGIES`."""

    HETIS = "hetis"
    UNIFORM = "uniform"
    HEXGEN = "hexgen"


_INPUTS, _GOAL, _SEARCH, _RESULT = "Inputs", "Goal", "Search", "Result"


@verb()
def place(
    terminal: Terminal,
    *,
    cluster: Annotated[
        str, typer.Option("--cluster", "-c", metavar="FILE", help="The fleet.", rich_help_panel=_INPUTS)
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FILE",
            autocompletion=words.model_names,
            rich_help_panel=_INPUTS,
            help="A name of `catalog models`, a ModelSpec file, or a Hugging Face config.json.",
        ),
    ],
    workload: Annotated[
        str,
        typer.Option(
            "--workload",
            "-w",
            metavar="NAME|FILE|P/O",
            autocompletion=words.workload_names,
            rich_help_panel=_INPUTS,
            help="A name of `catalog workloads`, a Workload file, a CSV trace, or mean lengths such as 8000/300.",
        ),
    ],
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            rich_help_panel=_INPUTS,
            show_default=False,
            help="Profile of a GPU type; repeatable. Types without one are modelled.",
        ),
    ] = None,
    objective: Annotated[
        ObjectiveKind, typer.Option(help="What the plan is good for.", rich_help_panel=_GOAL)
    ] = ObjectiveKind.GOODPUT,
    rate: Annotated[
        float | None,
        typer.Option(
            parser=quantities.rate,
            metavar="R",
            rich_help_panel=_GOAL,
            show_default=False,
            help="Demanded requests/s; objectives cost and gpus need it.",
        ),
    ] = None,
    ttft: Annotated[
        float | None,
        typer.Option(
            parser=quantities.limit,
            metavar="TIME|none",
            rich_help_panel=_GOAL,
            show_default="2s; throughput: none",
            help="Limit of the p95 time to first token.",
        ),
    ] = None,
    tpot: Annotated[
        float | None,
        typer.Option(
            parser=quantities.limit,
            metavar="TIME|none",
            rich_help_panel=_GOAL,
            show_default="100ms; throughput: none",
            help="Limit of the mean time per output token.",
        ),
    ] = None,
    strategy: Annotated[
        Strategy, typer.Option(help="Family of plans to search.", rich_help_panel=_SEARCH)
    ] = Strategy.HETIS,
    time_limit: Annotated[
        float,
        typer.Option(
            parser=quantities.positive_duration,
            metavar="TIME",
            rich_help_panel=_SEARCH,
            help="Return the best plan found by then.",
        ),
    ] = "60s",  # type: ignore[assignment]  # defaults go through the parser, too
    gap: Annotated[
        float,
        typer.Option(
            parser=quantities.ratio,
            metavar="GAP",
            rich_help_panel=_SEARCH,
            help="Stop when the plan is proven this close to the best; 0.5% or 0.005.",
        ),
    ] = "0.1%",  # type: ignore[assignment]
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same plan.", rich_help_panel=_SEARCH)] = 0,
    threads: Annotated[
        int, typer.Option(min=0, help="Solver threads; 0 uses every core.", rich_help_panel=_SEARCH)
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            rich_help_panel=_RESULT,
            show_default=False,
            help="Also save the plan; .yaml or .yml for YAML, anything else is JSON.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit 5 when the gap or the demanded rate is missed.", rich_help_panel=_RESULT),
    ] = False,
) -> ExitCode:
    """Decide which GPUs form which replicas, and prove how good that is.

    Ctrl-C once prints and saves the best plan so far; twice leaves at once.
    """
    from hetis.planner import placing
    from hetis.planner.cli.placement_run import PlacementRun
    from hetis.planner.cli.plan_files import refuse_unwritable
    from hetis.planner.sources import load_inputs

    if out is not None:
        refuse_unwritable(out)
    loaded = load_inputs(cluster=cluster, model=model, workload=workload, profiles=profile or ())
    placing.require_demand(objective, rate, loaded.inputs.workload)
    goal = placing.objective(objective, ttft_s=ttft, tpot_s=tpot, demand_rps=rate)
    settings = placing.Settings(
        strategy=strategy.value, time_limit_s=time_limit, gap_target=gap, seed=seed, threads=threads
    )
    problem = loaded.inputs.problem(goal, strategy.value)
    return PlacementRun(
        terminal=terminal, loaded=loaded, problem=problem, settings=settings, out=out, strict=strict
    ).finish()
