"""Detects times in a wrong unit: a factor of a thousand, found by comparison with the GPU's peaks.

For every table, the median over the quarter of its rows with the most work counts, because launches are negligible
there, and a few wrong rows do not move it. There the published tables reach 0.08 to 0.81 of the peaks, those served by
a cache up to 12 times the peaks; a host whose GPUs communicate over a slow network reaches a hundredth of its link.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hetis.formats.measurements import MeasuredOp, Measurements, Table
from hetis.profiler.roofline import matrix_flops
from hetis.profiler.work import FloatArray, roofline_seconds
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, Op, Profile

MOST_PEAKS = 20.0  # of the peak; upper limit for a table's median, whatever cache it is read from
LEAST_PEAKS = 0.02  # of the peaks of compute and memory
LEAST_LINK = 2e-3  # of the nominal link between GPUs; hosts that copy through their memory reach a thirtieth
STEP_SECONDS = (2e-5, 0.1)  # of the host, per iteration
PHASE_SECONDS = {"prompt": (2e-3, 100.0), "token": (2e-4, 2.0)}  # of whole engines
_LEAST_WORK_S = 2e-6  # at the peaks; below it the launch dominates the measurement
_LINKS = (MeasuredOp.ALL_REDUCE, MeasuredOp.TRANSFER)
_UNIT = "is the unit right?"


def doubts_of_units(measurements: Sequence[Measurements], gpu: GpuType) -> Iterator[str]:
    """Yield a sentence per table whose times are impossible on this GPU by a factor that looks like a wrong unit."""
    for measurement in measurements:
        for table in measurement.tables:
            if doubt := unit_doubt(table, gpu):
                yield f"{table.op} of {measurement.provenance}: {doubt}"


def unit_doubt(table: Table, gpu: GpuType) -> str:
    """Return why the times of ``table`` look as if in another unit, or an empty string if they may be right."""
    if table.op is MeasuredOp.STEP:
        return _outside(table.seconds, STEP_SECONDS, "steps of an engine")
    if table.op is MeasuredOp.E2E:
        phases = np.array(table.text("phase"))
        found = (
            _outside(table.seconds[phases == phase], limits, f"{phase} times")
            for phase, limits in PHASE_SECONDS.items()
            if (phases == phase).any()
        )
        return next((doubt for doubt in found if doubt), "")
    least_s = roofline_seconds(table, gpu)
    assert least_s is not None
    large = least_s >= _LEAST_WORK_S
    if not large.any():
        return ""
    large &= least_s >= np.quantile(least_s[large], 0.75)
    peaks = float(np.median(least_s[large] / table.seconds[large]))
    return _beyond(
        peaks, LEAST_LINK if table.op in _LINKS else LEAST_PEAKS, f"the {int(large.sum())} largest rows", gpu
    )


def implausible_fits(profile: Profile, gpu: GpuType) -> Iterator[tuple[Fit, str]]:
    """Yield fits whose time for much work is impossible on ``gpu`` by a factor like that of a wrong unit, and why."""
    for fit in profile.fits:
        if fit.op in (Op.STEP, Op.SAMPLE):
            seconds = np.array([fit.seconds(tokens=64.0)])
            if seconds[0] > 0 and (doubt := _outside(seconds, STEP_SECONDS, f"a {fit.op} of 64 tokens")):
                yield fit, doubt
            continue
        work = _MUCH[fit.op]
        flops = matrix_flops(gpu, fit.scope.weight_bytes)
        link = gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s
        linked = fit.op in (Op.ALL_REDUCE, Op.TRANSFER)
        least_s = work.num_bytes / link if linked else max(work.flops / flops, work.num_bytes / gpu.mem_bytes_per_s)
        seconds_s = fit.seconds(
            flops=work.flops, num_bytes=work.num_bytes, tokens=work.tokens, heads=work.heads, wire_s=least_s
        )
        peaks = least_s / seconds_s if seconds_s > 0 else float("inf")
        if doubt := _beyond(peaks, LEAST_LINK if linked else LEAST_PEAKS, work.name, gpu):
            yield fit, doubt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    name: str
    flops: float = 0.0
    num_bytes: float
    tokens: float = 0.0
    heads: float = 0.0


# Sizes of Llama-3-8B on one GPU, large enough that neither launches nor caches matter. For decode attention, many short
# requests, so that its time per query head shows next to its bytes.
_PARAMS = 218e6
_MUCH: Mapping[Op, _Work] = {
    Op.DENSE: _Work(
        name="a layer on 8,192 tokens", flops=2 * _PARAMS * 8192, num_bytes=2 * _PARAMS, tokens=8192, heads=0
    ),
    Op.EXPERTS: _Work(
        name="experts on 8,192 tokens", flops=2 * _PARAMS * 8192, num_bytes=2 * _PARAMS, tokens=8192, heads=0
    ),
    Op.PREFILL_ATTENTION: _Work(
        name="a prompt of 8,192 tokens",
        flops=4.0 * 32 * 128 * 8192 * 4096,
        num_bytes=4096.0 * 8192,
        tokens=8192,
        heads=32 * 8192,
    ),
    Op.DECODE_ATTENTION: _Work(
        name="512 requests of 256 tokens",
        flops=4.0 * 32 * 128 * 512 * 256,
        num_bytes=4096.0 * 512 * 256,
        tokens=512,
        heads=32 * 512,
    ),
    Op.ALL_REDUCE: _Work(name="a message of 256 MiB", num_bytes=2.0**28, tokens=2.0**15),
    Op.TRANSFER: _Work(name="a message of 256 MiB", num_bytes=2.0**28),
}


def _outside(seconds: FloatArray, limits: tuple[float, float], what: str) -> str:
    median = float(np.median(seconds))
    if limits[0] <= median <= limits[1]:
        return ""
    return f"{what} take {median:.3g} s (median), expected {limits[0]:g} to {limits[1]:g} s: {_UNIT}"


def _beyond(peaks: float, least: float, what: str, gpu: GpuType) -> str:
    if least <= peaks <= MOST_PEAKS:
        return ""
    times = f"{peaks:,.0f} times" if peaks > 1 else f"{peaks:.2g} of"
    return f"{what} imply {times} the peaks of {gpu.name}, expected {least:g} to {MOST_PEAKS:g}: {_UNIT}"
