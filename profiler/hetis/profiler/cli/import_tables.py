"""``hetis-profile import``: imports tables that other tools measured."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.options import RawOutOption

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from hetis.formats.measurements import Measurements


class Format(StrEnum):
    """The tool that wrote the tables; a test keeps this in step with `hetis.profiler.importers.FORMATS`."""

    AICONFIGURATOR = "aiconfigurator"
    VIDUR = "vidur"
    SPLITWISE = "splitwise"
    LLMSERVINGSIM = "llmservingsim"


@verb()
def import_tables(
    terminal: Terminal,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Tables: .csv, .csv.gz or .parquet.")],
    form: Annotated[Format, typer.Option("--format", help="Whose tables they are.")],
    out: RawOutOption,
) -> ProfileExitCode:
    """Import tables of other tools as measurements.

    Tables of several GPUs, engines or hosts become a file each: raw.json, raw-2.json, ...
    """
    from hetis.formats.measurements import save_measurements
    from hetis.profiler.cli.files import require_outputs
    from hetis.profiler.importers import import_tables as read

    require_outputs([out])
    found = dict(zip(_paths(out), read(form.value, files), strict=False))
    for path, measurements in found.items():
        save_measurements(path, measurements)
    terminal.emit(lambda: _document(found), lambda: _table(found))
    return ProfileExitCode.OK


def _paths(out: Path) -> list[Path]:
    """Return ``raw.json.gz``, ``raw-2.json.gz``, ...: more than a table can have GPUs."""
    suffix = "".join(out.suffixes[-2:]) if out.suffix == ".gz" else out.suffix
    stem = out.name.removesuffix(suffix)
    return [out, *(out.with_name(f"{stem}-{number}{suffix}") for number in range(2, 1000))]


def _document(found: Mapping[Path, Measurements]) -> list[dict[str, Any]]:
    return [
        {
            "out": str(path),
            "gpu": value.gpu,
            "origin": str(value.provenance),
            "tables": [{"op": table.op.value, "kernel": table.kernel, "points": len(table)} for table in value.tables],
            "notes": list(value.notes),
        }
        for path, value in found.items()
    ]


def _table(found: Mapping[Path, Measurements]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for path, value in found.items():
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("op")
        table.add_column("kernel", overflow="fold")
        table.add_column("points", justify="right")
        for one in value.tables:
            table.add_row(one.op.value, one.kernel, f"{len(one):,}")
        notes = Text("".join(f"note: {note}\n" for note in value.notes), end="")
        parts += [Text(f"{value.gpu} -> {path}", style="bold"), Text(str(value.provenance)), table, notes]
    return Group(*parts)
