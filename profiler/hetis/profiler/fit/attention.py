"""Decode and prefill attention: selects the rows that a fit may see, by head shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hetis.formats.measurements import MeasuredOp, Measurements, Table
from hetis.profiler.fit.errors import SERVING, within
from hetis.profiler.fit.points import (
    CACHE_BYTES,
    MAX_BANDWIDTH,
    MAX_IMPOSSIBLE,
    FitPoints,
    LeftOut,
    MixedRows,
    Points,
    Unfitted,
    tables_of,
    unfitted_mixed,
    unknown_cache,
)
from hetis.profiler.fitting import FloatArray, rounded
from hetis.profiler.plausibility import roofline_seconds, work_of
from hetis.solver.cluster import GpuType
from hetis.solver.profile import FitScope, Op

MIN_POINTS = 60  # least points of a head shape with its own fit; others share a fit by head size
MIN_HEADS = 4  # query heads per rank: one sequence of fewer leaves most of the GPU idle
_LATER = " was measured too, and comes first"
LAUNCH_S = 2e-6  # the launch hides reading less KV than this, whether from cache or memory


def attention_points(measurements: Sequence[Measurements], gpu: GpuType, into: FitPoints) -> None:
    """Add decode and prefill attention by (head_dim, queries per group), from the first physically possible source, and
    the mixed batches of the kernel whose decode attention that is.
    """
    doubted, fitted = set[str](), dict[Op, Table]()
    for measured, op in (
        (MeasuredOp.DECODE_ATTENTION, Op.DECODE_ATTENTION),
        (MeasuredOp.PREFILL_ATTENTION, Op.PREFILL_ATTENTION),
    ):
        taken = ""
        for origin, table in _largest_first(measurements, measured):
            reason = _impossible(table, gpu) or (f"{taken}{_LATER}" if taken else "")
            tool = origin.split(",")[0]
            if not reason and tool in doubted:
                reason = f"the decode attention of {tool} is impossible, so its prefill is not trusted either"
            elif reason and not taken:
                doubted.add(tool)
            make = decode_points if op is Op.DECODE_ATTENTION else prefill_points
            if reason:
                if reason.endswith(_LATER):
                    into.others += make(table, gpu, origin)
                into.unfitted.append(Unfitted(op=op, origin=origin, num_rows=len(table), reason=reason))
                continue
            taken = origin
            fitted[op] = table
            into.points += make(table, gpu, origin)
    _add_mixed(measurements, fitted.get(Op.DECODE_ATTENTION), gpu, into)


def _add_mixed(measurements: Sequence[Measurements], decode: Table | None, gpu: GpuType, into: FitPoints) -> None:
    """Add the mixed batches of the source and kernel that measured ``decode``, the table that is fitted."""
    for measurement in measurements:
        for origin, table in _largest_first([measurement], MeasuredOp.MIXED_ATTENTION):
            reason = _impossible(table, gpu)
            if decode is None or decode not in measurement.tables or decode.kernel != table.kernel:
                reason = reason or "the decode attention of their source and kernel is not fitted"
            elif into.mixed is not None:
                reason = reason or f"{into.mixed.origin}{_LATER}"
            if decode is None or reason:
                into.unfitted.append(unfitted_mixed(origin, len(table), reason))
                continue
            prefill = (one for one in measurement.tables if one.op is MeasuredOp.PREFILL_ATTENTION)
            alone = tuple(one for one in prefill if one.kernel == table.kernel)
            into.mixed = MixedRows(origin=origin, table=table, decode=decode, prefill=alone)


def _largest_first(measurements: Sequence[Measurements], op: MeasuredOp) -> Iterator[tuple[str, Table]]:
    """Yield tables in the order of their sources and, within a source, by decreasing number of rows.

    An engine has kernels for corner cases besides the one that serves. For a B200's prefill, for example, a decode
    kernel has a thousand rows, which come before the twelve thousand of the prefill kernel.
    """
    for measurement in measurements:
        yield from sorted(tables_of([measurement], op), key=lambda found: -len(found[1]))


def _impossible(table: Table, gpu: GpuType) -> str:
    """Return why an attention table must not be fitted, or an empty string if it may be."""
    least, work = roofline_seconds(table, gpu), work_of(table)
    assert least is not None
    assert work is not None
    peaks = least / table.seconds
    beyond_cache = work.num_bytes > 2 * CACHE_BYTES.get(gpu.name, 0.0)
    large = peaks[beyond_cache]
    share = float((large > MAX_BANDWIDTH).mean()) if len(large) else 0.0
    if share <= MAX_IMPOSSIBLE:
        return ""
    return (
        f"{share:.0%} of the {len(large)} rows whose KV is twice the cache or more imply more than {MAX_BANDWIDTH:g} "
        f"times the peaks of {gpu.name} (median {np.median(large):.1f} times, most {large.max():.0f} times)"
    )


def decode_points(table: Table, gpu: GpuType, origin: str) -> Iterator[Points]:
    """Yield points with contexts from 128 tokens, without rows that a cache may have served (`CACHE_BYTES`)."""
    work = work_of(table)
    assert work is not None
    batch, context = table.numbers("batch"), table.numbers("context_tokens")
    cache = CACHE_BYTES.get(gpu.name, 0.0)
    reason = f"KV under twice the cache ({cache / 1e6:.0f} MB) and above {LAUNCH_S * 1e6:g} us of the bus"
    sizes = {"batch": batch, "context_tokens": context, "kv_bytes": work.num_bytes}
    yield from _by_head_shape(
        table,
        Op.DECODE_ATTENTION,
        decode_features(table),
        sizes,
        usable=context >= 128,
        warm=may_be_cached(table, gpu),
        reason=reason,
        origin=origin,
        notes=unknown_cache(table, gpu),
    )


def decode_features(table: Table) -> FloatArray:
    """Return the features of decode attention, shape [rows, features]."""
    work = work_of(table)
    assert work is not None
    return np.stack(
        [np.ones(len(table)), work.num_bytes, table.numbers("batch") * table.numbers("query_heads")], axis=1
    )


def may_be_cached(table: Table, gpu: GpuType) -> NDArray[np.bool_]:
    """Return a mask of the rows of decode attention whose KV a cache may have served, in more time than a launch."""
    work = work_of(table)
    assert work is not None
    cache = 0.0 if table.cold else CACHE_BYTES.get(gpu.name, 0.0)
    return (work.num_bytes < 2 * cache) & (work.num_bytes > LAUNCH_S * gpu.mem_bytes_per_s)


def prefill_points(table: Table, gpu: GpuType, origin: str) -> Iterator[Points]:
    """Yield points for chunks of 64 tokens or more, over any past.

    The KV of a chunk and of its past is charged one read at the nominal bandwidth, which is not fitted. The published
    tables have no past, so KV bytes are proportional to tokens: a fit would charge them the cost of queries and outputs
    (3 to 40 reads), and charge the same to a past, which is far longer than its chunk. On vidur's chunks over a past,
    which distinguish the two, the fit takes no more than one read (docs/accuracy.md).
    """
    work = work_of(table)
    assert work is not None
    batch, tokens, past = (table.numbers(name) for name in ("batch", "tokens", "past_tokens"))
    sizes = {
        "batch": batch,
        "tokens": tokens,
        "past_tokens": past,
        "context_tokens": past + tokens,
        "kv_bytes": work.num_bytes,
    }
    yield from _by_head_shape(
        table,
        Op.PREFILL_ATTENTION,
        prefill_features(table),
        sizes,
        usable=tokens >= 64,
        warm=np.zeros(len(table), dtype=np.bool_),
        reason="",
        origin=origin,
        given={"byte_s": 1.0 / gpu.mem_bytes_per_s},
    )


def prefill_features(table: Table) -> FloatArray:
    """Return the features of prefill attention, shape [rows, features]."""
    work = work_of(table)
    assert work is not None
    tokens = table.numbers("batch") * table.numbers("tokens")
    columns = [np.ones(len(table)), work.flops, work.num_bytes, tokens, tokens * table.numbers("query_heads")]
    return np.stack(columns, axis=1)


def _by_head_shape(
    table: Table, op: Op, features: FloatArray, sizes: Mapping[str, FloatArray], *, usable: NDArray[np.bool_],
    warm: NDArray[np.bool_], reason: str, origin: str, given: Mapping[str, float] | None = None,
    notes: tuple[str, ...] = (),
) -> Iterator[Points]:  # fmt: skip
    """Yield one set for each (head_dim, queries per group) with enough points, and one for all shapes of a head_dim."""
    heads, groups, head_dim = (table.numbers(name) for name in ("query_heads", "kv_heads", "head_dim"))
    queries = heads / groups
    few = heads < min(MIN_HEADS, heads.max())
    shapes = np.array([f"{h:.0f}/{g:.0f}" for h, g in zip(heads, groups, strict=True)])
    serving = within(SERVING[op], sizes, len(table))
    own = {
        (dim, q): FitScope(head_dim=int(dim), queries_per_group=int(q) if q.is_integer() else None)
        for dim, q in set(zip(head_dim.tolist(), queries.tolist(), strict=True))
    }
    scopes = [own[key] for key in zip(head_dim.tolist(), queries.tolist(), strict=True)]
    for dim in sorted(set(head_dim.tolist())):
        per_groups = sorted(set(queries[head_dim == dim].tolist()))
        # A single shape says nothing about others: the roofline does.
        for per_group in [None, *per_groups] if len(per_groups) > 1 else per_groups:
            mine = (head_dim == dim) & usable & (True if per_group is None else queries == per_group)
            keep = mine & ~warm & ~few
            if per_group is not None and not float(per_group).is_integer():
                continue
            alone = per_group is not None and len(per_groups) > 1
            scope = FitScope(head_dim=int(dim), queries_per_group=None if per_group is None else int(per_group))
            if keep.sum() < (MIN_POINTS if alone else 2 * features.shape[1]):
                continue
            served = max(1, int((mine & serving).sum()))
            left_out = [
                LeftOut(num_rows=int(rows.sum()), reason=why, serving_share=rounded((rows & serving).sum() / served))
                for rows, why in ((mine & warm & ~few, reason), (mine & few, _FEW))
            ]
            every = Points(
                op=op,
                scope=scope,
                features=features,
                seconds=table.seconds,
                shapes=shapes.tolist(),
                sizes=sizes,
                least=_above(sizes["kv_bytes"], hole=mine & warm & ~few, keep=keep),
                given=given or {},
                origin=origin,
                left_out=tuple(rows for rows in left_out if rows.num_rows),
                notes=notes,
                scopes=scopes,
            )
            unseen = every.kept(mine & few & ~warm)
            yield replace(every.kept(keep), few_heads=unseen if len(unseen) else None)


def _above(kv_bytes: FloatArray, *, hole: NDArray[np.bool_], keep: NDArray[np.bool_]) -> Mapping[str, float]:
    """Return the least KV kept that exceeds all of the ``hole``, or nothing without a hole, or nothing above it."""
    if not hole.any():
        return {}
    above = kv_bytes[keep & (kv_bytes > kv_bytes[hole].max())]
    return {"kv_bytes": float(above.min())} if len(above) else {}


_FEW = f"fewer than {MIN_HEADS} query heads on the rank: one sequence of them leaves most of the GPU idle"
