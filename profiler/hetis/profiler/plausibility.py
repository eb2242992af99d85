"""The work of measured rows, and times that no GPU can reach.

Times in a wrong unit are off by a factor of a thousand, which a comparison with the GPU's peaks shows. For every table,
the median over the quarter of its rows with the most work counts, because launches are negligible there, and a few
wrong rows do not move it. There the published tables reach 0.08 to 0.81 of the peaks, those served by a cache up to 12
times the peaks; a host whose GPUs communicate over a slow network reaches a hundredth of its link.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.formats.measurements import Column, MeasuredOp, Measurements, Table
from hetis.profiler.fitting import FloatArray
from hetis.solver.cluster import GpuType

KV_BYTES = 2.0  # bytes per element of the KV cache and of activations in every table: bf16 or fp16
MOST_PEAKS = 20.0  # multiple of the peak; upper limit for a table's median, whatever cache it is read from
LEAST_PEAKS = 0.02  # share of the peaks of compute and memory
LEAST_LINK = 2e-3  # share of the nominal link between GPUs; hosts that copy through their memory reach a thirtieth
STEP_SECONDS = (2e-5, 0.1)  # time of the host per iteration
PHASE_SECONDS = {"prompt": (2e-3, 100.0), "token": (2e-4, 2.0)}  # times of whole engines
_LEAST_WORK_S = 2e-6  # time at the peaks; below it the launch dominates the measurement
_LINKS = (MeasuredOp.ALL_REDUCE, MeasuredOp.TRANSFER)
_UNIT = "check the unit"


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a table's rows in the features of the cost model (docs/cost-model.md), arrays of shape [rows].

    Bytes are the minimum that must cross the memory bus.
    """

    flops: FloatArray
    num_bytes: FloatArray


def work_of(table: Table) -> Work | None:
    """Return FLOPs and bytes of every row, or None for operators without either (steps, whole engines)."""
    number = table.numbers
    match table.op:
        case MeasuredOp.GEMM:
            m, n, k = number("m"), number("n"), number("k")
            return Work(2.0 * m * n * k, number("weight_bits") / 8.0 * n * k + 2.0 * m * k + 2.0 * m * n)
        case MeasuredOp.LAYER:
            tokens, params = number("tokens"), number("params")
            return Work(2.0 * tokens * params, params * number("weight_bits") / 8.0)
        case MeasuredOp.PREFILL_ATTENTION:
            pairs = number("tokens") * (number("past_tokens") + (number("tokens") + 1.0) / 2.0) * number("batch")
            kv_tokens = number("batch") * (number("past_tokens") + number("tokens"))
        case MeasuredOp.DECODE_ATTENTION:
            pairs = kv_tokens = number("batch") * number("context_tokens")
        case MeasuredOp.MIXED_ATTENTION:
            chunk, decode = (work_of(part) for part in parts_of(table))
            assert chunk is not None
            assert decode is not None
            return Work(chunk.flops + decode.flops, chunk.num_bytes + decode.num_bytes)
        case MeasuredOp.ALL_REDUCE | MeasuredOp.TRANSFER | MeasuredOp.KV_COPY:
            return Work(np.zeros(len(table)), number("num_bytes"))
        case _:
            return None
    return Work(
        4.0 * pairs * number("query_heads") * number("head_dim"),
        2.0 * KV_BYTES * kv_tokens * number("kv_heads") * number("head_dim"),
    )


def parts_of(table: Table) -> tuple[Table, Table]:
    """Return the chunks and the decoding requests of mixed batches as tables of their own, row by row. Their times are
    those of both.
    """
    shared = {name: table.columns[name] for name in ("query_heads", "kv_heads", "head_dim", "seconds")}
    chunk = {name: table.columns[name] for name in ("tokens", "past_tokens")}
    decode = {name: table.columns[name] for name in ("batch", "context_tokens")}
    one: Mapping[str, Column] = {"batch": np.ones(len(table))}
    return (
        replace(table, op=MeasuredOp.PREFILL_ATTENTION, columns={**one, **chunk, **shared}),
        replace(table, op=MeasuredOp.DECODE_ATTENTION, columns={**decode, **shared}),
    )


def roofline_seconds(table: Table, gpu: GpuType) -> FloatArray | None:
    """Return the minimum seconds that the nominal peaks of ``gpu`` allow each row, or None without such a bound."""
    work = work_of(table)
    if work is None:
        return None
    least: FloatArray
    if table.op in _LINKS:
        least = work.num_bytes / max(gpu.nvlink_bytes_per_s or 0.0, gpu.pcie_bytes_per_s)
        return least
    flops = np.full(len(table), gpu.fp16_flops)
    if "weight_bits" in table.columns and gpu.fp8_flops is not None:
        flops = np.where(table.numbers("weight_bits") <= 8, gpu.fp8_flops, flops)
    least = np.maximum(work.flops / flops, work.num_bytes / gpu.mem_bytes_per_s)
    return least


def doubts_of_units(measurements: Sequence[Measurements], gpu: GpuType) -> Iterator[str]:
    """Yield a sentence per table whose times are impossible on this GPU by a factor that looks like a wrong unit."""
    for measurement in measurements:
        for table in measurement.tables:
            if doubt := unit_doubt(table, gpu):
                yield f"{table.op} of {measurement.provenance}: {doubt}"


def unit_doubt(table: Table, gpu: GpuType) -> str:
    """Return why the times of ``table`` look as if in another unit, or an empty string if they may be right."""
    if table.op is MeasuredOp.STEP:
        return outside(table.seconds, STEP_SECONDS, "steps of an engine")
    if table.op is MeasuredOp.E2E:
        phases = np.array(table.text("phase"))
        found = (
            outside(table.seconds[phases == phase], limits, f"{phase} times")
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
    return beyond(peaks, LEAST_LINK if table.op in _LINKS else LEAST_PEAKS, f"the {int(large.sum())} largest rows", gpu)


def outside(seconds: FloatArray, limits: tuple[float, float], what: str) -> str:
    """Return why the median of ``seconds`` looks as if in another unit, or an empty string."""
    median = float(np.median(seconds))
    if limits[0] <= median <= limits[1]:
        return ""
    return f"{what} take {median:.3g} s (median), expected {limits[0]:g} to {limits[1]:g} s: {_UNIT}"


def beyond(peaks: float, least: float, what: str, gpu: GpuType) -> str:
    """Return why a multiple of the peaks looks like that of another unit, or an empty string."""
    if least <= peaks <= MOST_PEAKS:
        return ""
    times = f"{peaks:,.0f} times" if peaks > 1 else f"{peaks:.2g} of"
    return f"{what} imply {times} the peaks of {gpu.name}, expected {least:g} to {MOST_PEAKS:g}: {_UNIT}"
