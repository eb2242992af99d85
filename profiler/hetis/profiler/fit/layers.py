"""Whole layers without attention: measured operator by operator, or composed from a grid of matrix products."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hetis.formats import catalogue
from hetis.formats.measurements import MeasuredOp, Measurements, Table
from hetis.formats.models.dtypes import BYTES_PER_PARAMETER
from hetis.profiler.fit.points import CACHE_BYTES, Cells, FitPoints, Points, tables_of, unknown_cache
from hetis.solver.cluster import GpuType
from hetis.solver.model import ModelSpec
from hetis.solver.profile import FitScope, Op

# Evenly spaced logarithms: the tables contain many more large token counts than served batches have.
_TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
_MAX_TOKEN_COUNTS = 40  # a table with fewer is used as it is
COLD_RATIO = 0.8  # share of peak bandwidth: a matrix that fits the cache is charged this, however fast it was reread
_MIN_LAYERS = 12  # minimum number of points (layers and token counts) for a fit
_TPS = (1, 2, 4, 8)
_MODELS = (
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "codellama/CodeLlama-34b-Instruct-hf",
    "meta-llama/Meta-Llama-3-8B",
    "Qwen/Qwen-72B",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen2.5-32B-Instruct",
    "internlm/internlm-20b",
    "mistralai/Mistral-Small-24B-Instruct-2501",
    "facebook/opt-13b",
    "facebook/opt-30b",
)
_NVFP4 = FitScope(weight_bytes=BYTES_PER_PARAMETER["nvfp4"])  # the scales count as bytes too
# Elementwise kernels of a layer: two norms, rope, activation, residual. One launch each, within a captured graph.
_ELEMENTWISE_LAUNCH_S = 10e-6


@dataclass(frozen=True, slots=True)
class _Row:
    shape: str
    tokens: float
    hidden: float
    params: float
    seconds: float
    cells: Cells = frozenset()


def dense_points(measurements: Sequence[Measurements], gpu: GpuType, into: FitPoints) -> None:
    """Add points of 16-bit weights, and of 8 and 4-bit ones in scopes of their own, each from its first source."""
    for weight_bits, scope in ((16, FitScope()), (8, FitScope(weight_bytes=1.0)), (4, _NVFP4)):
        chosen = into.points
        for measurement in measurements:
            if points := _points([measurement], weight_bits, scope, gpu):
                chosen.append(points)
                chosen = into.others


def _points(measurements: Sequence[Measurements], weight_bits: int, scope: FitScope, gpu: GpuType) -> Points | None:
    """Return the points, or None if there are too few layers."""
    rows: list[_Row] = []
    origins: list[str] = []
    notes: dict[str, None] = {}
    for origin, table in tables_of(measurements, MeasuredOp.LAYER):
        if found := list(_measured_layers(table, weight_bits)):
            origins.append(f"{origin} operators of layers")
            rows += found
    for origin, table in tables_of(measurements, MeasuredOp.GEMM):
        if found := list(_composed_layers(table, weight_bits, gpu)):
            origins.append(f"{origin} matrix products put together to layers")
            notes |= dict.fromkeys(unknown_cache(table, gpu))
            rows += found
    if len(rows) < _MIN_LAYERS:
        return None
    tokens, hidden, params, seconds = (
        np.array([getattr(row, name) for row in rows]) for name in ("tokens", "hidden", "params", "seconds")
    )
    # docs/cost-model.md, dense(T): weights once, eight activations of the hidden size per token.
    weight_bytes = weight_bits / 8.0 if scope.weight_bytes is None else scope.weight_bytes
    num_bytes = params * weight_bytes + 8.0 * hidden * 2.0 * tokens
    return Points(
        op=Op.DENSE,
        scope=scope,
        features=np.stack([np.ones(len(rows)), 2.0 * params * tokens, num_bytes], axis=1),
        seconds=seconds,
        shapes=[row.shape for row in rows],
        sizes={"tokens": tokens},
        cells=[row.cells for row in rows],
        origin=" and ".join(origins),
        notes=tuple(notes),
    )


def _measured_layers(table: Table, weight_bits: int) -> Iterator[_Row]:
    """Yield the sums of a layer's operators, using the median of each operator's samples."""
    keep = table.numbers("weight_bits") == weight_bits
    if not keep.any():
        return
    samples: dict[tuple[str, float, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    params: dict[tuple[str, float], dict[str, float]] = defaultdict(dict)
    hidden_of: dict[tuple[str, float], float] = {}
    columns = [table.numbers(name)[keep].tolist() for name in ("tp", "tokens", "hidden", "params", "seconds")]
    names = [np.array(table.text(name))[keep].tolist() for name in ("model", "op")]
    for model, op, tp, tokens, hidden, weights, seconds in zip(*names, *columns, strict=True):
        samples[model, tp, tokens][op].append(seconds)
        params[model, tp][op] = weights
        hidden_of[model, tp] = hidden
    chosen = _chosen({tokens for _, _, tokens in samples})
    for (model, tp, tokens), ops in sorted(samples.items()):
        products = {op: weights for op, weights in params[model, tp].items() if weights > 0}
        if tokens not in chosen or not products or not products.keys() <= ops.keys():
            continue
        hidden = hidden_of[model, tp]
        seconds = sum(float(np.median(times)) for _, times in sorted(ops.items()))
        yield _Row(_shape(hidden, list(products.values())), tokens, hidden, sum(products.values()), seconds)


def _composed_layers(table: Table, weight_bits: int, gpu: GpuType) -> Iterator[_Row]:
    """Yield layers of known models from their four products or, without a known one, layers of four equal products."""
    grid = _Grid(table, weight_bits, gpu)
    if not grid.tokens:
        return
    known = [catalogue.find_model(name).model for name in _MODELS]
    found = [row for model in known for tp in _TPS for row in _layer(model, tp, grid)]
    if not found:
        others = [entry.model for entry in catalogue.models()]
        found = [row for model in others for tp in _TPS for row in _layer(model, tp, grid)]
    if not found:
        found = [
            _Row(_shape(k, [n * k] * 4), tokens, k, 4.0 * n * k, 4.0 * grid.cells[tokens, n, k], frozenset({(n, k)}))
            for tokens, n, k in sorted(grid.cells)
        ]
    seen = set[tuple[str, float]]()
    for row in found:
        if (row.shape, row.tokens) not in seen:
            seen.add((row.shape, row.tokens))
            yield row


def _layer(model: ModelSpec, tp: int, grid: _Grid) -> Iterator[_Row]:
    if model.plain_layer is None:
        return
    heads, mlp = model.plain_layer
    if heads.query_heads % tp or mlp.width % tp:
        return
    query, kv = heads.query_heads * heads.head_dim / tp, max(1.0, heads.kv_heads / tp) * heads.head_dim
    inner, gates = mlp.width / tp, mlp.matrices - 1
    products = [
        (query + 2 * kv, float(model.hidden)),
        (float(model.hidden), query),
        (gates * inner, float(model.hidden)),
        (float(model.hidden), inner),
    ]
    params = [n * k for n, k in products]
    # Reads and writes of norms (4 H), residuals (3 H), rope and activation, two bytes each.
    token_bytes = 2.0 * (7 * model.hidden + 2 * (query + kv) + (gates + 1) * inner)
    cells = frozenset(cell for n, k in products for cell in grid.around(n, k))
    for tokens in grid.tokens:
        times = [grid.seconds(tokens, n, k) for n, k in products]
        if None in times:
            continue
        elementwise = _ELEMENTWISE_LAUNCH_S + tokens * token_bytes / (COLD_RATIO * grid.gpu.mem_bytes_per_s)
        seconds = sum(time for time in times if time is not None) + elementwise
        yield _Row(_shape(model.hidden, params), tokens, model.hidden, sum(params), seconds, cells)


def _shape(hidden: float, params: Sequence[float]) -> str:
    """Return a name made of sizes, not models: equal layers of two models must not be on both sides of the split."""
    return f"{hidden:.0f}: {' '.join(f'{value:.0f}' for value in sorted(params))}"


def _chosen(tokens: set[float]) -> set[float]:
    return tokens if len(tokens) <= _MAX_TOKEN_COUNTS else tokens & set(map(float, _TOKENS))


class _Grid:
    """Seconds of a matrix product, as measured, or interpolated bilinearly in (n, k) between the nearest sizes."""

    def __init__(self, table: Table, weight_bits: int, gpu: GpuType) -> None:
        self.gpu = gpu
        keep = table.numbers("weight_bits") == weight_bits
        m, n, k, seconds = (table.numbers(name)[keep].tolist() for name in ("m", "n", "k", "seconds"))
        chosen = {tokens for tokens in _chosen(set(m)) if tokens <= _TOKENS[-1]}
        cache = 0.0 if table.cold else CACHE_BYTES.get(gpu.name, 0.0)
        samples: dict[tuple[float, float, float], list[float]] = defaultdict(list)
        for tokens, rows, columns, time in zip(m, n, k, seconds, strict=True):
            if tokens in chosen:
                samples[tokens, rows, columns].append(time)
        self.cells = {key: float(np.median(times)) for key, times in samples.items()}
        self.tokens = sorted({tokens for tokens, _, _ in self.cells})
        self._n = sorted({n for _, n, _ in self.cells})
        self._k = sorted({k for _, _, k in self.cells})
        self._cache, self._weight_bytes = cache, weight_bits / 8.0

    def seconds(self, tokens: float, n: float, k: float) -> float | None:
        """Return the seconds, or None outside the grid."""
        corners = [(weight, self.cells.get((tokens, *cell))) for cell, weight in self.around(n, k).items()]
        if not corners or any(value is None for _, value in corners):
            return None
        measured = sum(weight * value for weight, value in corners if value is not None)
        weights = self._weight_bytes * n * k
        cold = weights / (COLD_RATIO * self.gpu.mem_bytes_per_s) if weights < self._cache else 0.0
        return max(measured, cold)

    def around(self, n: float, k: float) -> dict[tuple[float, float], float]:
        """Return the cells next to (n, k) with their weights, or none outside the grid."""
        near_n, near_k = _around(self._n, n), _around(self._k, k)
        return {(at_n, at_k): in_n * in_k for at_n, in_n in near_n for at_k, in_k in near_k}


def _around(sizes: Sequence[float], size: float) -> list[tuple[float, float]]:
    """Return the sizes next to ``size`` with their weights: one if it was measured, none if it is outside."""
    at = bisect.bisect_left(sizes, size)
    if at < len(sizes) and sizes[at] == size:
        return [(size, 1.0)]
    if at in (0, len(sizes)):
        return []
    low, high = sizes[at - 1], sizes[at]
    share = (size - low) / (high - low)
    return [(low, 1.0 - share), (high, share)]
