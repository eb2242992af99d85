"""Rates of fused experts under each engine: derived from the engines' published tables, in units of a GPU's peaks.

``python -m hetis.profiler.experts --tables DIR --out FILE`` reads ``SYSTEM/moe/ENGINE/VERSION/moe_perf.parquet`` of
aiconfigurator-core 0.12.0 (Apache-2.0; ``systems/data`` in its package) and writes the package's ``experts.json``. A
kernel's time is one piece, ``fixed + flop F + byte B``, for each number of ranks, and one for any number. The rows have
skewed routing; B counts the experts that even routing would touch and the activations that they move, as in the cost
model, so the skew is in the coefficients. Experts that are whole on their ranks (expert parallelism) have fits of their
own: the rank with the most tokens keeps the others waiting. The same tables always give the same bytes.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hetis.formats import catalogue
from hetis.formats.models.dtypes import BYTES_PER_PARAMETER
from hetis.profiler.engine_tables import (
    NEAREST,
    PUBLISHER,
    SYSTEMS,
    below_peak,
    kernels_in,
    make_file,
    provenance_of,
    rows_in,
)
from hetis.profiler.fit.layers import COLD_RATIO
from hetis.profiler.fit.points import CACHE_BYTES
from hetis.profiler.fitting import fit_pieces, rounded
from hetis.profiler.roofline import FOUR_BIT_BYTES, matrix_flops, shipped_efficiencies
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile

FILE = "experts.json"
_NEWEST = {"vllm": "0.24.0", "trtllm": "1.3.0rc20", "sglang": "0.5.14"}
_VERSIONS = {
    **dict.fromkeys(("b200_sxm", "h100_sxm", "l40s", "rtx_pro_6000_server"), _NEWEST),
    "b60": {"vllm": "0.26.0"},
    "a100_sxm": {"vllm": "0.14.0", "trtllm": "1.0.0", "sglang": "0.5.10"},
}
_FORMATS = {"bfloat16": "bfloat16", "fp8_block": "fp8", "nvfp4": "nvfp4", "int4_wo": "int4"}
# The kernels of gpt-oss; other models of these tables have others. TensorRT-LLM's on Blackwell quantise activations to
# eight bits. Those in SGLang's tables are not the ones that SGLang chooses: its MXFP4 experts stay dense products.
_MXFP4 = {
    **{(system, "vllm"): "w4a16_mxfp4" for system in ("b200_sxm", "h100_sxm", "l40s", "rtx_pro_6000_server", "b60")},
    **{(system, "trtllm"): "w4a8_mxfp4_mxfp8" for system in ("b200_sxm", "rtx_pro_6000_server")},
}
_MXFP4_HIDDEN = 2880  # gpt-oss's
# Further tables, as system, engine, its name here, version and formats. Triton's kernel for FP8 in blocks of 128, which
# vLLM's own tables have until 0.19.0, is what it runs on Blackwell without those of FlashInfer and DeepGEMM. TensorRT-
# LLM's table of H100 lacks the larger gpt-oss on one rank.
_TRITON_NAME = "vllm with Triton"
_FURTHER = (
    ("b200_sxm", "vllm", _TRITON_NAME, "0.19.0", {"fp8_block": "fp8"}),
    ("h200_sxm", "trtllm", "trtllm", "1.3.0rc20", {"w4a16_mxfp4": "mxfp4"}),
)
_IN_16_BITS = ("int4", "mxfp4")  # FLOPs of these formats are in units of the 16-bit peak
_SAME_KERNELS = {"trtllm": "sglang"}
_ROUTING = "power_law_1.2"  # one of three in the tables: what their publisher assumes for most models
_MOST_TOKENS, _MOST_RANKS = 16384, 16
_RANKS = (1, 2, 4, 8)
_ACTIVATION_BYTES = 2
_LEAST_POINTS = 54


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernel:
    """One engine's expert kernel for one format on one architecture. ``flop`` and ``byte`` are relative to the GPU's
    peaks. ``whole``: each expert is on one rank; otherwise, each rank has a slice of every expert. ``ranks`` is their
    number, None for any.
    """

    architecture: str
    engine: str
    weights: str
    whole: bool
    ranks: int | None
    fixed_s: float
    flop: float
    byte: float
    num_points: int
    mape: float
    origin: str


def expert_fits(
    gpu: GpuType, profile: Profile, engine: str, *, whole: bool, default_backend: bool = True
) -> tuple[Fit, ...]:
    """Return the experts' fits of ``gpu`` under ``engine``, for every format; ``profile`` has its dense products.

    If its architecture was not measured, they are those of its relative, or else Hopper's.

    ``whole`` experts are shared out among the ranks of a stage; others are sliced. The backend that TensorRT-LLM's
    recipes choose on Blackwell (``TRTLLM``) is also the one that SGLang calls. TensorRT-LLM's own tables have those
    that they choose where attention is data-parallel (``CUTLASS``, ``DEEPGEMM``): without ``default_backend``, fits are
    for those, and under vLLM for Triton's FP8 kernel.
    """
    names = [engine]
    if default_backend and gpu.architecture == "Blackwell" and engine in _SAME_KERNELS:
        names = [_SAME_KERNELS[engine], engine]
    elif engine == "vllm" and not default_backend:
        names = [_TRITON_NAME, engine]
    kernels = [kernel for kernel in shipped() if kernel.whole == whole]
    chosen = dict[str, list[ExpertKernel]]()
    for architecture, name in itertools.product((gpu.architecture, _relative(gpu.architecture), NEAREST), names):
        known = set(chosen)
        for kernel in kernels:
            if (kernel.architecture, kernel.engine) == (architecture, name) and kernel.weights not in known:
                chosen.setdefault(kernel.weights, []).append(kernel)
    if FOUR_BIT_BYTES.get(gpu.architecture) == BYTES_PER_PARAMETER["mxfp4"]:
        chosen.pop("mxfp4", None)  # it multiplies them in four bits, which no table has: those are dense products
    return tuple(_fit(kernel, gpu, profile) for found in chosen.values() for kernel in found)


def _relative(architecture: str) -> str | None:
    known = shipped_efficiencies().architectures.get(architecture)
    return None if known is None else known.relative


def _fit(kernel: ExpertKernel, gpu: GpuType, profile: Profile) -> Fit:
    piece = Piece(
        fixed_s=kernel.fixed_s,
        flop_s=rounded(kernel.flop / _peak_flops(gpu, kernel.weights)),
        byte_s=rounded(kernel.byte / gpu.mem_bytes_per_s),
    )
    if kernel.weights == "mxfp4":
        # Timed alone, these kernels take longer for few tokens (40 us on H100 under vLLM) than the layers of gpt-oss's
        # published runs have room for. So they read like dense products, and the start of a layer's dense products
        # covers theirs (docs/accuracy.md, "How a row becomes a problem").
        dense = next(fit for fit in profile.fits if fit.op is Op.DENSE and fit.scope == FitScope())
        piece = replace(piece, fixed_s=0.0, byte_s=max(each.byte_s for each in dense.pieces))
    if kernel.weights in _IN_16_BITS:  # their bytes per parameter depend on groups and on what is not quantised
        scope = FitScope(weights=kernel.weights, tp=kernel.ranks)
    else:
        scope = FitScope(weight_bytes=BYTES_PER_PARAMETER[kernel.weights], tp=kernel.ranks)
    pieces = below_peak(piece, _peak_flops(gpu, kernel.weights))
    return Fit(op=Op.EXPERTS, pieces=pieces, provenance=provenance_of(kernel, gpu), scope=scope)


def _peak_flops(gpu: GpuType, weights: str) -> float:
    """Return the peak rate that a kernel's FLOPs are relative to."""
    return gpu.fp16_flops if weights in _IN_16_BITS else matrix_flops(gpu, BYTES_PER_PARAMETER[weights])


