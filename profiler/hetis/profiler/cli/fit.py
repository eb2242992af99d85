"""``hetis-profile fit``: turns measurements into a profile, and reports its error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.options import ClusterOption, ProfileOutOption

FIT_EXAMPLES = "Example: hetis-profile fit raw.json --out profile.json -o json | jq .held_out_mape"


@verb()
def fit(
    terminal: Terminal,
    raw: Annotated[list[Path], typer.Argument(metavar="RAW...", help="Measurements of one GPU type.")],
    out: ProfileOutOption,
    cluster: ClusterOption = None,
) -> ProfileExitCode:
    """Fit a profile to measurements and report its error on points the fit never saw.

    -o json has held_out_mape of every operator in the serving range (batch 4 and more, context 256 to 16k) and by
    region.
    """
    from hetis.formats.errors import DocumentError, Problem
    from hetis.formats.measurements import load_measurements
    from hetis.profiler.cli.files import all_of, require_outputs
    from hetis.profiler.cli.fit_report import report_document, report_table
    from hetis.profiler.cli.profiles import gpu_type, save_profile, with_relative
    from hetis.profiler.fit import fit_profile

    require_outputs([out])
    measurements = all_of(load_measurements, raw)
    first = measurements[0].gpu
    others = [
        Problem(file=str(path), path="gpu", message=f"is {one.gpu}, that of {raw[0]} is {first}: one profile, one GPU")
        for path, one in zip(raw, measurements, strict=True)
        if one.gpu != first
    ]
    if others:
        raise DocumentError(others)
    gpu, stand_in = with_relative(gpu_type(first, cluster))
    if stand_in:
        terminal.warn(f"what was not measured is modelled as if {first} were of the {gpu.architecture} architecture")
    with waiting(terminal, f"fitting {first}"):
        fitted = fit_profile(measurements, gpu)
    save_profile(out, fitted.profile)
    terminal.emit(lambda: report_document(fitted, out), lambda: report_table(fitted, out))
    return ProfileExitCode.OK


@contextmanager
def waiting(terminal: Terminal, what: str) -> Iterator[None]:
    """Show ``what`` while the block runs."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0 or not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with console.status(what):
        yield
