"""The tables of docs/accuracy.md: the errors of every shipped profile, and comparisons with whole engines.

Prefill chunks over a past are judged by the one published table with such chunks: added time and KV cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from hetis.formats.measurements import MeasuredOp, Measurements
from hetis.profiler.fit import FittedProfile
from hetis.profiler.fit.attention import prefill_points
from hetis.profiler.fit.pieces import fit_points
from hetis.profiler.fit.points import FEATURES, Points, distinct
from hetis.profiler.fit.report import SMALL_BATCH, mean_mape
from hetis.profiler.fitting import FloatArray
from hetis.profiler.ranges import stated_error
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Profile, Source
from tools.whole_engine import EngineTime, engine_times, mean_error

_BYTE = FEATURES[Op.PREFILL_ATTENTION].index("byte_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCharge:
    """One way to charge KV, fitted to the table itself and judged on held-out chunks over a past.

    ``readings`` is the time of a KV byte as a multiple of that at the nominal bandwidth, at most over the pieces.
    """

    charge: str
    num_points: int
    mape: float
    bias: float
    readings: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OverPast:
    """Results for the chunks.

    Attributes:
        charges: ways to charge KV.
        num_increments: number of chunks with a past that have a twin without.
        increment: median of the time that the past adds, the shipped fit's prediction / measured.
        increment_mape: mean error of this time, as a share of the whole time of the chunk.
    """

    charges: tuple[KvCharge, ...]
    num_increments: int
    increment: float
    increment_mape: float


def over_past(measurements: Measurements, gpu: GpuType, shipped: Fit) -> OverPast:
    """Judge the chunks of ``measurements``, to none of which ``shipped`` was fitted.

    Raises:
        StopIteration: there is no table of prefill attention.
    """
    table = next(table for table in measurements.tables if table.op is MeasuredOp.PREFILL_ATTENTION)
    points = distinct(next(prefill_points(table, gpu, str(measurements.provenance))))
    once = points.given["byte_s"]
    ways: tuple[tuple[str, Mapping[str, float]], ...] = (
        ("one reading, as shipped", points.given),
        ("fitted", {}),
        ("nothing", {"byte_s": 0.0}),
    )
    charges = tuple(_charge(name, replace(points, given=given), once) for name, given in ways)
    added_s, predicted_s, whole_s = _increments(points, shipped)
    return OverPast(
        charges=charges,
        num_increments=len(added_s),
        increment=float(np.median(predicted_s / added_s)),
        increment_mape=float((np.abs(predicted_s - added_s) / whole_s).mean()),
    )


def _charge(name: str, points: Points, once: float) -> KvCharge:
    found = fit_points(points)
    past = points.sizes["past_tokens"][found.judges] > 0
    errors = found.predicted[past] / points.seconds[found.judges][past] - 1.0
    return KvCharge(
        charge=name,
        num_points=int(past.sum()),
        mape=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        readings=max(piece[_BYTE] for piece in found.pieces) / once,
    )


def _increments(points: Points, shipped: Fit) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the seconds that a past of 512 tokens or more adds, measured and predicted, and the whole chunk's time."""
    tokens, past = points.sizes["tokens"], points.sizes["past_tokens"]
    twins = {size: row for row, size in enumerate(tokens.tolist()) if past[row] == 0}
    rows = [row for row, size in enumerate(tokens.tolist()) if past[row] >= 512 and size in twins]
    at = [twins[tokens[row]] for row in rows]
    names = ("flops", "num_bytes", "tokens", "heads")
    predicted = np.array(
        [shipped.seconds(**dict(zip(names, row[1:], strict=True))) for row in points.features.tolist()]
    )
    seconds = points.seconds
    added = seconds[rows] - seconds[at]
    clear = added > 0
    return added[clear], (predicted[rows] - predicted[at])[clear], seconds[rows][clear]


_MODEL = "meta-llama/Llama-2-70b-hf"
_ATTENTION = (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION)

Rows = Iterable[Sequence[object]]
Results = Mapping[str, FittedProfile]