@functools.cache
def shipped() -> tuple[ExpertKernel, ...]:
    """Return the kernels that come with the package."""
    return kernels_in(FILE, ExpertKernel)


def derived(tables: Path) -> Iterator[ExpertKernel]:
    """Yield every kernel for which the tables have enough points."""
    asked = [
        (system, engine, engine, version, _FORMATS | _mxfp4(system, engine))
        for system, versions in _VERSIONS.items()
        for engine, version in versions.items()
    ]
    for system, engine, kernel_engine, version, formats in (*asked, *_FURTHER):
        name = SYSTEMS[system]
        gpu = catalogue.find_gpu(name).gpu
        rows = rows_in(tables / system / "moe" / engine / version / "moe_perf.parquet")
        for dtype, whole in itertools.product(formats, (False, True)):
            origin = f"{PUBLISHER}, {engine} {version} on {name}, {dtype} experts"
            points = _points(rows, dtype, whole=whole)
            parts = {r: {key: s for key, s in points.items() if r in (None, key[-1])} for r in (None, *_RANKS)}
            for ranks, some in parts.items():
                if len(some) >= _LEAST_POINTS:
                    yield _kernel(
                        some, gpu, engine=kernel_engine, weights=formats[dtype], whole=whole, ranks=ranks,
                        origin=origin,
                    )  # fmt: skip


