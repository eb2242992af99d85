"""The factor of decode attention beside a prefill chunk, from batches of which one kernel computes both parts.

Such a batch takes ``P + mu D`` seconds: those of its chunk alone, and mu times those of its decoding requests alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.formats.measurements import Table
from hetis.profiler.fit.attention import MIN_HEADS, decode_features, may_be_cached, prefill_features
from hetis.profiler.fit.errors import SERVING, ErrorStats, error_stats, within
from hetis.profiler.fit.pieces import split, whole
from hetis.profiler.fit.points import MIN_DISTINCT, MixedRows, Points, distinct, seconds_by
from hetis.profiler.fitting import FloatArray, rounded
from hetis.profiler.plausibility import parts_of
from hetis.solver.cluster import GpuType
from hetis.solver.profile import MOST_MIXED_FACTOR, Fit, FitScope, Mixed, Op, Provenance, Source

_HEADS = ("query_heads", "kv_heads", "head_dim")
_CHUNK, _DECODE = ("batch", "tokens", "past_tokens", *_HEADS), ("batch", "context_tokens", *_HEADS)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedReport:
    """The factor of one fit of decode attention, and errors in the serving range on points that it was not made from.

    ``summed`` are the errors of the sum of the two times, which is a factor of 1, on the same points.
    """

    scope: FitScope
    origin: str
    factor: float
    num_fitted: int
    held_out: ErrorStats
    summed: ErrorStats


def fit_mixed(fit: Fit, rows: MixedRows, fits: Sequence[Fit], gpu: GpuType) -> tuple[Mixed, MixedReport] | None:
    """Return the factor of a fit of decode attention, or None if too few batches have its head shape.

    It has the least mean absolute relative error. As in other fits, checksums choose the points that judge it.

    Args:
        fits: all fits of the profile, which predict what was not measured alone.
    """
    points = mixed_points(fit, rows, fits, gpu)
    if points is None or len(points) < MIN_DISTINCT:
        return None
    parts = split(points)
    shipped = parts.turns[0] if len(parts.turns) == 1 else whole(points)
    factor, predicted = _factor(points.kept(shipped.fitted)), np.zeros(len(points))
    for turn in parts.turns:
        judged = points.kept(turn.judged)
        predicted[turn.judged] = _seconds(judged, _factor(points.kept(turn.fitted)))
    judges = points.kept(parts.judged)
    report = MixedReport(
        scope=fit.scope,
        origin=rows.origin,
        factor=factor,
        num_fitted=int(shipped.fitted.sum()),
        held_out=error_stats(predicted[parts.judged], judges.seconds),
        summed=error_stats(_seconds(judges, 1.0), judges.seconds),
    )
    provenance = Provenance(source=Source.FITTED, origin=rows.origin, held_out_mape=report.held_out.mape)
    return Mixed(factor=factor, provenance=provenance), report


def mixed_points(fit: Fit, rows: MixedRows, fits: Sequence[Fit], gpu: GpuType) -> Points | None:
    """Return the batches in the serving range that have the head shape of ``fit``, or None if there are none.

    The features are the seconds of the chunk and of the decoding requests alone, both as the same kernel was measured
    or, where it was not, as ``fits`` and ``fit`` predict. Requests whose KV a cache may have served, and few query
    heads, are left out as in ``fit``.
    """
    _, decode = parts_of(rows.table)
    heads, groups, head_dim = (rows.table.numbers(name) for name in _HEADS)
    sizes = {name: rows.table.numbers(name) for name in ("batch", "context_tokens")}
    queries = fit.scope.queries_per_group
    keep = (head_dim == fit.scope.head_dim) & (True if queries is None else heads / groups == queries)
    keep &= within(SERVING[Op.DECODE_ATTENTION], sizes, len(decode)) & ~may_be_cached(decode, gpu)
    keep &= heads >= min(MIN_HEADS, rows.decode.numbers("query_heads").max())
    if not keep.any():
        return None
    table = replace(rows.table, columns={name: column[keep] for name, column in rows.table.columns.items()})
    chunk, decode = parts_of(table)
    chunk_s, decode_s = _measured(chunk, _CHUNK, rows.prefill), _measured(decode, _DECODE, [rows.decode])
    if (unknown := np.isnan(chunk_s)).any():
        chunk_s[unknown] = _predicted_chunk(chunk, fits)[unknown]
    if (unknown := np.isnan(decode_s)).any():
        decode_s[unknown] = seconds_by(fit, decode_features(decode))[unknown]
    named = zip(table.numbers("query_heads"), table.numbers("kv_heads"), strict=True)
    points = Points(
        op=Op.DECODE_ATTENTION,
        scope=fit.scope,
        features=np.stack([chunk_s, decode_s], axis=1),
        seconds=table.seconds,
        shapes=[f"{h:.0f}/{g:.0f}" for h, g in named],
        sizes={name: table.numbers(name) for name in ("batch", "context_tokens", "tokens", "past_tokens")},
        origin=rows.origin,
    )
    return distinct(points)


def _factor(points: Points) -> float:
    """Return the factor with the least mean absolute relative error: a weighted median of each point's own factor.

    ``|P + mu D - s| / s`` is ``D/s |mu - (s - P)/D|``, so the weights are ``D/s``.
    """
    chunk_s, decode_s = points.features.T
    own, weights = (points.seconds - chunk_s) / decode_s, decode_s / points.seconds
    order = np.lexsort((weights, own))
    reached = np.cumsum(weights[order])
    middle = own[order][np.searchsorted(reached, reached[-1] / 2)]
    return rounded(min(max(float(middle), 0.0), MOST_MIXED_FACTOR))


def _seconds(points: Points, factor: float) -> FloatArray:
    seconds: FloatArray = points.features[:, 0] + factor * points.features[:, 1]
    return seconds


def _measured(part: Table, names: Sequence[str], tables: Iterable[Table]) -> FloatArray:
    """Return the seconds of every row of ``part`` in ``tables``, the median if it is there repeatedly, or NaN."""
    known = defaultdict[tuple[float, ...], list[float]](list)
    for table in tables:
        for key, seconds in zip(_keys(table, names), table.seconds.tolist(), strict=True):
            known[key].append(seconds)
    medians = {key: float(np.median(seconds)) for key, seconds in known.items()}
    return np.array([medians.get(key, np.nan) for key in _keys(part, names)])


def _keys(table: Table, names: Sequence[str]) -> list[tuple[float, ...]]:
    return list(zip(*(table.numbers(name).tolist() for name in names), strict=True))


def _predicted_chunk(chunk: Table, fits: Sequence[Fit]) -> FloatArray:
    """Return the seconds of chunks by the fit of prefill attention for each head shape."""
    seconds, features = np.zeros(len(chunk)), prefill_features(chunk)
    dims = chunk.numbers("head_dim")
    queries = chunk.numbers("query_heads") / chunk.numbers("kv_heads")
    prefill = [fit for fit in fits if fit.op is Op.PREFILL_ATTENTION]
    for dim, per_group in sorted(set(zip(dims.tolist(), queries.tolist(), strict=True))):
        by_size = FitScope(head_dim=int(dim))
        own = replace(by_size, queries_per_group=int(per_group)) if per_group.is_integer() else by_size
        fit = next(fit for scope in (own, by_size, FitScope()) for fit in prefill if fit.scope == scope)
        mine = (dims == dim) & (queries == per_group)
        seconds[mine] = seconds_by(fit, features[mine])
    return seconds
