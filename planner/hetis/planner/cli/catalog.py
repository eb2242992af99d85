"""``hetis-plan catalog``: the GPUs, models, workloads and strategies known by name."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode


class Catalogue(StrEnum):
    GPUS = "gpus"
    MODELS = "models"
    WORKLOADS = "workloads"
    STRATEGIES = "strategies"


@verb()
def catalog(
    terminal: Terminal,
    which: Annotated[Catalogue, typer.Argument(help="What to list.")],
    containing: Annotated[str, typer.Argument(help="Only names that contain this text.", show_default=False)] = "",
) -> ExitCode:
    """List the GPUs, models, workloads or strategies that hetis knows, with their sources (-o json)."""
    from hetis.formats import catalogue
    from hetis.planner.report import catalogue as tables
    from hetis.planner.use_cases.json_values import json_value
    from hetis.profiler.defaults import profile_origin
    from hetis.solver.placement.families import STRATEGIES
    from hetis.solver.problem import Family

    def chosen(name: str) -> bool:
        return containing.lower() in name.lower()

    _suggest(terminal, containing, which)
    match which:
        case Catalogue.GPUS:
            gpus = [entry for entry in catalogue.gpus() if chosen(entry.gpu.name)]
            profiles = {entry.gpu.name: profile_origin(entry.gpu) for entry in gpus}
            terminal.emit(
                lambda: [{**json_value(entry), "profile": profiles[entry.gpu.name]} for entry in gpus],
                lambda: tables.gpu_table(gpus, profiles),
            )
        case Catalogue.MODELS:
            models = [entry for entry in catalogue.models() if chosen(entry.model.name)]
            terminal.emit(lambda: json_value(models), lambda: tables.model_table(models))
        case Catalogue.WORKLOADS:
            workloads = [entry for entry in catalogue.workloads() if chosen(entry.workload.name)]
            terminal.emit(lambda: json_value(workloads), lambda: tables.workload_table(workloads))
        case Catalogue.STRATEGIES:
            strategies = [one for one in STRATEGIES.values() if chosen(one.name)]
            families = {one.name: one.restrict(Family()) for one in strategies}
            terminal.emit(
                lambda: [
                    {"name": one.name, "summary": one.summary, "family": families[one.name].describe()}
                    for one in strategies
                ],
                lambda: tables.strategy_table([(one.name, one.summary) for one in strategies]),
            )
    return ExitCode.OK


def _suggest(terminal: Terminal, containing: str, which: Catalogue) -> None:
    """Warn about a text that is in no name, with the nearest name: an empty list alone would look like all there is."""
    from hetis.formats import catalogue
    from hetis.formats.errors import did_you_mean
    from hetis.solver.placement.families import STRATEGIES

    names: Sequence[str] = {
        Catalogue.GPUS: lambda: [entry.gpu.name for entry in catalogue.gpus()],
        Catalogue.MODELS: lambda: [entry.model.name for entry in catalogue.models()],
        Catalogue.WORKLOADS: lambda: [entry.workload.name for entry in catalogue.workloads()],
        Catalogue.STRATEGIES: lambda: list(STRATEGIES),
    }[which]()
    if not any(containing.lower() in name.lower() for name in names):
        terminal.warn(f"no name of the {which.value} contains {containing!r}{did_you_mean(containing, names)}")
