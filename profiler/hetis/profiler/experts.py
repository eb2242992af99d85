"""Rates of fused experts under each engine, in units of a GPU's peaks; ``tools/engine_kernels.py`` derives them.

A kernel's time is one piece, ``fixed + flop F + byte B``, for each number of ranks, and one for any number. B counts
the experts that even routing would touch and the activations that they move, as in the cost model, so the skew of
routing is in the coefficients. Experts that are whole on their ranks (expert parallelism) have fits of their own: the
rank with the most tokens keeps the others waiting.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

from hetis.formats.models.dtypes import BYTES_PER_PARAMETER
from hetis.profiler.engine_tables import (
    NEAREST,
    below_peak,
    kernels_in,
    provenance_of,
)
from hetis.profiler.fitting import rounded
from hetis.profiler.roofline import FOUR_BIT_BYTES, matrix_flops, shipped_efficiencies
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile

FILE = "experts.json"
TRITON_NAME = "vllm with Triton"  # of vLLM's kernels for FP8 in blocks of 128 without FlashInfer and DeepGEMM
_IN_16_BITS = ("int4", "mxfp4")  # FLOPs of these formats are in units of the 16-bit peak
_SAME_KERNELS = {"trtllm": "sglang"}


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
        names = [TRITON_NAME, engine]
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
        flop_s=rounded(kernel.flop / peak_flops(gpu, kernel.weights)),
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
    pieces = below_peak(piece, peak_flops(gpu, kernel.weights))
    return Fit(op=Op.EXPERTS, pieces=pieces, provenance=provenance_of(kernel, gpu), scope=scope)


def peak_flops(gpu: GpuType, weights: str) -> float:
    """Return the peak rate that a kernel's FLOPs are relative to."""
    return gpu.fp16_flops if weights in _IN_16_BITS else matrix_flops(gpu, BYTES_PER_PARAMETER[weights])


@functools.cache
def shipped() -> tuple[ExpertKernel, ...]:
    """Return the kernels that come with the package."""
    return kernels_in(FILE, ExpertKernel)
