"""The result of a calibration, as a table of 80 columns and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetis.profiler.calibrate.correction import Calibration, Parameter
from hetis.profiler.calibrate.observed import Observed
from hetis.profiler.calibrate.replica import Replica
from hetis.profiler.cli.words import percent, seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

_WORDS = {
    "kernels": "time of kernels, times",
    "step": "host, each iteration",
    "sequence": "host, each sequence",
}


def report_document(found: Calibration, observed: Observed, replica: Replica, out: Path) -> dict[str, Any]:
    """Return all numbers; ``errors`` has kind ``all`` last, ``margin`` is half of a 95% interval or null."""
    return {
        "out": None if found.profile is None else str(out),
        "gpu": replica.profile.gpu,
        "model": replica.model.name,
        "tp": replica.tp,
        "engine": observed.origin,
        "observed": observed.what,
        "fitted": found.num_fitted,
        "judged": found.judged[-1].count,
        "left_out": dict(found.left_out),
        "errors": [asdict(one) | {"kind": one.kind or "all"} for one in found.judged],
        "parameters": [asdict(one) for one in found.parameters],
        "notes": list(observed.notes),
    }


def report_table(found: Calibration, observed: Observed, replica: Replica) -> RenderableType:
    """Return the held-out errors before and after by kind, the parameters, and what was left out."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = f"{replica.profile.gpu}, {replica.model.name} at TP {replica.tp}, {observed.origin}"
    errors = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    errors.add_column("held out", no_wrap=True)
    for name in (observed.what, "mean", "MAPE", "bias", "p90", "-> MAPE", "bias", "p90"):
        errors.add_column(name, justify="right", no_wrap=True)
    for one in found.judged:
        cells = [cell for e in (one.before, one.after) for cell in (percent(e.mape), f"{e.bias:+.1%}", percent(e.p90))]
        errors.add_row(one.kind or "all", f"{one.count:,}", seconds(one.mean_s), *cells)
    parameters = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("parameter", "before", "after", "95% interval"):
        parameters.add_column(name, justify="left" if name == "parameter" else "right", no_wrap=True)
    for each in found.parameters:
        parameters.add_row(_WORDS[each.name], _shown(each, each.before), _shown(each, each.after), _interval(each))
    left_out = [
        f"left out: {count:,}: {reason}" for reason, count in sorted(found.left_out.items(), key=lambda x: -x[1])
    ]
    said = [f"fitted to {found.num_fitted:,} {observed.what}, judged on {found.judged[-1].count:,} others", *left_out]
    if any(each.margin is None for each in found.parameters):
        said.append("not fitted: this load does not tell it apart, or it is worth nothing; as in the profile")
    return Group(Text(title, style="bold"), errors, Text(), parameters, Text("\n".join(said)))


def _shown(one: Parameter, value: float) -> str:
    return f"{value:.3g}" if one.name == "kernels" else seconds(value)


def _interval(one: Parameter) -> str:
    if one.margin is None:
        return "not fitted"
    return f"±{one.margin:.2g}" if one.name == "kernels" else f"±{seconds(one.margin)}"
