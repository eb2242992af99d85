"""The report on a fit, as values and as the JSON of ``hetis-profile fit -o json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hetis.profiler.fit.errors import ErrorStats
from hetis.profiler.fit.mixed import MixedReport
from hetis.profiler.fit.points import LeftOut, Unfitted
from hetis.profiler.fitting import rounded
from hetis.solver.profile import FitRegion, FitScope, Op

SMALL_BATCH = 64  # sequences; below this, few query heads leave most of a GPU idle
_FEW = 10  # points in the serving range that are too few on their own
BARS = {Op.DENSE: 0.08, Op.PREFILL_ATTENTION: 0.10, Op.DECODE_ATTENTION: 0.10}  # held-out MAPE in the serving range


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The points for which a plan would use a fit: shapes with their own fit are excluded."""

    num_fitted: int  # number of these points that it saw
    # serving, one_piece, by_region: as in `OpReport`, for these points only.
    serving: ErrorStats
    one_piece: ErrorStats
    by_region: tuple[tuple[str, ErrorStats], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpReport:
    """One fit: what it saw, and its errors on what it did not see."""

    op: Op
    scope: FitScope
    origin: str
    num_pieces: int
    num_fitted: int
    num_held_out: int
    # shapes of which the fit saw nothing; a sixth of the other shapes' points is held out too
    held_out_shapes: tuple[str, ...]
    fitted: ErrorStats
    held_out: ErrorStats
    # errors on held-out points in the serving range (batch >= 4, 256 to 16k context; dense: to 8k tokens)
    serving: ErrorStats
    one_piece: ErrorStats  # the same for a single affine piece fitted to the same points (the form of Hetis, SC'25)
    by_region: tuple[tuple[str, ErrorStats], ...]
    region: FitRegion
    served: Served  # the same for the points for which a plan would use this fit
    left_out: tuple[LeftOut, ...] = ()  # rows that no fit saw and no error counts, and why
    notes: tuple[str, ...] = ()  # what a reader of the fit must know
    remark: str = ""  # why the bar is missed, if it is

    @property
    def bar(self) -> float | None:
        return BARS.get(self.op)

    @property
    def meets_bar(self) -> bool:
        return self.bar is None or self.serving.mape <= self.bar


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSource:
    """The errors of a fit on points in the serving range from another source: another kernel, library or host."""

    op: Op
    scope: FitScope
    origin: str
    serving: ErrorStats


@dataclass(frozen=True, slots=True, kw_only=True)
class FewHeads:
    """The errors of a fit on unseen rows in the serving range with fewer query heads than it was made from."""

    op: Op
    scope: FitScope
    serving: ErrorStats
    small_batch: ErrorStats  # errors for fewer than `SMALL_BATCH` sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Every fit of one GPU, and every table that was not fitted."""

    gpu: str
    ops: tuple[OpReport, ...]
    unfitted: tuple[Unfitted, ...]
    other_sources: tuple[OtherSource, ...] = ()
    few_heads: tuple[FewHeads, ...] = ()
    mixed: tuple[MixedReport, ...] = ()

    def held_out_mape(self, op: Op, *, one_piece: bool = False) -> float | None:
        """Return the mean error over the held-out points of ``op`` in the serving range, each by the fit that a plan
        would use; None if there are none.
        """
        served = [report.served for report in self.ops if report.op is op]
        return mean_mape([one.one_piece if one_piece else one.serving for one in served])

    def to_data(self) -> dict[str, Any]:
        """Return plain data: ``held_out_mape`` by operator in the serving range, ``by_region`` also by region."""
        ops = list(dict.fromkeys(report.op for report in self.ops))
        return {
            "gpu": self.gpu,
            "held_out_mape": {op.value: self.held_out_mape(op) for op in ops},
            "one_piece_held_out_mape": {op.value: self.held_out_mape(op, one_piece=True) for op in ops},
            "by_region": {op.value: self._by_region(op) for op in ops},
            "fits": [_op_data(report) for report in self.ops],
            "other_sources": [
                asdict(other) | {"op": other.op.value, "scope": _set_fields(other.scope)}
                for other in self.other_sources
            ],
            "few_heads": [
                asdict(few) | {"op": few.op.value, "scope": _set_fields(few.scope)} for few in self.few_heads
            ],
            "mixed": [asdict(one) | {"scope": _set_fields(one.scope)} for one in self.mixed],
            "unfitted": [asdict(table) | {"op": table.op.value} for table in self.unfitted],
        }

    def _by_region(self, op: Op) -> dict[str, dict[str, float | int | None]]:
        mine = [report for report in self.ops if report.op is op]
        # In the order of the fit with the most regions, which itself serves few of them.
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
    """Return the error that a profile states for the fit: that in the serving range, or that of all held-out points if
    it is larger and the serving range has only a few.
    """
    if report.serving.num_points >= _FEW:
        return report.serving.mape
    return max(report.serving.mape, report.held_out.mape)


def remark(report: OpReport) -> str:
    """Return why a fit misses its bar, as far as its own regions show, or an empty string if it does not."""
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
    """Return the cause found for too fast fits of the published tables in this region, or an empty string."""
    if report.op is Op.DECODE_ATTENTION and region in _SERIAL_AT:
        return _SERIAL
    if report.op is Op.PREFILL_ATTENTION and region in _THROUGH_MEMORY_AT:
        return _THROUGH_MEMORY
    return ""


def mean_mape(stats: Sequence[ErrorStats]) -> float | None:
    """Return the mean weighted by points, or None without points."""
    count = sum(s.num_points for s in stats)
    return rounded(sum(s.mape * s.num_points for s in stats) / count) if count else None


def _op_data(report: OpReport) -> dict[str, Any]:
    data = asdict(report) | {
        "op": report.op.value,
        "scope": _set_fields(report.scope),
        "region": _set_fields(report.region),
        "by_region": {name: asdict(stats) for name, stats in report.by_region},
        "served": asdict(report.served) | {"by_region": {n: asdict(s) for n, s in report.served.by_region}},
    }
    return data | {"bar": report.bar, "meets_bar": report.meets_bar, "remark": data.pop("remark")}


def _set_fields(value: FitScope | FitRegion) -> dict[str, Any]:
    return {name: v for name in type(value).__dataclass_fields__ if (v := getattr(value, name)) is not None}
