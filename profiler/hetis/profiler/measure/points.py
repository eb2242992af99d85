"""Measurable points of an operator, and the candidates that serving a model on a device would need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated

import numpy as np
from pydantic import Field

from hetis.profiler.fitting import FloatArray
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import Kernel, ModelSpec

GEMM_KERNEL = "torch linear"
LAYER_KERNEL = "torch, unfused"
ATTENTION_KERNEL = "torch sdpa"
COPY_KERNEL = "torch copy"
GATHER_KERNEL = "torch index_select"
KV_BLOCK_BYTES = 8192  # 16 tokens, 128 dimensions, K and V: one KV block of a head group
_WEIGHT_BITS = 16
_ODD_TOKENS = (3, 12, 24, 48, 96, 192, 384, 768, 1536, 3072, 6144)  # between the powers, where tiles are half empty
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """One thing to time."""

    op: str  # name of the table it belongs to, such as ``gemm``
    kernel: str  # what computes it, such as ``torch sdpa``; points of two kernels never share a fit
    columns: Mapping[str, Count]  # the table's numeric columns except ``seconds``; sizes in bytes, lengths in tokens
    texts: Mapping[str, str] = field(default_factory=dict)  # the table's text columns, such as the path of a transfer

    @property
    def key(self) -> tuple[object, ...]:
        """A hashable value that is equal for points that are the same measurement."""
        return (self.op, self.kernel, *sorted(self.texts.items()), *sorted(self.columns.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSample:
    """Seconds of one call at a point.

    ``spread`` is the half-width of the 95% confidence interval of the median, relative to it. ``jitter`` is how far the
    slowest tenth of the samples lies above the median, relative to it, which reveals a busy neighbour. ``cold`` means
    that every call found its operands outside the cache (`hetis.profiler.measure.host`).
    """

    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    spread: Share
    jitter: Share = 0.0
    cold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A point and its measurement."""

    point: MeasuredPoint
    sample: TimedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSeries:
    """Points that one smooth surface describes, because one kernel computes them all."""

    name: str  # shown in progress messages
    candidates: tuple[MeasuredPoint, ...]  # every point worth measuring, cheap ones first
    axes: tuple[str, ...]  # the columns that vary; the surface is over their logarithms
    # groups of points, by key, that are only useful together, such as the products of a layer: measuring one leads to
    # the others of its group
    groups: Mapping[tuple[object, ...], str] = field(default_factory=dict)

    def logs(self, points: Iterable[MeasuredPoint]) -> FloatArray:
        """Return the logarithms of the sizes that vary, plus one: a past of no tokens is a point, too."""
        return np.log1p([[float(point.columns[axis]) for axis in self.axes] for point in points])


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The range of the candidates. Every list is ascending."""

    tokens: Sequence[int]  # tokens of a batch in the dense path
    prompts: Sequence[int]  # tokens of one prefill chunk; pasts: tokens before it
    pasts: Sequence[int]
    # batches, contexts: of decode attention; kv_limit_bytes bounds their product.
    batches: Sequence[int]
    contexts: Sequence[int]
    kv_limit_bytes: int
    messages: Sequence[int]  # bytes of a copy or message on the device; links: of one that leaves the process
    links: Sequence[int]
    tps: Sequence[int]  # tensor parallel degrees


def extent_of(*, on_cuda: bool, quick: bool) -> Extent:
    """Return the range worth measuring: the serving range on a GPU, whatever ends in reasonable time on a CPU."""
    most = 16384 if on_cuda else 512 if quick else 2048
    tokens = _powers(1, most)
    if not quick:
        tokens = tuple(sorted({*tokens, *(odd for odd in _ODD_TOKENS if odd < most)}))
    return Extent(
        tokens=tokens,
        prompts=_powers(64, most),
        pasts=(0, *_powers(256, most)),
        batches=_powers(1, 256 if on_cuda else 64),
        contexts=_powers(128, 32768 if on_cuda else 4096 if quick else 8192),
        kv_limit_bytes=2**33 if on_cuda else 2**26 if quick else 2**28,
        messages=_powers(2**12, 2**30 if on_cuda else 2**26, 4),
        links=_powers(2**10, 2**28 if on_cuda else 2**24, 4),
        tps=(1, 2) if quick else (1, 2, 4, 8),
    )


def _powers(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    values = [first]
    while values[-1] * factor <= last:
        values.append(values[-1] * factor)
    return tuple(values)


def series_of(
    model: ModelSpec, extent: Extent, *, paths: Sequence[str], peer_kernel: str, peer_path: str
) -> tuple[PointSeries, ...]:
    """Return every series of ``model``. Raises InvalidProblemError if the model has layers that cannot be measured.

    Args:
        model: its layer is measured; there are no kernels here for latent, compressed, linear and gated attention and
            experts.
        extent: range of the candidates.
        paths: of copies that the device can make: h2d, d2h, d2d.
        peer_kernel: backend for messages between two processes (gloo, nccl); empty for none.
        peer_path: ``loopback`` or ``peer``.
    """
    if model.plain_layer is None:
        what = _unusual_part(model)
        raise InvalidProblemError(f"{model.name} has {what}, which `run` cannot measure: choose a dense model")
    tps = [tp for tp in extent.tps if model.q_heads % tp == 0 and model.kv_heads % tp == 0]
    blocks = (size for size in extent.messages if size >= KV_BLOCK_BYTES)  # no less than a block is ever copied
    found = [
        _series("dense layer", _layers(model, extent, tps), "tokens", "params"),
        _products(model, extent, tps),
        _series("prefill attention", _prefills(model, extent, tps), "tokens", "past_tokens", "query_heads"),
        _series("decode attention", _decodes(model, extent), "batch", "context_tokens", "kv_heads"),
        _series("KV copy", (_bytes("kv_copy", GATHER_KERNEL, size) for size in blocks), "num_bytes"),
    ]
    for path in paths:
        points = (_bytes("transfer", COPY_KERNEL, size, path=path) for size in extent.messages)
        found.append(_series(f"copy {path}", points, "num_bytes"))
    if peer_kernel:
        points = (_bytes("transfer", f"{peer_kernel} send", size, path=peer_path) for size in extent.links)
        found.append(_series(f"message {peer_path}", points, "num_bytes"))
        kernel = f"{peer_kernel} all_reduce"
        counts = ({"num_gpus": 2, "num_bytes": size} for size in extent.links)
        texts = {"impl": peer_kernel}
        points = (MeasuredPoint(op="all_reduce", kernel=kernel, columns=columns, texts=texts) for columns in counts)
        found.append(_series("all-reduce", points, "num_bytes"))
    return tuple(found)


def _unusual_part(model: ModelSpec) -> str:
    """Return what its layers have beside grouped attention and a dense MLP, in words."""
    names = {
        Kernel.LATENT: "latent attention",
        Kernel.COMPRESSED: "compressed attention",
        Kernel.RECURRENT: "linear attention",
        Kernel.SPARSE: "sparse attention",
    }
    found = [what for kernel, what in names.items() if kernel in model.kernels]
    found += ["experts"] if model.experts is not None else []
    found += ["gated attention"] if any(mixer.is_gated for mixer, _ in model.mixers) else []
    return found[0] if found else "layers of unlike shape"


def _series(name: str, points: Iterator[MeasuredPoint], *axes: str) -> PointSeries:
    unique = {point.key: point for point in points}
    return PointSeries(name=name, candidates=tuple(unique.values()), axes=axes)


def _products(model: ModelSpec, extent: Extent, tps: Sequence[int]) -> PointSeries:
    """Return the matrix products. The four of a layer belong together, so that layers can be composed from them."""
    series = _series("GEMM", _gemms(model, extent, tps), "m", "n", "k")
    tp_of = {(n, k): tp for tp in tps for name, (n, k) in matrices(model, tp).items() if name != "lm_head"}
    groups = {
        point.key: f"{point.columns['m']} tokens, TP {tp}"
        for point in series.candidates
        if (tp := tp_of.get((point.columns["n"], point.columns["k"]))) is not None
    }
    return replace(series, groups=groups)


def matrices(model: ModelSpec, tp: int) -> dict[str, tuple[int, int]]:
    """Return (n, k) of each matrix that one rank multiplies tokens by."""
    heads, groups = model.q_heads // tp, model.kv_heads // tp
    mlp, _ = model.mlps[0]
    up = (mlp.matrices - 1) * mlp.inner // tp
    return {
        "qkv": ((heads + 2 * groups) * model.head_dim, model.hidden),
        "output": (model.hidden, heads * model.head_dim),
        "up": (up, model.hidden),
        "down": (model.hidden, mlp.inner // tp),
        "lm_head": (model.vocab // tp, model.hidden),
    }


def _layers(model: ModelSpec, extent: Extent, tps: Sequence[int]) -> Iterator[MeasuredPoint]:
    for tokens, tp in product(extent.tokens, tps):
        params = sum(n * k for name, (n, k) in matrices(model, tp).items() if name != "lm_head")
        columns = {"tp": tp, "tokens": tokens, "hidden": model.hidden, "params": params, "weight_bits": _WEIGHT_BITS}
        yield MeasuredPoint(
            op="layer", kernel=LAYER_KERNEL, columns=columns, texts={"model": model.name, "op": "layer"}
        )


def _gemms(model: ModelSpec, extent: Extent, tps: Sequence[int]) -> Iterator[MeasuredPoint]:
    for m, tp in product(extent.tokens, tps):
        for name, (n, k) in matrices(model, tp).items():
            if name != "lm_head" or m <= 256:  # one row per sequence, not per token
                yield MeasuredPoint(
                    op="gemm", kernel=GEMM_KERNEL, columns={"m": m, "n": n, "k": k, "weight_bits": _WEIGHT_BITS}
                )


def _prefills(model: ModelSpec, extent: Extent, tps: Sequence[int]) -> Iterator[MeasuredPoint]:
    for tokens, past, tp in product(extent.prompts, extent.pasts, tps):
        if tokens + past <= extent.contexts[-1]:
            columns = {"batch": 1, "tokens": tokens, "past_tokens": past} | _heads(model, model.kv_heads // tp)
            yield MeasuredPoint(op="prefill_attention", kernel=ATTENTION_KERNEL, columns=columns)


def _decodes(model: ModelSpec, extent: Extent) -> Iterator[MeasuredPoint]:
    """Yield decode attention for any number of head groups, which a device may hold regardless of TP degrees."""
    groups = sorted({*_powers(1, model.kv_heads), model.kv_heads})
    for batch, context, kv_heads in product(extent.batches, extent.contexts, groups):
        if batch * context * kv_heads * model.head_dim * 4 <= extent.kv_limit_bytes:
            columns = {"batch": batch, "context_tokens": context} | _heads(model, kv_heads)
            yield MeasuredPoint(op="decode_attention", kernel=ATTENTION_KERNEL, columns=columns)


def _heads(model: ModelSpec, kv_heads: int) -> dict[str, int]:
    return {"query_heads": kv_heads * model.queries_per_group, "kv_heads": kv_heads, "head_dim": model.head_dim}


def _bytes(op: str, kernel: str, num_bytes: int, **texts: str) -> MeasuredPoint:
    return MeasuredPoint(op=op, kernel=kernel, columns={"num_bytes": num_bytes}, texts=texts)
