"""A small Measurements file of an invented GPU whose times follow a known law, and the cluster that defines it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hetis.formats.measurements import MeasuredBy, MeasuredOp, Measurements, Table, save_measurements

GPU = "Test-Card"
FLOPS, BYTES_PER_S, LINK = 100e12, 1e12, 10e9
CLUSTER = f"""\
apiVersion: hetis/v1
kind: Cluster
name: test
nodes: [{{name: n, gpus: [{{type: {GPU}}}]}}]
network: {{bandwidth: 10GB/s, latency: 10us}}
gpu_types:
  {GPU}: {{memory: 24GiB, memory_bandwidth: 1000GB/s, fp16: 100TFLOPS, pcie: 10GB/s, architecture: Ampere}}
"""


def write_files(folder: Path) -> tuple[Path, Path]:
    """Write (measurements, cluster) into ``folder``."""
    raw, cluster = folder / "raw.json", folder / "cluster.yaml"
    save_measurements(raw, measurements())
    cluster.write_text(CLUSTER)
    return raw, cluster


def with_mixed_batches(factor: float) -> Measurements:
    """Return the measurements, and batches of chunks beside decoding requests, which take ``factor`` times as long."""
    alone = measurements()
    by_op = {table.op: table for table in alone.tables}
    chunk, decode = by_op[MeasuredOp.PREFILL_ATTENTION], by_op[MeasuredOp.DECODE_ATTENTION]
    of_chunk, of_decode = (index.ravel() for index in np.indices((len(chunk), len(decode))))
    names = {"tokens": chunk, "past_tokens": chunk, "query_heads": chunk, "kv_heads": chunk, "head_dim": chunk}
    columns = {name: table.numbers(name)[of_chunk] for name, table in names.items()}
    columns |= {name: decode.numbers(name)[of_decode] for name in ("batch", "context_tokens")}
    columns["seconds"] = chunk.seconds[of_chunk] + factor * decode.seconds[of_decode]
    mixed = Table(op=MeasuredOp.MIXED_ATTENTION, kernel="law", columns=columns, cold=True)
    return replace(alone, tables=(*alone.tables, mixed))


def measurements() -> Measurements:
    """Layers, attention, messages; each time is a launch and a roofline."""
    heads = {"query_heads": 16.0, "kv_heads": 4.0, "head_dim": 128.0}
    grid = np.array([(b, c) for b in (1, 2, 4, 8, 16, 32, 64) for c in (128, 256, 512, 1024, 2048, 4096)], dtype=float)
    batch, context = grid.T
    kv_bytes = 4 * batch * context * 4 * 128
    tokens = np.array([64.0, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096])
    pairs = tokens * (tokens + 1) / 2
    layer = np.array([(h, t) for h in (1024.0, 2048.0, 4096.0) for t in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)])
    hidden, width = layer.T
    params = 12 * hidden**2
    sizes = 2.0 ** np.arange(10, 25)

    def table(measured: MeasuredOp, seconds: np.ndarray, **columns: object) -> Table:
        rows = len(seconds)
        full = {name: np.broadcast_to(np.asarray(value), (rows,)) for name, value in columns.items()}
        return Table(op=measured, kernel="law", columns={**full, "seconds": seconds}, cold=True)

    return Measurements(
        gpu=GPU,
        provenance=MeasuredBy(tool="a test", engine="law"),
        tables=(
            table(
                MeasuredOp.LAYER,
                20e-6 + np.maximum(2 * params * width / FLOPS, 2 * params / BYTES_PER_S),
                model=np.array([f"m{int(h)}" for h in hidden]),
                op="layer",
                tp=1.0,
                tokens=width,
                hidden=hidden,
                params=params,
                weight_bits=16.0,
            ),
            table(
                MeasuredOp.PREFILL_ATTENTION,
                10e-6 + 4 * pairs * 16 * 128 / FLOPS,
                batch=1.0,
                tokens=tokens,
                past_tokens=0.0,
                **heads,
            ),
            table(
                MeasuredOp.DECODE_ATTENTION,
                10e-6 + kv_bytes / BYTES_PER_S,
                batch=batch,
                context_tokens=context,
                **heads,
            ),
            table(MeasuredOp.TRANSFER, 5e-6 + sizes / LINK, num_bytes=sizes, path="peer"),
        ),
    )
