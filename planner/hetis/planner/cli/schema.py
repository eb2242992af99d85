"""``hetis-plan schema KIND``: the JSON Schema of a file form."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import OutputFormat, Terminal
from hetis.formats.command_line.verb import verb
from hetis.formats.errors import did_you_mean
from hetis.planner.cli.exit_codes import ExitCode


class Kind(StrEnum):
    CLUSTER = "Cluster"
    MODEL_SPEC = "ModelSpec"
    WORKLOAD = "Workload"
    PROFILE = "Profile"
    PLAN = "Plan"
    DISPATCH_STATE = "DispatchState"
    DISPATCH_REQUESTS = "DispatchRequests"
    SHARE_PROBLEM = "ShareProblem"
    LAYERS_PROBLEM = "LayersProblem"
    TENANTS = "Tenants"


def _kind(text: str) -> Kind:
    for kind in Kind:
        if text.lower() == kind.lower():
            return kind
    raise typer.BadParameter(f"{text!r} is not one of {', '.join(Kind)}{did_you_mean(text, Kind)}")


def _names(incomplete: str) -> list[str]:
    return [kind.value for kind in Kind if kind.lower().startswith(incomplete.lower())]


@verb(output=OutputFormat.JSON)
def schema(
    terminal: Terminal,
    kind: Annotated[
        Kind, typer.Argument(parser=_kind, metavar="KIND", autocompletion=_names, help=f"One of {', '.join(Kind)}.")
    ],
) -> ExitCode:
    """Print the JSON Schema of a kind of file, for editors and other tools."""
    from rich.json import JSON

    from hetis.formats.documents import json_schema

    document = json_schema(kind.value)
    terminal.emit(lambda: document, lambda: JSON.from_data(document))
    return ExitCode.OK
