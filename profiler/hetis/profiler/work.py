"""The work of each measured row: FLOPs and bytes, in the features of the cost model (docs/cost-model.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis.formats.measurements import MeasuredOp, Table
from hetis.solver.cluster import GpuType

FloatArray = NDArray[np.float64]
KV_BYTES = 2.0  # per element of the KV cache and of activations in every table: bf16 or fp16


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a table's rows, arrays of shape [rows]. Bytes are the minimum that must cross the memory bus."""

    flops: FloatArray
    num_bytes: FloatArray


def work_of(table: Table) -> Work | None:
    """Return FLOPs and bytes of every row, or None for operators without either (steps, whole engines)."""
    number = table.numbers
    zero = np.zeros(len(table))
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
            return Work(
                4.0 * pairs * number("query_heads") * number("head_dim"),
                2.0 * KV_BYTES * kv_tokens * number("kv_heads") * number("head_dim"),
            )
        case MeasuredOp.DECODE_ATTENTION:
            tokens = number("batch") * number("context_tokens")
            return Work(
                4.0 * tokens * number("query_heads") * number("head_dim"),
                2.0 * KV_BYTES * tokens * number("kv_heads") * number("head_dim"),
            )
        case MeasuredOp.ALL_REDUCE | MeasuredOp.TRANSFER | MeasuredOp.KV_COPY:
            return Work(zero, number("num_bytes"))
        case _:
            return None


def roofline_seconds(table: Table, gpu: GpuType) -> FloatArray | None:
    """Return the minimum seconds that the nominal peaks of ``gpu`` allow each row, or None without such a bound."""
    work = work_of(table)
    if work is None:
        return None
    if table.op in (MeasuredOp.ALL_REDUCE, MeasuredOp.TRANSFER):
        fastest: FloatArray = work.num_bytes / max(gpu.nvlink_bytes_per_s or 0.0, gpu.pcie_bytes_per_s)
        return fastest
    flops = np.full(len(table), gpu.fp16_flops)
    if "weight_bits" in table.columns and gpu.fp8_flops is not None:
        flops = np.where(table.numbers("weight_bits") <= 8, gpu.fp8_flops, flops)
    least: FloatArray = np.maximum(work.flops / flops, work.num_bytes / gpu.mem_bytes_per_s)
    return least
