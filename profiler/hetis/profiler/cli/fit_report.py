"""The errors of a fit, as a table of 80 columns and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetis.profiler.cli.profile_table import scope_words
from hetis.profiler.cli.words import percent
from hetis.profiler.fit import FittedProfile

if TYPE_CHECKING:
    from rich.console import RenderableType

_SERVING = "errors on held-out points in the serving range (attention: batch >= 4, context 256 to 16k)"


def report_document(fitted: FittedProfile, out: Path) -> dict[str, Any]:
    """Return the report's own data: ``held_out_mape`` by operator, with ``by_region`` below it."""
    return {"out": str(out)} | fitted.report.to_data()


def report_table(fitted: FittedProfile, out: Path) -> RenderableType:
    """Return a row per fit, followed by what was not fitted."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    report = fitted.report
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("op", no_wrap=True)
    table.add_column("scope", overflow="fold")
    for name in ("points", "held out", "pieces", "MAPE", "p95", "bias", "1 piece"):
        table.add_column(name, justify="right", no_wrap=name != "held out")
    for one in report.ops:
        shown = one.serving if one.serving.num_points else one.held_out
        table.add_row(
            one.op.value.replace("_attention", ""),
            "\n".join(scope_words(one.scope)) or "any",
            str(one.num_fitted),
            str(one.num_held_out),
            str(one.num_pieces),
            Text(percent(shown.mape), style="" if one.meets_bar else "yellow"),
            "-" if shown.p95 is None else percent(shown.p95),
            f"{shown.bias:+.1%}",
            percent(one.one_piece.mape) if one.one_piece.num_points else "-",
        )
    notes = [
        f"{one.op.value}: {percent(one.serving.mape)} is above the {percent(one.bar)} wanted"
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
