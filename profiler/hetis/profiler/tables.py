"""Reads the measured tables and turns them into points: work relative to the GPU's peaks, and seconds.

A point's features are what the cost model hands to a fit (``docs/cost-model.md``), divided by the peaks of the GPU it
was measured on. Units and origins of the tables: the README beside them.
"""

from __future__ import annotations

import bisect
import csv
import gzip
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hetis.profiler.fitting import FloatArray
from hetis.solver.errors import HetisError

Row = Mapping[str, str]


class TableError(HetisError):
    """A table is missing, is not what it should be, or has no rows of the kind that is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGpu:
    """A GPU of the tables with its nominal peaks."""

    name: str  # as in the catalogue
    flops: float
    bytes_per_s: float
    cache_bytes: float  # last-level cache
    link_bytes_per_s: float  # nominal GPU-to-GPU bandwidth, one direction
    fp8_flops: float | None = None


A100 = MeasuredGpu(name="A100-SXM-80GB", flops=312e12, bytes_per_s=2039e9, cache_bytes=40e6, link_bytes_per_s=300e9)
A40 = MeasuredGpu(name="A40", flops=149.7e12, bytes_per_s=696e9, cache_bytes=6e6, link_bytes_per_s=32e9)
H100 = MeasuredGpu(
    name="H100-SXM-80GB", flops=989e12, bytes_per_s=3350e9, cache_bytes=50e6, link_bytes_per_s=450e9, fp8_flops=1979e12
)
L40S = MeasuredGpu(
    name="L40S", flops=362e12, bytes_per_s=864e9, cache_bytes=96e6, link_bytes_per_s=32e9, fp8_flops=733e12
)
AIC_PREFIX = {A100.name: "aic_a100_sxm", H100.name: "aic_h100_sxm", L40S.name: "aic_l40s"}

# Spread evenly over the logarithm: the tables hold many more large token counts than a served batch has.
_TOKENS = (1, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
_PROJECTIONS = ("attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms")
_ELEMENTWISE = ("input_layernorm_ms", "post_attention_layernorm_ms", "attn_rope_ms", "mlp_act_ms", "add_ms")
_COLD_RATIO = 0.8  # of peak bandwidth; the median for matrices of an L40S that its cache cannot hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Measured points of one operator on one GPU. ``shapes[i]`` names the shape of point i, held out as a whole."""

    gpu: MeasuredGpu
    shapes: Sequence[str]
    features: FloatArray  # [points, features]
    seconds: FloatArray  # [points]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The four matrix products of a layer on one rank, as (n, k) of ``(m x k) (k x n)``."""

    name: str
    hidden: int
    products: tuple[tuple[int, int], ...]

    @property
    def params(self) -> int:
        return sum(n * k for n, k in self.products)


def read_rows(folder: Path, name: str, *columns: str) -> Iterator[Row]:
    """The rows of ``name`` (a .csv.gz), after checking that it has ``columns``."""
    path = folder / name
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise TableError(f"{path}: no column {', '.join(missing)}")
            yield from reader
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: {error}") from error


def dense_points(folder: Path, gpu: MeasuredGpu, *, dtype: str = "bfloat16") -> list[Points]:
    """Whole layers without attention: from vidur's operators, and from aiconfigurator's GEMM grid.

    The elementwise operators of a layer built from the GEMM grid are vidur's for the same GPU; for the L40S, which
    vidur did not measure, the A40's in the ratio of memory bandwidths.
    """
    donor = A40 if gpu is L40S else gpu
    layers = list(_vidur_layers(folder, donor))
    sets = []
    if gpu is donor and dtype == "bfloat16":
        sets.append([(shape, tokens, products + rest) for shape, tokens, products, rest in layers])
    if gpu.name in AIC_PREFIX:
        gemm = _GemmGrid(folder, gpu, dtype)
        slower = donor.bytes_per_s / gpu.bytes_per_s
        sets.append(
            [
                (shape, tokens, sum(gemm.seconds(tokens, n, k) for n, k in shape.products) + slower * rest)
                for shape, tokens, _, rest in layers
                if gemm.covers(tokens)
            ]
        )
    weight_bytes = 1.0 if dtype == "fp8" else 2.0
    flops = gpu.fp8_flops if dtype == "fp8" and gpu.fp8_flops else gpu.flops
    return [
        _points(
            gpu,
            [
                (
                    shape.name,
                    (
                        1.0,
                        2.0 * shape.params * tokens / flops,
                        (weight_bytes * shape.params + 8.0 * shape.hidden * 2.0 * tokens) / gpu.bytes_per_s,
                    ),
                    seconds,
                )
                for shape, tokens, seconds in rows
            ],
        )
        for rows in sets
    ]


