"""``hetis-plan schema KIND``: the JSON Schema of a file form."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import OutputFormat, Terminal
from hetis.formats.command_line.verb import verb
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


@verb(output=OutputFormat.JSON)
def schema(
    terminal: Terminal,
    kind: Annotated[Kind, typer.Argument(case_sensitive=False, help="Kind of document, in any case.")],
) -> ExitCode:
    """Print the JSON Schema of a kind of file, for editors and other tools."""
    from rich.json import JSON

    from hetis.formats.documents import json_schema

    document = json_schema(kind.value)
    terminal.emit(lambda: document, lambda: JSON.from_data(document))
    return ExitCode.OK
