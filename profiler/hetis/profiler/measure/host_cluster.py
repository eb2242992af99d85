"""A cluster file with the one measured device, so that a plan can be made for it at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetis.formats.catalogue import gpus
from hetis.formats.fields import API_VERSION
from hetis.formats.measurements import MeasuredOp, Measurements
from hetis.formats.units import format_bandwidth, format_bytes, format_duration, format_flops
from hetis.profiler.measure.session import RunResult

_NETWORK_BYTES_PER_S, _NETWORK_LATENCY_S = 1.25e9, 50e-6  # if nothing was measured: 10 Gb/s


def host_cluster(result: RunResult) -> dict[str, Any]:
    """Return the document of a cluster with one node, as plain data. Peaks are the best rates measured."""
    value = result.measurements
    bandwidth, latency = _link(value)
    document: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": "Cluster",
        "name": "this-host",
        "nodes": [{"name": "host", "gpus": [{"type": value.gpu, "count": 1}]}],
        "network": {"bandwidth": format_bandwidth(bandwidth), "latency": format_duration(latency)},
    }
    if value.gpu not in {entry.gpu.name for entry in gpus()}:
        document["gpu_types"] = {
            value.gpu: {
                "architecture": result.architecture,
                "memory": format_bytes(result.memory_bytes),
                "memory_bandwidth": format_bandwidth(_digits(peak_bytes_per_s(value))),
                "fp16": format_flops(_digits(peak_flops(value))),
                "pcie": format_bandwidth(bandwidth),
            }
        }
    return document


def peak_flops(value: Measurements) -> float:
    """Return the best rate of any matrix product, in FLOP/s."""
    rates = [
        float((2 * t.numbers("m") * t.numbers("n") * t.numbers("k") / t.seconds).max())
        for t in value.tables
        if t.op is MeasuredOp.GEMM
    ]
    return max(rates)


def peak_bytes_per_s(value: Measurements) -> float:
    """Return the best rate of memory reads: in copies (which write as much), and in products with few tokens."""
    rates = []
    for t in value.tables:
        if t.op is MeasuredOp.KV_COPY or (t.op is MeasuredOp.TRANSFER and set(t.text("path")) == {"d2d"}):
            large = t.numbers("num_bytes") >= 2**22
            rates += (2 * t.numbers("num_bytes") / t.seconds)[large].tolist()
        elif t.op is MeasuredOp.GEMM:
            num_bytes = t.numbers("n") * t.numbers("k") * t.numbers("weight_bits") / 8
            rates += (num_bytes / t.seconds)[t.numbers("m") <= 16].tolist()
    return float(max(rates))


def _link(value: Measurements) -> tuple[float, float]:
    """Return (best bytes/s, seconds of the smallest message) between two processes of this host."""
    for t in value.tables:
        if t.op is MeasuredOp.TRANSFER and set(t.text("path")) <= {"loopback", "peer"}:
            num_bytes, times = t.numbers("num_bytes"), t.seconds
            return _digits(float((num_bytes / times).max())), _digits(float(times[int(np.argmin(num_bytes))]))
    return _NETWORK_BYTES_PER_S, _NETWORK_LATENCY_S


def _digits(value: float) -> float:
    return float(f"{value:.2e}")
