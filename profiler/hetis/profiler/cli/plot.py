"""``hetis-profile plot``: draws measured against fitted times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.options import ClusterOption, GpuOrFileArgument


@verb()
def plot(
    terminal: Terminal,
    profile: GpuOrFileArgument,
    raw: Annotated[list[Path], typer.Argument(metavar="RAW...", help="Measurements to hold it against.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Picture to write: .png or .html.")],
    cluster: ClusterOption = None,
) -> ProfileExitCode:
    """Draw measured against fitted times, and the residuals of each region.

    HTML needs plotly, PNG matplotlib; neither needs a browser or a network.
    """
    from hetis.formats.errors import DocumentError, Problem, single_problem
    from hetis.formats.files import write_atomically
    from hetis.formats.measurements import load_measurements
    from hetis.profiler.cli.files import all_of, require_outputs
    from hetis.profiler.cli.profiles import gpu_type, profile_of
    from hetis.profiler.pictures.pairs import pairs_of

    if out.suffix not in (".png", ".html"):
        raise single_problem(str(out), "the name of the picture must end in .png or .html")
    require_outputs([out])
    found, measurements = profile_of(profile), all_of(load_measurements, raw)
    others = [
        Problem(file=str(path), path="gpu", message=f"is {one.gpu}, the profile is of {found.gpu}")
        for path, one in zip(raw, measurements, strict=True)
        if one.gpu != found.gpu
    ]
    if others:
        raise DocumentError(others)
    pairs = pairs_of(found, measurements, gpu_type(found.gpu, cluster))
    if not pairs:
        raise single_problem(str(raw[0]), f"holds nothing that the profile of {found.gpu} has a comparable fit for")
    title = f"{found.gpu}: {Path(profile).name} against {', '.join(path.name for path in raw)}"
    if out.suffix == ".html":
        from hetis.profiler.pictures.html import html

        write_atomically(out, html(pairs, title))
    else:
        from hetis.profiler.pictures.png import png

        write_atomically(out, png(pairs, title))
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=f"{found.gpu} -> {out}", title_justify="left")
    table.add_column("what", overflow="fold")
    for name in ("points", "MAPE", "bias"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in pairs:
        table.add_row(one.title, f"{len(one.measured):,}", f"{one.mape:.1%}", f"{one.residual.mean():+.1%}")
    document = [
        {
            "title": one.title,
            "points": len(one.measured),
            "mape": round(one.mape, 4),
            "bias": round(float(one.residual.mean()), 4),
        }
        for one in pairs
    ]
    terminal.emit(lambda: {"out": str(out), "pairs": document}, lambda: table)
    return ProfileExitCode.OK
