"""Points of all-reduces, transfers, and the time that an engine adds per iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from hetis.formats.measurements import MeasuredOp, Measurements
from hetis.profiler.fit.points import MAX_BANDWIDTH, MAX_IMPOSSIBLE, FitPoints, Points, Unfitted, tables_of
from hetis.profiler.fitting import FloatArray
from hetis.solver.cluster import GpuType
from hetis.solver.profile import FitScope, Op


def link_points(measurements: Sequence[Measurements], gpu: GpuType, into: FitPoints) -> None:
    """Add all-reduces by number of GPUs, with the fastest library at each size, and transfers between two GPUs."""
    link = gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s
    measured = ([table for table in one.tables if table.op is MeasuredOp.ALL_REDUCE] for one in measurements)
    tables = [(one, found) for one, found in zip(measurements, measured, strict=True) if found]
    for number, (measurement, found) in enumerate(tables):
        fastest: dict[tuple[float, float], float] = {}
        for table in found:
            columns = (table.numbers(name).tolist() for name in ("num_gpus", "num_bytes", "seconds"))
            for n, num_bytes, seconds in zip(*columns, strict=True):
                fastest[n, num_bytes] = min(seconds, fastest.get((n, num_bytes), seconds))
        origin = f"{measurement.provenance}, the fastest of {', '.join(sorted({t.kernel for t in found}))}"
        every = list(_all_reduce(fastest, link, origin))
        bridged = [points for points in every if _is_beyond(points.features[:, 1], points.seconds)]
        for points in bridged:
            into.unfitted.append(_bridged(points.op, f"{origin}, {points.scope.tp} GPUs", len(points), link))
        notes = (_ALSO_BRIDGED,) if bridged else ()
        beyond = {points.scope for points in bridged}
        chosen = into.others if number else into.points
        chosen += [replace(points, notes=notes) for points in every if points.scope not in beyond]
    _add_transfers(measurements, link, into)


def _add_transfers(measurements: Sequence[Measurements], link: float, into: FitPoints) -> None:
    """Add the transfers of the first table that the link allows, between two GPUs rather than on one."""
    for path in ("peer", "loopback"):
        for origin, table in tables_of(measurements, MeasuredOp.TRANSFER):
            mine = np.array([text == path for text in table.text("path")])
            if not mine.any():
                continue
            num_bytes, seconds = table.numbers("num_bytes")[mine], table.seconds[mine]
            wire_s = num_bytes / link
            if _is_beyond(wire_s, seconds):
                into.unfitted.append(_bridged(Op.TRANSFER, origin, len(seconds), link))
                continue
            into.points.append(_points(Op.TRANSFER, FitScope(), wire_s, num_bytes, seconds, f"{origin}, {path}"))
            return


def step_points(measurements: Sequence[Measurements], into: FitPoints) -> None:
    """Add the time that an engine adds per iteration."""
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


_ALSO_BRIDGED = (
    "measured on a host with bridges between some of its GPUs, which the larger rings fitted here cross too: on a host "
    "without them they may be slower"
)


def _is_beyond(wire_s: FloatArray, seconds: FloatArray) -> bool:
    """Return whether more than a few messages were faster than the nominal link."""
    return bool((wire_s > MAX_BANDWIDTH * seconds).mean() > MAX_IMPOSSIBLE)


def _bridged(op: Op, origin: str, num_rows: int, link: float) -> Unfitted:
    reason = f"faster than the {link / 1e9:.0f} GB/s that the catalogue knows: a bridge it does not list"
    return Unfitted(op=op, origin=origin, num_rows=num_rows, reason=reason)


def _all_reduce(fastest: dict[tuple[float, float], float], link: float, origin: str) -> Iterator[Points]:
    """Yield points from 8 KiB to 256 MiB, by number of GPUs."""
    for count in sorted({n for n, _ in fastest}):
        rows = sorted((b, s) for (n, b), s in fastest.items() if n == count and 8192 <= b <= 2**28)
        if len(rows) < 4:
            continue
        num_bytes, seconds = (np.array(column) for column in zip(*rows, strict=True))
        wire_s = 2.0 * (count - 1) / count * num_bytes / link
        scope = FitScope(tp=int(count))
        yield _points(Op.ALL_REDUCE, scope, wire_s, num_bytes, seconds, origin)


def _points(
    op: Op, scope: FitScope, wire_s: FloatArray, num_bytes: FloatArray, seconds: FloatArray, origin: str
) -> Points:
    return Points(
        op=op,
        scope=scope,
        features=np.stack([np.ones(len(seconds)), wire_s], axis=1),
        seconds=seconds,
        shapes=["one"] * len(seconds),
        sizes={"num_bytes": num_bytes},
        origin=origin,
    )
