"""Options shared by several verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RawOutOption = Annotated[
    Path, typer.Option("--out", metavar="RAW", help="Measurements file to write; packed if it ends in .gz.")
]
ProfileOutOption = Annotated[
    Path, typer.Option("--out", metavar="PROFILE", help="Profile to write; .yaml or .yml for YAML, else JSON.")
]
ClusterOption = Annotated[
    Path | None,
    typer.Option(
        "--cluster",
        "-c",
        metavar="FILE",
        show_default=False,
        help="Cluster file that defines the GPU type, where the catalogue lacks it.",
    ),
]
GpuOrFileArgument = Annotated[
    str, typer.Argument(metavar="PROFILE|GPU", help="A profile file, or a GPU type: the profile hetis ships for it.")
]
