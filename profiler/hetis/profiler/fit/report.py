"""What a fit says of itself, as values and as the JSON of ``hetis-profile fit -o json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hetis.profiler.fit.errors import ErrorStats
from hetis.profiler.fit.points import LeftOut, Unfitted
from hetis.profiler.fitting import rounded
from hetis.solver.profile import FitRegion, FitScope, Op

SMALL_BATCH = 64  # sequences; below it few query heads leave most of a GPU idle
_FEW = 10  # points in the serving range that do not say enough alone
BARS = {Op.DENSE: 0.08, Op.PREFILL_ATTENTION: 0.10, Op.DECODE_ATTENTION: 0.10}  # held-out MAPE in the serving range


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What of a fit's points a plan would ask it for: those of shapes with a fit of their own are not among them.

    Attributes:
        num_fitted: of the points that it saw.
        serving, one_piece, by_region: as those of `OpReport`, of these points alone.
    """

    num_fitted: int
    serving: ErrorStats
    one_piece: ErrorStats
    by_region: tuple[tuple[str, ErrorStats], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpReport:
    """One fit: what it saw, and how wrong it is on what it did not see.

    Attributes:
        held_out_shapes: shapes of which the fit saw nothing; a sixth of the other shapes' points is held out too.
        serving: errors on held-out points in the serving range (batch >= 4, 256 to 16k context; dense: to 8k tokens).
        one_piece: the same for a single affine piece fitted to the same points (the form of Hetis, SC'25).
        served: the same of the points that a plan would ask this fit for.
        left_out: rows that no fit saw and no error counts, and why.
        notes: what a reader of the fit must know.
        remark: why the bar is missed, where it is.
    """

    op: Op
    scope: FitScope
    origin: str
    num_pieces: int
    num_fitted: int
    num_held_out: int
    held_out_shapes: tuple[str, ...]
    fitted: ErrorStats
    held_out: ErrorStats
    serving: ErrorStats
    one_piece: ErrorStats
    by_region: tuple[tuple[str, ErrorStats], ...]
    region: FitRegion
    served: Served
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    remark: str = ""

    @property
    def bar(self) -> float | None:
        return BARS.get(self.op)

    @property
    def meets_bar(self) -> bool:
        return self.bar is None or self.serving.mape <= self.bar


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSource:
    """What a fit says of points in the serving range that another source measured: another kernel, library or host."""

    op: Op
    scope: FitScope
    origin: str
    serving: ErrorStats


@dataclass(frozen=True, slots=True, kw_only=True)
class FewHeads:
    """What a fit says of rows in the serving range with fewer query heads than it was made of, none of which it saw."""

    op: Op
    scope: FitScope
    serving: ErrorStats
    small_batch: ErrorStats  # of those under `SMALL_BATCH` sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Every fit of one GPU, and every table that none was made of."""

    gpu: str
    ops: tuple[OpReport, ...]
    unfitted: tuple[Unfitted, ...]
    other_sources: tuple[OtherSource, ...] = ()
    few_heads: tuple[FewHeads, ...] = ()

    def held_out_mape(self, op: Op, *, one_piece: bool = False) -> float | None:
        """Mean over the held-out points of ``op`` in the serving range, each by the fit that a plan would ask; None
        without any.
        """
        served = [report.served for report in self.ops if report.op is op]
        return mean_mape([one.one_piece if one_piece else one.serving for one in served])

    def to_data(self) -> dict[str, Any]:
        """Plain data; ``held_out_mape`` by operator in the serving range, ``by_region`` by operator and region."""
        ops = list(dict.fromkeys(report.op for report in self.ops))
        return {
            "gpu": self.gpu,
            "held_out_mape": {op.value: self.held_out_mape(op) for op in ops},
            "one_piece_held_out_mape": {op.value: self.held_out_mape(op, one_piece=True) for op in ops},
            "by_region": {op.value: self._by_region(op) for op in ops},
            "fits": [_op_data(report) for report in self.ops],
            "other_sources": [
                {
                    "op": other.op.value,
                    "scope": _set_fields(other.scope),
                    "origin": other.origin,
                    "serving": asdict(other.serving),
                }
                for other in self.other_sources
            ],
            "few_heads": [
                asdict(few) | {"op": few.op.value, "scope": _set_fields(few.scope)} for few in self.few_heads
            ],
            "unfitted": [asdict(table) | {"op": table.op.value} for table in self.unfitted],
        }

    def _by_region(self, op: Op) -> dict[str, dict[str, float | int | None]]:
        mine = [report for report in self.ops if report.op is op]
        # In the order of the fit with the most regions, which serves few of them itself.
        widest = max(mine, key=lambda report: len(report.by_region)).by_region
        cells: dict[str, list[ErrorStats]] = {name: [] for name, _ in widest}
        for report in mine:
            for name, stats in report.served.by_region:
                cells.setdefault(name, []).append(stats)
        return {
            name: {
                "num_points": sum(s.num_points for s in stats),
                "mape": mean_mape(stats),
                "bias": rounded(sum(s.bias * s.num_points for s in stats) / sum(s.num_points for s in stats)),
            }
            for name, stats in cells.items()
            if stats
        }


def stated_error(report: OpReport) -> float:
    """Return what a profile says of the fit: its error in the serving range, or of all held-out points if that is
    larger and the serving range has only a few.
    """
    if report.serving.num_points >= _FEW:
        return report.serving.mape
    return max(report.serving.mape, report.held_out.mape)


def remark(report: OpReport) -> str:
    """Why a fit misses its bar, as far as its own regions show; empty when it does not."""
    if report.meets_bar:
        return ""
    ranked = sorted(report.by_region, key=lambda cell: -cell[1].mape * cell[1].num_points)
    unserved = (*_NOT_SERVED, "batch < 4") if report.op is Op.DECODE_ATTENTION else _NOT_SERVED
    worst = [(name, s) for name, s in ranked if not any(limit in name for limit in unserved)][:2]
    where = "; ".join(f"{name}: {s.mape:.0%} off, bias {s.bias:+.0%}, {s.num_points} points" for name, s in worst)
    reason = next((_reason(report, name) for name, s in worst if s.bias < -0.05 and _reason(report, name)), "")
    if report.serving.num_points < _FEW:
        reason = f"Only {report.serving.num_points} points judge it"
    return f"most of the error is at {where}" + (f". {reason}" if reason else "")


_NOT_SERVED = ("context < 256", "context >= 16,385")
_SERIAL = (
    "The kernel is slower there than its bytes: one SM reads the KV of a sequence and head alone, so that few "
    "sequences of a long context leave the others idle, and the cost model knows bytes, not contexts"
)
_THROUGH_MEMORY = (
    "Large batches of short prompts move queries, keys, values and outputs through memory, while the cache served the "
    "smaller ones, measured over and over: a bend by bytes that the features of a chunk have not. Engines prefill a "
    "chunk of one prompt at a time"
)


_SERIAL_AT = ("batch < 4, context 4,096 to 16,384", "batch 4 to 15, context 4,096 to 16,384")
_THROUGH_MEMORY_AT = ("batch 16 to 63, context 256 to 1,023", "batch >= 64, context 256 to 1,023")


def _reason(report: OpReport, region: str) -> str:
    """Return what was found behind too fast fits of the published tables in such a region; empty elsewhere."""
    if report.op is Op.DECODE_ATTENTION and region in _SERIAL_AT:
        return _SERIAL
    if report.op is Op.PREFILL_ATTENTION and region in _THROUGH_MEMORY_AT:
        return _THROUGH_MEMORY
    return ""


def mean_mape(stats: Sequence[ErrorStats]) -> float | None:
    """The mean weighted by points; None without points."""
    count = sum(s.num_points for s in stats)
    return rounded(sum(s.mape * s.num_points for s in stats) / count) if count else None


def _op_data(report: OpReport) -> dict[str, Any]:
    return {
        "op": report.op.value,
        "scope": _set_fields(report.scope),
        "region": {name: list(limits) for name, limits in _set_fields(report.region).items()},
        "origin": report.origin,
        "num_pieces": report.num_pieces,
        "num_fitted": report.num_fitted,
        "num_held_out": report.num_held_out,
        "held_out_shapes": list(report.held_out_shapes),
        "fitted": asdict(report.fitted),
        "held_out": asdict(report.held_out),
        "serving": asdict(report.serving),
        "one_piece": asdict(report.one_piece),
        "by_region": {name: asdict(stats) for name, stats in report.by_region},
        "served": asdict(report.served) | {"by_region": {n: asdict(s) for n, s in report.served.by_region}},
        "left_out": [asdict(rows) for rows in report.left_out],
        "notes": list(report.notes),
        "bar": report.bar,
        "meets_bar": report.meets_bar,
        "remark": report.remark,
    }


def _set_fields(value: FitScope | FitRegion) -> dict[str, Any]:
    return {name: v for name in type(value).__dataclass_fields__ if (v := getattr(value, name)) is not None}