def _mxfp4(system: str, engine: str) -> dict[str, str]:
    dtype = _MXFP4.get((system, engine))
    return {} if dtype is None else {dtype: "mxfp4"}


Point = tuple[float, float, float, float, float, float]  # tokens, hidden, width, experts per token, experts, ranks


def _points(rows: Sequence[Mapping[str, Any]], dtype: str, *, whole: bool) -> dict[Point, float]:
    """Return the seconds of experts that are whole or sliced, by the fastest kernel.

    Ranks share slices (`moe_tp_size`) or whole experts (`moe_ep_size`); rows with both are left out.
    """
    shared_by, other = ("moe_ep_size", "moe_tp_size") if whole else ("moe_tp_size", "moe_ep_size")
    best: dict[Point, float] = {}
    for row in rows:
        if row["moe_dtype"] != dtype or row["distribution"] != _ROUTING or row[other] != 1:
            continue
        if "min_latency" in row["kernel_source"] or (whole and row[shared_by] == 1):  # rows of a separate backend
            continue
        if "mxfp4" in dtype and row["hidden_size"] != _MXFP4_HIDDEN:
            continue
        if row["num_tokens"] > _MOST_TOKENS or row["topk"] < 2 or row[shared_by] > _MOST_RANKS:
            continue
        names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", shared_by)
        tokens, hidden, width, chosen, experts, ranks = (float(row[name]) for name in names)
        key = tokens, hidden, width, chosen, experts, ranks
        best[key] = min(best.get(key, float("inf")), row["latency"] * 1e-3)
    return best


def _kernel(
    points: Mapping[Point, float], gpu: GpuType, *, engine: str, weights: str, whole: bool, ranks: int | None,
    origin: str,
) -> ExpertKernel:  # fmt: skip
    ordered = sorted(points.items())
    tokens, hidden, width, chosen, experts, on = np.array([key for key, _ in ordered]).T
    seconds = np.array([value for _, value in ordered])
    expert = 3.0 * hidden * width / on
    flops_s = 2.0 * tokens * chosen * expert / _peak_flops(gpu, weights)
    read = experts * (1.0 - (1.0 - chosen / experts) ** tokens)  # the expectation in `ModelSpec.touched_experts`
    weight_bytes = read * expert * BYTES_PER_PARAMETER[weights]
    moved = 4.0 * tokens * chosen * (hidden + width / on) * _ACTIVATION_BYTES  # `ModelSpec.expert_activation_bytes`
    bytes_s = (weight_bytes + moved) / gpu.mem_bytes_per_s
    # When called repeatedly, experts that fit are read from the cache; serving reads them from memory.
    cold_s = weight_bytes / gpu.mem_bytes_per_s / COLD_RATIO
    seconds = np.where(weight_bytes < CACHE_BYTES[gpu.name], np.maximum(seconds, cold_s), seconds)
    found = fit_pieces(np.stack([np.ones(len(seconds)), flops_s, bytes_s], axis=1), seconds, num_pieces=1)
    fixed_s, flop, byte = found.pieces[0]
    return ExpertKernel(
        architecture=gpu.architecture, engine=engine, weights=weights, whole=whole, ranks=ranks,
        fixed_s=rounded(fixed_s), flop=rounded(flop), byte=rounded(byte), num_points=len(seconds),
        mape=rounded(found.mape), origin=origin,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return make_file("experts", __doc__ or "", derived, arguments)


if __name__ == "__main__":
    sys.exit(main())
