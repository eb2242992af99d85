"""A cluster file with the one measured device, so that a plan can be made for it at once."""

from __future__ import annotations

import numpy as np

from hetis.formats.catalogue import gpu_types
from hetis.formats.measurements import MeasuredOp, Measurements
from hetis.profiler.fitting import rounded
from hetis.profiler.measure.session import RunResult
from hetis.solver.cluster import Cluster, GpuSlots, GpuType, Link, Network, NodeGroup

_NETWORK = Link(bytes_per_s=1.25e9, latency_s=50e-6)  # if nothing was measured: 10 Gb/s


def host_cluster(result: RunResult) -> Cluster:
    """Return a cluster of one node with the device. Peaks that the catalogue lacks are the best rates measured."""
    value, link = result.measurements, _link(result.measurements)
    gpu = gpu_types().get(value.gpu) or GpuType(
        name=value.gpu,
        architecture=result.architecture,
        memory_bytes=result.memory_bytes,
        mem_bytes_per_s=rounded(peak_bytes_per_s(value)),
        fp16_flops=rounded(peak_flops(value)),
        pcie_bytes_per_s=link.bytes_per_s,
    )
    return Cluster(
        name="this-host",
        node_groups=(NodeGroup(name="host", gpus=(GpuSlots(gpu=gpu.name, count=1),)),),
        gpu_types={gpu.name: gpu},
        network=Network(default=link),
    )


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


def _link(value: Measurements) -> Link:
    """Return the best rate, and the time of the smallest message, between two processes of this host."""
    for t in value.tables:
        if t.op is MeasuredOp.TRANSFER and set(t.text("path")) <= {"loopback", "peer"}:
            num_bytes, times = t.numbers("num_bytes"), t.seconds
            latency_s = rounded(float(times[int(np.argmin(num_bytes))]))
            return Link(bytes_per_s=rounded(float((num_bytes / times).max())), latency_s=latency_s)
    return _NETWORK
