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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hetis.formats import catalogue
from hetis.formats.dtypes import BYTES_PER_PARAMETER
from hetis.profiler.engine_tables import NEAREST, PUBLISHER, SYSTEMS, kernels_in, make_file, provenance_of, rows_in
from hetis.profiler.fit.layers import COLD_RATIO
from hetis.profiler.fit.points import CACHE_BYTES
from hetis.profiler.fitting import fit_pieces, rounded
from hetis.profiler.roofline import matrix_flops, shipped_efficiencies
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Piece

FILE = "experts.json"
_NEWEST = {"vllm": "0.24.0", "trtllm": "1.3.0rc20", "sglang": "0.5.14"}
_VERSIONS = {
    **dict.fromkeys(("b200_sxm", "h100_sxm", "l40s", "rtx_pro_6000_server"), _NEWEST),
    "b60": {"vllm": "0.26.0"},
    "a100_sxm": {"vllm": "0.14.0", "trtllm": "1.0.0", "sglang": "0.5.10"},
}
# Triton's kernel for FP8 in blocks of 128, which vLLM's own tables have until 0.19.0: what it runs on Blackwell without
# those of FlashInfer and DeepGEMM. As engine, version and format of the table.
_TRITON = {"b200_sxm": ("vllm", "0.19.0", "fp8_block")}
_TRITON_NAME = "vllm with Triton"
# MXFP4 is left out: engines choose among kernels for it. The tables have vLLM's on Hopper, but its time for few tokens
# makes the published runs of gpt-oss slower than they were (docs/accuracy.md, "Where to expect larger errors").
_FORMATS = {"bfloat16": "bfloat16", "fp8_block": "fp8", "nvfp4": "nvfp4"}
_SAME_KERNELS = {"trtllm": "sglang"}
_ROUTING = "power_law_1.2"  # one of three in the tables: what their publisher assumes for most models
_MOST_TOKENS, _MOST_RANKS = 16384, 16
_RANKS = (1, 2, 4, 8)
_ACTIVATION_BYTES = 2
_LEAST_POINTS = 60


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


def expert_fits(gpu: GpuType, engine: str, *, whole: bool, default_backend: bool = True) -> tuple[Fit, ...]:
    """Return the experts' fits of ``gpu`` under ``engine``, for every format.

    If its architecture was not measured, they are those of its relative, or else Hopper's.

    ``whole`` experts are shared out among the ranks of a stage; others are sliced. The backend that TensorRT-LLM's
    recipes choose on Blackwell (``TRTLLM``) is also the one that SGLang calls. TensorRT-LLM's own tables have those
    that they choose where attention is data-parallel (``CUTLASS``, ``DEEPGEMM``): without ``default_backend``, fits are
    for those, and under vLLM for Triton's FP8 kernel.
    """
    names = [engine]
    if default_backend and gpu.architecture == "Blackwell":
        names = [_SAME_KERNELS.get(engine, engine)]
    elif engine == "vllm" and not default_backend:
        names = [_TRITON_NAME, engine]
    kernels = [kernel for kernel in shipped() if kernel.whole == whole]
    chosen = dict[str, list[ExpertKernel]]()
    for architecture, name in itertools.product((gpu.architecture, _relative(gpu.architecture), NEAREST), names):
        known = set(chosen)
        for kernel in kernels:
            if (kernel.architecture, kernel.engine) == (architecture, name) and kernel.weights not in known:
                chosen.setdefault(kernel.weights, []).append(kernel)
    return tuple(_fit(kernel, gpu) for found in chosen.values() for kernel in found)


def _relative(architecture: str) -> str | None:
    known = shipped_efficiencies().architectures.get(architecture)
    return None if known is None else known.relative


def _fit(kernel: ExpertKernel, gpu: GpuType) -> Fit:
    weight_bytes = BYTES_PER_PARAMETER[kernel.weights]
    piece = Piece(
        fixed_s=kernel.fixed_s,
        flop_s=rounded(kernel.flop / matrix_flops(gpu, weight_bytes)),
        byte_s=rounded(kernel.byte / gpu.mem_bytes_per_s),
    )
    scope = FitScope(weight_bytes=weight_bytes, tp=kernel.ranks)
    return Fit(op=Op.EXPERTS, pieces=(piece,), provenance=provenance_of(kernel, gpu), scope=scope)


@functools.cache
def shipped() -> tuple[ExpertKernel, ...]:
    """Return the kernels that come with the package."""
    return kernels_in(FILE, ExpertKernel)


def derived(tables: Path) -> Iterator[ExpertKernel]:
    """Yield every kernel for which the tables have enough points."""
    asked = [
        (system, engine, engine, version, tuple(_FORMATS))
        for system, versions in _VERSIONS.items()
        for engine, version in versions.items()
    ]
    asked += [(system, engine, _TRITON_NAME, version, (dtype,)) for system, (engine, version, dtype) in _TRITON.items()]
    for system, engine, kernel_engine, version, dtypes in asked:
        name = SYSTEMS[system]
        gpu = catalogue.find_gpu(name).gpu
        rows = rows_in(tables / system / "moe" / engine / version / "moe_perf.parquet")
        for dtype, whole in itertools.product(dtypes, (False, True)):
            origin = f"{PUBLISHER}, {engine} {version} on {name}, {dtype} experts"
            points = _points(rows, dtype, whole=whole)
            parts = {r: {key: s for key, s in points.items() if r in (None, key[-1])} for r in (None, *_RANKS)}
            for ranks, some in parts.items():
                if len(some) >= _LEAST_POINTS:
                    yield _kernel(
                        some, gpu, engine=kernel_engine, weights=_FORMATS[dtype], whole=whole, ranks=ranks,
                        origin=origin,
                    )  # fmt: skip


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
    flops_s = 2.0 * tokens * chosen * expert / matrix_flops(gpu, BYTES_PER_PARAMETER[weights])
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