def profile_tables(
    results: Results, engines: Sequence[Measurements], past: OverPast | None = None
) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Yield name, headings and rows of every table."""
    yield "profiles errors", _ERRORS, _errors(results)
    yield "profiles cache", ("GPU", "for", "rows left out", "share of the serving range"), _cache_served(results)
    yield "profiles few heads", _FEW_HEADS, _few_heads(results)
    if past is not None:
        headings = ("KV is charged", "points", "MAPE", "bias", "readings at the nominal bandwidth")
        yield (
            "profiles past",
            headings,
            ((c.charge, c.num_points, _percent(c.mape), f"{c.bias:+.1%}", f"{c.readings:.2g}") for c in past.charges),
        )
        yield (
            "profiles past increments",
            ("median predicted / measured", "chunks", "mean error of the chunk's time"),
            [(f"{past.increment:.2f}", past.num_increments, _percent(past.increment_mape))],
        )
    yield "profiles other sources", _OTHERS, _other_sources(results)
    yield "profiles by shape", _SHAPES, _by_shape(results)
    yield "profiles by region", ("GPU", "operator", "region", "points", "MAPE", "bias"), _by_region(results)
    yield "profiles notes", ("GPU", "kind", "note"), _notes(results)
    ops = [op for op in Op if any(fit.op is op for result in results.values() for fit in result.profile.fits)]
    yield (
        "profiles used errors",
        ("GPU", *ops),
        ((gpu, *(_percent(_errors_by_op(result.profile).get(op)) for op in ops)) for gpu, result in results.items()),
    )
    times, impossible = engine_times(engines, {gpu: result.profile for gpu, result in results.items()}, _MODEL)
    if times:
        yield from _engine_tables(times, impossible)


_ERRORS = (
    "GPU",
    "operator",
    "points fitted",
    "n in the serving range",
    "MAPE",
    "one piece",
    "bar",
    "fits that keep it",
)


def _errors(results: Results) -> Rows:
    for gpu, result in results.items():
        report = result.report
        for op in dict.fromkeys(r.op for r in report.ops):
            mine = [r for r in report.ops if r.op is op]
            missed = [r for r in mine if not r.meets_bar]
            bar = mine[0].bar
            yield (
                gpu, op, sum(r.served.num_fitted for r in mine), sum(r.served.serving.num_points for r in mine),
                _percent(report.held_out_mape(op)), _percent(report.held_out_mape(op, one_piece=True)),
                _percent(bar), "" if bar is None else f"{len(mine) - len(missed)} of {len(mine)}",
            )  # fmt: skip


_OTHERS = ("GPU", "operator", "for", "measured by", "n", "MAPE", "median", "bias")


def _other_sources(results: Results) -> Rows:
    return (
        (
            gpu, other.op, _scope(other.scope), other.origin, other.serving.num_points,
            _percent(other.serving.mape), _percent(other.serving.median), f"{other.serving.bias:+.1%}",
        )
        for gpu, result in results.items()
        for other in result.report.other_sources
        if other.op not in _ATTENTION or other.scope.queries_per_group in (None, 1, 8)
    )  # fmt: skip


def _cache_served(results: Results) -> Rows:
    return (
        (gpu, _scope(r.scope), rows.num_rows, _percent(rows.serving_share))
        for gpu, result in results.items()
        for r in result.report.ops
        if r.op is Op.DECODE_ATTENTION and r.scope.queries_per_group is None
        for rows in r.left_out
        if rows.reason.startswith("KV under")
    )


_SMALL = f"batch < {SMALL_BATCH}"
_FEW_HEADS = ("GPU", "operator", "n", "MAPE", "bias", f"n of {_SMALL}", f"MAPE at {_SMALL}")


def _few_heads(results: Results) -> Rows:
    """Return rows by GPU and operator, over all fits."""
    for gpu, result in results.items():
        for op in _ATTENTION:
            mine = [few for few in result.report.few_heads if few.op is op]
            if mine:
                every, small = [few.serving for few in mine], [few.small_batch for few in mine]
                count = sum(stats.num_points for stats in every)
                bias = sum(stats.bias * stats.num_points for stats in every) / count
                yield (
                    gpu, op, count, _percent(mean_mape(every)), f"{bias:+.1%}",
                    sum(stats.num_points for stats in small), _percent(mean_mape(small)),
                )  # fmt: skip


_SHAPES = (
    *("GPU", "operator", "for", "pieces", "fitted", "n"),
    *("MAPE", "median", "p95", "bias", "one piece", "all held out"),
)


def _by_shape(results: Results) -> Rows:
    return (
        (
            gpu, r.op, _scope(r.scope), r.num_pieces, r.num_fitted, r.serving.num_points, _percent(r.serving.mape),
            _percent(r.serving.median), _percent(r.serving.p95), f"{r.serving.bias:+.1%}",
            _percent(r.one_piece.mape), f"{r.held_out.num_points}: {_percent(r.held_out.mape)}",
        )
        for gpu, result in results.items()
        for r in result.report.ops
    )  # fmt: skip


def _notes(results: Results) -> Rows:
    """Return what was left out or modelled, and where a fit misses its bar."""
    for gpu, result in results.items():
        report = result.report
        for r in report.ops:
            if r.remark:
                kind = f"Misses {_percent(r.bar)}"
                yield gpu, kind, f"{r.op}, {_scope(r.scope)} ({_percent(r.serving.mape)}): {r.remark}"
        for op, origin in dict.fromkeys((r.op, r.origin) for r in report.ops):
            yield gpu, "From", f"{op}: {origin}"
        left_out: dict[tuple[Op, str], int] = {}
        for r in report.ops:
            if r.scope.queries_per_group is None:
                for rows in r.left_out:
                    left_out[r.op, rows.reason] = left_out.get((r.op, rows.reason), 0) + rows.num_rows
        for (op, reason), count in left_out.items():
            yield gpu, "Left out", f"{op}: {count:,} rows: {reason}"
        for op, note in dict.fromkeys((r.op, note) for r in report.ops for note in r.notes):
            yield gpu, "Note", f"{op}: {note}"
        for u in report.unfitted:
            yield gpu, "Not fitted", f"{u.op}: {u.origin} ({u.num_rows:,} rows): {u.reason}"
        measured = {r.op for r in report.ops}
        for fit in result.profile.fits:
            if fit.provenance.source is Source.MODELLED:
                kind = "Modelled for all other shapes" if fit.op in measured else "Modelled"
                error = _percent(fit.provenance.held_out_mape) or "not known"
                yield gpu, kind, f"{fit.op}{_of(fit.scope)}: expected error {error}"


def _by_region(results: Results) -> Rows:
    """Return rows by region over all scopes of operators with more than one region, every point by its fit."""
    for gpu, result in results.items():
        for op, cells in result.report.to_data()["by_region"].items():
            if len(cells) > 1:
                for name, c in cells.items():
                    yield gpu, op, name, c["num_points"], _percent(c["mape"]), f"{c['bias']:+.1%}"


def _engine_tables(
    times: Sequence[EngineTime], impossible: Sequence[EngineTime]
) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Yield Splitwise's end-to-end table compared with the profiles."""
    groups = list(dict.fromkeys((t.gpu, t.tp, t.phase) for t in times))
    rows = []
    for gpu, tp, phase in groups:
        mine = [t for t in times if (t.gpu, t.tp, t.phase) == (gpu, tp, phase)]
        mape, bias = mean_error(mine)
        low, high = min(mine, key=lambda t: t.error), max(mine, key=lambda t: t.error)
        rows.append((gpu, tp, phase, len(mine), _percent(mape), f"{bias:+.1%}", _case(low), _case(high)))
    headings = ("GPU", "TP", "phase", "points", "MAPE", "bias", "most too fast", "most too slow")
    yield "profiles engine", headings, rows
    failed = [(t.gpu, t.tp, t.batch, t.prompt_tokens) for t in impossible if t.phase == "prompt"]
    yield "profiles engine impossible", ("GPU", "TP", "batch", "prompt"), failed
    shown = [t for t in times if t.output_tokens == 128 and (t.prompt_tokens == 512 or t.batch == 1)]
    for phase in ("prompt", "token"):
        cases = sorted({(t.batch, t.prompt_tokens) for t in shown if t.phase == phase})
        found = {(t.gpu, t.tp, t.batch, t.prompt_tokens): t for t in shown if t.phase == phase}
        machines = list(dict.fromkeys((t.gpu, t.tp) for t in shown))
        yield (
            f"profiles engine {phase}s",
            ("batch", "prompt", *(f"{gpu.split('-')[0]} TP {tp}" for gpu, tp in machines)),
            [(b, p, *(_pair(found.get((gpu, tp, b, p))) for gpu, tp in machines)) for b, p in cases],
        )
    missing = []
    for gpu, tp, phase in groups:
        if phase == "token":
            gaps = sorted(
                1e3 * (t.measured_s - t.predicted_s) for t in times if (t.gpu, t.tp, t.phase) == (gpu, tp, phase)
            )
            cells = (gaps[len(gaps) // 10], gaps[len(gaps) // 2], gaps[-1 - len(gaps) // 10])
            missing.append((gpu, tp, *(f"{gap:.1f}" for gap in cells)))
    yield "profiles engine missing", ("GPU", "TP", "least tenth", "median", "most tenth"), missing


def _case(time: EngineTime) -> str:
    return f"{time.error:+.0%} (batch {time.batch}, prompt {time.prompt_tokens})"


def _pair(time: EngineTime | None) -> str:
    return "" if time is None else f"{1e3 * time.measured_s:.0f} / {1e3 * time.predicted_s:.0f}"


def _scope(scope: FitScope) -> str:
    parts = []
    if scope.head_dim is not None:
        parts.append(f"head {scope.head_dim}")
        parts.append("any" if scope.queries_per_group is None else f"{scope.queries_per_group} per KV head")
    if scope.tp is not None:
        parts.append(f"{scope.tp} GPUs")
    if scope.weight_bytes is not None:
        parts.append(f"{8 * scope.weight_bytes:g}-bit weights")
    return ", ".join(parts) or "any"


def _of(scope: FitScope) -> str:
    return "" if scope == FitScope() else f" ({_scope(scope)})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _errors_by_op(profile: Profile) -> Mapping[Op, float]:
    """Return the mean of the stated errors of each operator's fits, without modelled ones if there are others."""
    errors = {}
    for op in Op:
        fits = [fit for fit in profile.fits if fit.op is op]
        if fits := [fit for fit in fits if fit.provenance.source is not Source.MODELLED] or fits:
            errors[op] = fmean(map(stated_error, fits))
    return errors
