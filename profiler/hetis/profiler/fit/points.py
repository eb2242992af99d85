"""Measured tables to points: the features that the cost model hands to a fit (docs/cost-model.md), and seconds.

Absolute units: FLOPs, bytes, tokens, query heads, nominal seconds on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hetis.formats.measurements import MeasuredOp, Measurements, Table
from hetis.profiler.work import FloatArray, roofline_seconds, work_of
from hetis.solver.cluster import GpuType
from hetis.solver.profile import FitScope, Op

# Last-level caches. A kernel that is called over and over reads from it what serving reads from memory, as all weights
# and the KV of all other layers pass between two calls.
CACHE_BYTES = {
    "A100-PCIe-40GB": 40e6,
    "A100-SXM-40GB": 40e6,
    "A100-PCIe-80GB": 40e6,
    "A100-SXM-80GB": 40e6,
    "A40": 6e6,
    "RTX-A6000": 6e6,
    "H100-PCIe-80GB": 50e6,
    "H100-SXM-80GB": 50e6,
    "H200-SXM-141GB": 50e6,
    "L4": 48e6,
    "L40": 96e6,
    "L40S": 96e6,
}
MIN_POINTS = 60  # of a head shape that is fitted alone; the others share a fit by head size
MIN_HEADS = 4  # query heads of a rank: one sequence of fewer leaves most of the GPU idle, and no served rank has fewer
_LAUNCH_S = 2e-6  # a KV read in less is hidden by the launch, whether from cache or memory
MAX_BANDWIDTH = 1.1  # of the nominal peaks; rows above were served by a cache, or their time is wrong
MAX_IMPOSSIBLE = 0.05  # of the rows that no cache can have served; a table with more is not fitted

FEATURES = {
    Op.DENSE: ("fixed_s", "flop_s", "byte_s"),
    Op.PREFILL_ATTENTION: ("fixed_s", "flop_s", "token_s"),
    Op.DECODE_ATTENTION: ("fixed_s", "byte_s", "head_s"),
    Op.ALL_REDUCE: ("fixed_s", "wire"),
    Op.TRANSFER: ("fixed_s", "wire"),
    Op.STEP: ("fixed_s", "token_s"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Points of one operator and scope.

    Attributes:
        features: shape [points, features], in the order of ``FEATURES[op]``.
        shapes: of each point, the name of the shape that is held out as a whole.
        sizes: of each point, the sizes that a region is stated in (`FitRegion`), each of shape [points].
        left_out: how many rows were left out, and why.
    """

    op: Op
    scope: FitScope
    features: FloatArray
    seconds: FloatArray
    shapes: Sequence[str]
    sizes: dict[str, FloatArray]
    origin: str
    left_out: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.seconds)

    def kept(self, keep: NDArray[np.bool_]) -> Points:
        """Only the points where ``keep``."""
        return Points(
            op=self.op,
            scope=self.scope,
            features=self.features[keep],
            seconds=self.seconds[keep],
            shapes=[shape for shape, kept in zip(self.shapes, keep, strict=True) if kept],
            sizes={name: size[keep] for name, size in self.sizes.items()},
            origin=self.origin,
            left_out=self.left_out,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfitted:
    """A table that no fit is made of, and why."""

    op: Op
    origin: str
    num_rows: int
    reason: str


@dataclass(slots=True)
class Selection:
    """What the measurements of one GPU give: points by operator and scope, and the tables that are not fitted."""

    points: list[Points] = field(default_factory=list)
    unfitted: list[Unfitted] = field(default_factory=list)


def attention_points(measurements: Sequence[Measurements], gpu: GpuType, into: Selection) -> None:
    """Decode and prefill attention by (head_dim, queries per group), from the first source that is possible at all."""
    doubted = set[str]()
    for measured, op in (
        (MeasuredOp.DECODE_ATTENTION, Op.DECODE_ATTENTION),
        (MeasuredOp.PREFILL_ATTENTION, Op.PREFILL_ATTENTION),
    ):
        taken = ""
        for origin, table in tables_of(measurements, measured):
            reason = _impossible(table, gpu) or (f"{taken} was measured too, and comes first" if taken else "")
            tool = origin.split(",")[0]
            if not reason and tool in doubted:
                reason = f"the decode attention of {tool} is impossible, so its prefill is not trusted either"
            elif reason and not taken:
                doubted.add(tool)
            if reason:
                into.unfitted.append(Unfitted(op=op, origin=origin, num_rows=len(table), reason=reason))
                continue
            taken = origin
            make = _decode if op is Op.DECODE_ATTENTION else _prefill
            into.points += make(table, gpu, origin)


def link_points(measurements: Sequence[Measurements], gpu: GpuType, into: Selection) -> None:
    """All-reduce by number of GPUs, the fastest library at each size; transfers between two GPUs."""
    link = gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s
    for measurement in measurements:
        found = [table for table in measurement.tables if table.op is MeasuredOp.ALL_REDUCE]
        if found:
            fastest: dict[tuple[float, float], float] = {}
            for table in found:
                columns = (table.numbers(name).tolist() for name in ("num_gpus", "num_bytes", "seconds"))
                for n, num_bytes, seconds in zip(*columns, strict=True):
                    fastest[n, num_bytes] = min(seconds, fastest.get((n, num_bytes), seconds))
            origin = f"{measurement.provenance}, the fastest of {', '.join(sorted({t.kernel for t in found}))}"
            into.points += _all_reduce(fastest, link, origin)
            break
    for path in ("peer", "loopback"):
        for origin, table in tables_of(measurements, MeasuredOp.TRANSFER):
            mine = np.array([text == path for text in table.text("path")])
            if not mine.any():
                continue
            num_bytes, seconds = table.numbers("num_bytes")[mine], table.seconds[mine]
            wire_s = num_bytes / link
            if (wire_s > MAX_BANDWIDTH * seconds).mean() > MAX_IMPOSSIBLE:
                reason = f"faster than the {link / 1e9:.0f} GB/s that the catalogue knows: a bridge it does not list"
                into.unfitted.append(Unfitted(op=Op.TRANSFER, origin=origin, num_rows=len(seconds), reason=reason))
                continue
            into.points.append(
                Points(
                    op=Op.TRANSFER,
                    scope=FitScope(),
                    features=np.stack([np.ones(len(seconds)), wire_s], axis=1),
                    seconds=seconds,
                    shapes=["one"] * len(seconds),
                    sizes={"num_bytes": num_bytes},
                    origin=f"{origin}, {path}",
                )
            )
            return


def step_points(measurements: Sequence[Measurements], into: Selection) -> None:
    """What an engine adds per iteration."""
    for origin, table in tables_of(measurements, MeasuredOp.STEP):
        tokens = table.numbers("tokens")
        into.points.append(
            Points(
                op=Op.STEP,
                scope=FitScope(),
                features=np.stack([np.ones(len(table)), tokens], axis=1),
                seconds=table.seconds,
                shapes=["one"] * len(table),
                sizes={"tokens": tokens, "batch": table.numbers("batch")},
                origin=origin,
            )
        )
        return


def tables_of(measurements: Sequence[Measurements], op: MeasuredOp) -> Iterator[tuple[str, Table]]:
    """Every table of ``op`` and where it is from."""
    for measurement in measurements:
        for table in measurement.tables:
            if table.op is op:
                kernel = f", {table.kernel}" if table.kernel else ""
                yield f"{measurement.provenance}{kernel}", table


def _impossible(table: Table, gpu: GpuType) -> str:
    """Why no fit is made of an attention table; empty when it may be."""
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


def _decode(table: Table, gpu: GpuType, origin: str) -> Iterator[Points]:
    """Contexts from 128 tokens; rows that a cache can have served are left out (`CACHE_BYTES`)."""
    work = work_of(table)
    assert work is not None
    batch, context, heads = (table.numbers(name) for name in ("batch", "context_tokens", "query_heads"))
    features = np.stack([np.ones(len(table)), work.num_bytes, batch * heads], axis=1)
    cache = 0.0 if table.cold else CACHE_BYTES.get(gpu.name, 0.0)
    warm = (work.num_bytes < 2 * cache) & (work.num_bytes > _LAUNCH_S * gpu.mem_bytes_per_s)
    usable = context >= 128
    reason = f"KV under twice the cache ({cache / 1e6:.0f} MB) and above {_LAUNCH_S * 1e6:g} us of the bus"
    sizes = {"batch": batch, "context_tokens": context}
    return _by_head_shape(table, Op.DECODE_ATTENTION, features, usable, warm, reason, sizes, origin)


def _prefill(table: Table, gpu: GpuType, origin: str) -> Iterator[Points]:
    """Chunks of 64 tokens or more, over any past.

    KV bytes are no feature. The published tables have no past, where KV bytes are proportional to tokens: what queries
    and outputs cost would be charged to the KV of a chunk's past, which is far longer. The past costs its FLOPs.
    """
    work = work_of(table)
    assert work is not None
    batch, tokens = table.numbers("batch"), table.numbers("tokens")
    features = np.stack([np.ones(len(table)), work.flops, batch * tokens], axis=1)
    sizes = {"batch": batch, "tokens": tokens, "context_tokens": table.numbers("past_tokens") + tokens}
    none = np.zeros(len(table), dtype=np.bool_)
    return _by_head_shape(table, Op.PREFILL_ATTENTION, features, tokens >= 64, none, "", sizes, origin)


def _by_head_shape(
    table: Table, op: Op, features: FloatArray, usable: NDArray[np.bool_], warm: NDArray[np.bool_], reason: str,
    sizes: dict[str, FloatArray], origin: str,
) -> Iterator[Points]:  # fmt: skip
    """One set for each (head_dim, queries per group) with enough points, and one of all shapes of a head_dim."""
    heads, groups, head_dim = (table.numbers(name) for name in ("query_heads", "kv_heads", "head_dim"))
    queries = heads / groups
    few = heads < min(MIN_HEADS, heads.max())
    shapes = np.array([f"{h:.0f}/{g:.0f}" for h, g in zip(heads, groups, strict=True)])
    for dim in sorted(set(head_dim.tolist())):
        per_groups = sorted(set(queries[head_dim == dim].tolist()))
        # One shape alone says nothing of others: the roofline does.
        for per_group in [None, *per_groups] if len(per_groups) > 1 else per_groups:
            mine = (head_dim == dim) & usable & (True if per_group is None else queries == per_group)
            keep = mine & ~warm & ~few
            if per_group is not None and not float(per_group).is_integer():
                continue
            alone = per_group is not None and len(per_groups) > 1
            if keep.sum() < (MIN_POINTS if alone else 2 * features.shape[1]):
                continue
            counts = [(int((mine & warm & ~few).sum()), reason), (int((mine & few).sum()), _FEW)]
            yield Points(
                op=op,
                scope=FitScope(head_dim=int(dim), queries_per_group=None if per_group is None else int(per_group)),
                features=features[keep],
                seconds=table.seconds[keep],
                shapes=shapes[keep].tolist(),
                sizes={name: size[keep] for name, size in sizes.items()},
                origin=origin,
                left_out=tuple((count, why) for count, why in counts if count),
            )


_FEW = f"fewer than {MIN_HEADS} query heads on the rank: no served rank has so few, and they leave most of the GPU idle"


def _all_reduce(fastest: dict[tuple[float, float], float], link: float, origin: str) -> Iterator[Points]:
    """8 KiB to 256 MiB, by number of GPUs."""
    for count in sorted({n for n, _ in fastest}):
        rows = sorted((b, s) for (n, b), s in fastest.items() if n == count and 8192 <= b <= 2**28)
        if len(rows) < 4:
            continue
        num_bytes, seconds = (np.array(column) for column in zip(*rows, strict=True))
        wire_s = 2.0 * (count - 1) / count * num_bytes / link
        yield Points(
            op=Op.ALL_REDUCE,
            scope=FitScope(tp=int(count)),
            features=np.stack([np.ones(len(rows)), wire_s], axis=1),
            seconds=seconds,
            shapes=["one"] * len(rows),
            sizes={"num_bytes": num_bytes},
            origin=origin,
        )