def prefill_points(folder: Path, gpu: MeasuredGpu) -> Points:
    """One prompt at a time of 256 to 16k tokens: (1, FLOPs of the causal pairs, tokens in bytes of bandwidth)."""
    rows = []
    for row in read_rows(folder, f"{AIC_PREFIX[gpu.name]}_context_attention.csv.gz", *_ATTENTION_COLUMNS, "isl"):
        tokens, heads, head_dim = int(row["isl"]), int(row["num_heads"]), int(row["head_dim"])
        if row["batch_size"] != "1" or not 256 <= tokens <= 16384 or not 4 <= heads <= 64 or head_dim != 128:
            continue
        flops = 4.0 * heads * head_dim * tokens * (tokens + 1) / 2
        rows.append((_heads(row), (1.0, flops / gpu.flops, tokens / gpu.bytes_per_s), float(row["latency_ms"]) / 1e3))
    return _points(gpu, rows)


def decode_points(folder: Path, gpu: MeasuredGpu, *, warm: bool = False) -> Points:
    """Batches of 4 to 256 over contexts of 256 to 16k: (1, FLOPs, KV bytes, query heads in bytes of bandwidth).

    The tables were measured by calling one kernel over and over, so that a KV that fits the cache is read from it, on
    an L40S at 2.8 times the memory bandwidth. In serving, all weights and the KV of all other layers pass between two
    calls. So only points count whose KV is twice the cache, or so small that the launch dominates. ``warm`` gives
    all the others instead, for the record.
    """
    rows = []
    name = f"{AIC_PREFIX[gpu.name]}_generation_attention.csv.gz"
    for row in read_rows(folder, name, *_ATTENTION_COLUMNS, "kv_len"):
        batch, context, head_dim = int(row["batch_size"]), int(row["kv_len"]), int(row["head_dim"])
        heads, groups = int(row["num_heads"]), int(row["num_key_value_heads"])
        if not (4 <= batch <= 256 and 256 <= context <= 16384 and 4 <= heads <= 64) or head_dim != 128:
            continue
        kv_bytes = 4.0 * head_dim * context * batch * groups
        if (2 * gpu.cache_bytes > kv_bytes > 2e-6 * gpu.bytes_per_s) != warm:
            continue
        flops = 4.0 * context * batch * heads * head_dim
        features = (1.0, flops / gpu.flops, kv_bytes / gpu.bytes_per_s, batch * heads / gpu.bytes_per_s)
        rows.append((_heads(row), features, float(row["latency_ms"]) / 1e3))
    return _points(gpu, rows)


def all_reduce_points(folder: Path, gpu: MeasuredGpu) -> Points:
    """All-reduce in a node by the faster of NCCL and vLLM's kernel, 8 KiB to 256 MiB: (1, ring time on the wire)."""
    fastest: dict[tuple[int, int], float] = {}
    name = f"{AIC_PREFIX[gpu.name]}_comm.csv.gz"
    for row in read_rows(folder, name, "impl", "op_name", "num_gpus", "message_elements", "latency_ms"):
        num_bytes = 2 * int(row["message_elements"])
        if "all_reduce" not in row["op_name"] or row["impl"].endswith("eager") or not 8192 <= num_bytes <= 2**28:
            continue
        key = (int(row["num_gpus"]), num_bytes)
        fastest[key] = min(fastest.get(key, float("inf")), float(row["latency_ms"]) / 1e3)
    return _points(
        gpu, [_reduce_row(gpu, n, num_bytes, seconds) for (n, num_bytes), seconds in sorted(fastest.items())]
    )


def a40_all_reduce_points(folder: Path) -> Points:
    """vidur's A40 host, PCIe: the same features."""
    rows = []
    for row in read_rows(folder, "vidur_collectives.csv.gz", "topology", "collective", "bytes", "median_ms"):
        if row["topology"] == "a40" and row["collective"] == "all_reduce" and int(row["bytes"]) >= 8192:
            rows.append(_reduce_row(A40, int(row["num_workers"]), int(row["bytes"]), float(row["median_ms"]) / 1e3))
    return _points(A40, rows)


def send_seconds(folder: Path) -> dict[tuple[str, bool], list[tuple[int, float]]]:
    """Send and receive between two GPUs: (topology, in one node) to sorted (bytes, seconds)."""
    found: dict[tuple[str, bool], list[tuple[int, float]]] = defaultdict(list)
    for row in read_rows(folder, "vidur_collectives.csv.gz", "topology", "collective", "devices_per_node", "median_ms"):
        if row["collective"] == "send_recv":
            key = (row["topology"], row["devices_per_node"] == "2")
            found[key].append((int(row["bytes"]), float(row["median_ms"]) / 1e3))
    return {key: sorted(rows) for key, rows in found.items()}


def sampler_seconds(folder: Path) -> list[tuple[int, float]]:
    """Sorted (batch size, seconds of the sampler end to end) on vidur's A100 hosts."""
    name = "vidur_cpu_overheads.csv.gz"
    rows = read_rows(folder, name, "gpu", "batch_size", "sampler_e2e_ms")
    return sorted((int(row["batch_size"]), float(row["sampler_e2e_ms"]) / 1e3) for row in rows if row["gpu"] == "A100")


