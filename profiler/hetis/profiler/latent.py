"""Rates of multi-head latent attention under each engine; ``tools/engine_kernels.py`` derives them.

A module's time is one piece: ``fixed + P projections + F attention FLOPs``, in units of the GPU's peaks, and KV bytes
in decode, tokens and (token, head) pairs in prefill. The projections stay in the fit of dense layers; the rest
becomes fits of attention. Most of a small batch's time is fixed: a layer of latent attention starts twice as many
kernels as one of grouped queries.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hetis.profiler.engine_tables import (
    NEAREST,
    below_peak,
    kernels_in,
    provenance_of,
)
from hetis.profiler.fitting import rounded
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile

FILE = "latent.json"
MODEL = "deepseek-ai/DeepSeek-V3"  # model of the tables
# On the others SGLang runs TensorRT-LLM's kernels (trtllm_mla), and its tables lack the projections.
_SAME_KERNELS = {"sglang": "trtllm"}
# Query heads of DeepSeek-V3 and of Kimi-K2: no model of grouped queries has as many in a group.
LATENT_HEADS = (128, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentKernel:
    """One engine's latent attention in decode or prefill on one architecture.

    ``flop`` and ``byte`` are relative to the GPU's 16-bit peak and to its bandwidth; ``token`` and ``head`` are bytes
    per token, and per token and query head, at this bandwidth. ``fixed_s`` includes the start of the projections'
    kernels. ``mape`` is the error on the rows of the fit, with projections fitted beside it; the error in use, where
    projections are those of the dense fit, is larger and not stated.
    """

    architecture: str
    engine: str
    op: str
    fixed_s: float
    flop: float
    byte: float
    token: float
    head: float
    num_points: int
    mape: float
    origin: str


def latent_fits(gpu: GpuType, profile: Profile, engine: str) -> tuple[Fit, ...]:
    """Return the fits of latent attention of ``gpu`` under ``engine``.

    They are those of the only engine that was measured on its architecture, or Hopper's if none was.

    The fixed time of the profile's dense layers covers four products and the work between them. Two of these are
    attention's projections, so half of it is subtracted.
    """
    name = _SAME_KERNELS.get(engine, engine)
    found = [kernel for kernel in shipped() if kernel.architecture == gpu.architecture]
    found = found or [kernel for kernel in shipped() if kernel.architecture == NEAREST]
    found = [kernel for kernel in found if kernel.engine == name] or found
    return tuple(_fit(kernel, gpu, profile, heads) for kernel in found for heads in LATENT_HEADS)


def _fit(kernel: LatentKernel, gpu: GpuType, profile: Profile, heads: int) -> Fit:
    layer = next(fit for fit in profile.fits if fit.op is Op.DENSE and fit.scope.weight_bytes is None)
    piece = Piece(
        fixed_s=rounded(max(0.0, kernel.fixed_s - layer.start_s / 2.0)),
        flop_s=rounded(kernel.flop / gpu.fp16_flops),
        byte_s=rounded(kernel.byte / gpu.mem_bytes_per_s),
        token_s=rounded(kernel.token / gpu.mem_bytes_per_s),
        head_s=rounded(kernel.head / gpu.mem_bytes_per_s),
    )
    return Fit(
        op=Op(kernel.op),
        pieces=below_peak(piece, gpu.fp16_flops),
        provenance=provenance_of(kernel, gpu),
        scope=FitScope(queries_per_group=heads),
    )


@functools.cache
def shipped() -> tuple[LatentKernel, ...]:
    """Return the kernels that come with the package."""
    return kernels_in(FILE, LatentKernel)
