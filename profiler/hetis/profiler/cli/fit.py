"""``hetis-profile fit``: turns measurements into a profile, and reports its error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.shared import (
    ClusterOption,
    ProfileOutOption,
    gpu_type,
    load_all,
    percent_text,
    require_outputs,
    save_profile,
    table_of,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.profiler.fit import FittedProfile

FIT_EXAMPLES = "Example: hetis-profile fit raw.json --out profile.json -o json | jq .held_out_mape"
_SERVING = "errors on held-out points in the serving range (attention: batch >= 4, context 256 to 16k)"
_STAND_IN = "Ampere"


@verb()
def fit(
    terminal: Terminal,
    raw: Annotated[list[Path], typer.Argument(metavar="RAW...", help="Measurements of one GPU type.")],
    out: ProfileOutOption,
    cluster: ClusterOption = None,
) -> ProfileExitCode:
    """Fit a profile to measurements and report its error on held-out points.

    -o json has held_out_mape of every operator in the serving range (batch 4 and more, context 256 to 16k) and by
    region.
    """
    from hetis.profiler.fit import fit_profile
    from hetis.profiler.roofline import shipped_efficiencies

    require_outputs(out)
    measurements = load_all(raw)
    gpu = gpu_type(measurements[0].gpu, cluster)
    if gpu.architecture not in shipped_efficiencies().architectures:
        # The processor of a host, or a type that a cluster file defines. Whatever was not measured is then modelled by
        # the ratios of its peaks to those of the most common GPU.
        gpu = replace(gpu, architecture=_STAND_IN)
        terminal.warn(f"what was not measured is modelled as if {gpu.name} were of the {_STAND_IN} architecture")
    with waiting(terminal, f"fitting {gpu.name}"):
        fitted = fit_profile(measurements, gpu)
    save_profile(out, fitted.profile)
    terminal.emit(lambda: {"out": str(out)} | fitted.report.to_data(), lambda: _table(fitted, out))
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


def _table(fitted: FittedProfile, out: Path) -> RenderableType:
    """Return a row per fit, followed by what was not fitted, in 80 columns."""
    from rich.console import Group
    from rich.text import Text

    from hetis.profiler.possible import scope_words

    report = fitted.report
    numbers = ("points", "held out", "pieces", "MAPE", "p95", "bias", "1 piece")
    table = table_of(("op", "scope"), numbers, padding=(0, 2, 0, 0))
    table.columns[3].no_wrap = False
    for one in report.ops:
        shown = one.serving if one.serving.num_points else one.held_out
        table.add_row(
            one.op.value.replace("_attention", ""),
            "\n".join(scope_words(one.scope)) or "any",
            str(one.num_fitted),
            str(one.num_held_out),
            str(one.num_pieces),
            Text(percent_text(shown.mape), style="" if one.meets_bar else "yellow"),
            percent_text(shown.p95),
            f"{shown.bias:+.1%}",
            percent_text(one.one_piece.mape if one.one_piece.num_points else None),
        )
    notes = [
        f"{one.op.value}: {percent_text(one.serving.mape)} is above the target of {percent_text(one.bar)}"
        + (f": {one.remark}" if one.remark else "")
        for one in report.ops
        if not one.meets_bar
    ]
    notes += list(dict.fromkeys(f"{one.op.value}: {note}" for one in report.ops for note in one.notes))
    most: dict[tuple[str, str], int] = {}
    for one in report.ops:
        for rows in one.left_out:
            key = one.op.value, rows.reason
            most[key] = max(most.get(key, 0), rows.num_rows)
    notes += [f"left out: {op}: {count:,} rows: {reason}" for (op, reason), count in most.items()]
    notes += [f"not fitted: {one.op.value} of {one.origin}: {one.reason}" for one in report.unfitted]
    return Group(
        Text(f"{report.gpu} -> {out}", style="bold"), table, Text(_SERVING, style="dim"), Text("\n".join(notes))
    )