_ATTENTION_COLUMNS = ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "latency_ms")


def _heads(row: Row) -> str:
    return f"{row['num_heads']}/{row['num_key_value_heads']}"


def _reduce_row(gpu: MeasuredGpu, n: int, num_bytes: int, seconds: float) -> tuple[str, tuple[float, ...], float]:
    return f"{n}x{num_bytes}", (1.0, 2.0 * (n - 1) / n * num_bytes / gpu.link_bytes_per_s), seconds


def _points(gpu: MeasuredGpu, rows: Sequence[tuple[str, tuple[float, ...], float]]) -> Points:
    if not rows:
        raise TableError(f"{gpu.name}: no usable rows")
    return Points(
        gpu=gpu,
        shapes=[shape for shape, _, _ in rows],
        features=np.array([features for _, features, _ in rows], dtype=np.float64),
        seconds=np.array([seconds for _, _, seconds in rows], dtype=np.float64),
    )


def _vidur_layers(folder: Path, gpu: MeasuredGpu) -> Iterator[tuple[LayerShape, int, float, float]]:
    """Shape, tokens, seconds of the matrix products and of everything else but attention."""
    label = gpu.name.split("-")[0]
    columns = (*_PROJECTIONS, *_ELEMENTWISE, "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "tp")
    for row in read_rows(folder, "vidur_layer_ops.csv.gz", "gpu", "num_tokens", "use_gated_mlp", *columns):
        if row["gpu"] != label or int(row["num_tokens"]) not in _TOKENS:
            continue
        hidden, inner, tp = int(row["n_embd"]), int(row["n_expanded_embd"]), int(row["tp"])
        head_dim = hidden // int(row["n_head"])
        qkv = (int(row["n_head"]) + 2 * int(row["n_kv_head"])) * head_dim
        up = (2 if row["use_gated_mlp"] == "True" else 1) * inner
        products = ((qkv // tp, hidden), (hidden, hidden // tp), (up // tp, hidden), (hidden, inner // tp))
        # Named by its sizes: two models of equal layers must not end up on both sides of the held-out split.
        shape = LayerShape(" ".join(f"{n}x{k}" for n, k in products), hidden, products)
        times = [sum(float(row[name] or 0.0) for name in names) / 1e3 for names in (_PROJECTIONS, _ELEMENTWISE)]
        yield shape, int(row["num_tokens"]), times[0], times[1]


class _GemmGrid:
    """Seconds of a matrix product, bilinear in (n, k) between the sizes measured; m as measured."""

    def __init__(self, folder: Path, gpu: MeasuredGpu, dtype: str) -> None:
        self._gpu = gpu
        self._weight_bytes = 1.0 if dtype == "fp8" else 2.0
        self._seconds: dict[tuple[int, int, int], float] = {}
        for row in read_rows(folder, f"{AIC_PREFIX[gpu.name]}_gemm.csv.gz", "gemm_dtype", "m", "n", "k", "latency_ms"):
            if row["gemm_dtype"] == dtype and int(row["m"]) in _TOKENS:
                self._seconds[int(row["m"]), int(row["n"]), int(row["k"])] = float(row["latency_ms"]) / 1e3
        if not self._seconds:
            raise TableError(f"{gpu.name}: no GEMM rows of type {dtype}")
        self._tokens = {m for m, _, _ in self._seconds}
        self._sizes = sorted({n for _, n, _ in self._seconds})

    def covers(self, tokens: int) -> bool:
        return tokens in self._tokens

    def seconds(self, tokens: int, n: int, k: int) -> float:
        (n_low, n_high, u), (k_low, k_high, v) = self._around(n), self._around(k)
        low = (1 - v) * self._cell(tokens, n_low, k_low) + v * self._cell(tokens, n_low, k_high)
        high = (1 - v) * self._cell(tokens, n_high, k_low) + v * self._cell(tokens, n_high, k_high)
        measured = (1 - u) * low + u * high
        weights = self._weight_bytes * n * k
        # Measured over and over, a small matrix stays in the cache; in serving it comes from memory each time.
        cold = weights / (_COLD_RATIO * self._gpu.bytes_per_s) if weights < self._gpu.cache_bytes else 0.0
        return max(measured, cold)

    def _cell(self, tokens: int, n: int, k: int) -> float:
        try:
            return self._seconds[tokens, n, k]
        except KeyError:
            raise TableError(f"{self._gpu.name}: no GEMM row for m={tokens} n={n} k={k}") from None

    def _around(self, size: int) -> tuple[int, int, float]:
        above = min(max(bisect.bisect_left(self._sizes, size), 1), len(self._sizes) - 1)
        low, high = self._sizes[above - 1], self._sizes[above]
        return low, high, (size - low) / (high - low)
