"""The tables of docs/profiles-modelled.md: the coefficients, their errors, and the assumptions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetis.profiler.efficiency import Efficiencies, OpEfficiency, RelativePiece
from tools.validation import comparisons, splitwise_token_times

Rows = Iterable[Sequence[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A fit of one GPU, its work relative to the peaks, compared with all points of another."""

    op: str
    fitted: str
    judged: str
    num_points: int
    mape: float
    bias: float


def modelled_tables(
    efficiencies: Efficiencies, pairs: Sequence[Pair], folder: Path
) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Yield name, headings and rows of every table."""
    measured = [arch for arch in efficiencies.architectures.values() if arch.relative is None]
    rows = [_row(op_name, arch.name, op) for arch in measured for op_name, op in arch.ops.items()]
    rows += [_row(name, "any", op) for name, op in efficiencies.links.items()]
    headings = ("op", "architecture", "pieces", "points", "fitted", "held out", "unseen GPUs")
    yield "modelled coefficients", headings, sorted(rows)
    origins = {f"{name} ({arch.name})": op for arch in measured for name, op in arch.ops.items() if op.num_points}
    origins.update(efficiencies.links)
    yield (
        "modelled provenance",
        ("fit", "origin"),
        ((name, f"{op.origin}{'; ' + op.note if op.note else ''}") for name, op in origins.items()),
    )
    yield (
        "modelled pairs",
        ("op", "fitted on", "predicts", "points", "MAPE", "bias"),
        ((p.op, p.fitted, p.judged, p.num_points, f"{p.mape:.1%}", f"{p.bias:+.1%}") for p in pairs),
    )
    yield (
        "modelled relatives",
        ("architecture", "relative", "FLOPs take", "why"),
        (
            (arch.name, arch.relative, f"{arch.compute_factor:.3g}x", arch.reason)
            for arch in efficiencies.architectures.values()
            if arch.relative is not None
        ),
    )
    yield (
        "modelled other tables",
        ("table", "points", "measured / predicted", "MAPE"),
        ((c.what, c.num_points, f"{c.ratio:.2f}", f"{c.mape:.0%}") for c in comparisons(efficiencies, folder)),
    )
    yield (
        "modelled engine",
        ("GPU", "TP", "measured ms/token", "predicted", "measured / predicted"),
        (
            (
                t.gpu,
                t.tp,
                f"{t.measured_s * 1e3:.1f}",
                f"{t.predicted_s * 1e3:.1f}",
                f"{t.measured_s / t.predicted_s:.2f}",
            )
            for t in splitwise_token_times(efficiencies, folder)
        ),
    )


def _row(name: str, arch: str, op: OpEfficiency) -> tuple[str, ...]:
    errors = (op.fitted_mape, op.held_out_mape, op.transfer_mape)
    points = str(op.num_points) if op.num_points else "borrowed" if arch != "any" else ""
    return name, arch, "; ".join(map(_piece, op.pieces)), points, *("" if e is None else f"{e:.1%}" for e in errors)


def _piece(piece: RelativePiece) -> str:
    terms = (
        (piece.fixed_s * 1e6, "us"),
        (piece.flop, "f"),
        (piece.byte, "b"),
        (piece.token_bytes / 1e3, "kB/token"),
        (piece.head_bytes / 1e3, "kB/head"),
        (piece.wire, "w"),
    )
    return " + ".join(f"{value:.3g} {unit}" for value, unit in terms if value) or "0"
