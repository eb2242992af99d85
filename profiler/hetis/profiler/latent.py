"""Rates of multi-head latent attention under each engine: derived from the engines' published tables.

``python -m hetis.profiler.latent --tables DIR --out FILE`` reads ``mla_*_module_perf.parquet`` in ``SYSTEM/mla/ENGINE``
of aiconfigurator-core 0.12.0 (Apache-2.0; ``systems/data`` in its package) and writes the package's ``latent.json``.
A row is a whole module of DeepSeek-V3: the projections around the latents, the products that are absorbed into them,
and attention itself. Its time is one piece: ``fixed + P projections + F attention FLOPs``, in units of the GPU's peaks,
and KV bytes in decode, tokens and (token, head) pairs in prefill. The projections stay in the fit of dense layers; the
rest becomes fits of attention. Most of a small batch's time is fixed: a layer of latent attention starts twice as many
kernels as one of grouped queries. The same tables always give the same bytes.
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
from hetis.profiler.fitting import fit_pieces, rounded
from hetis.profiler.roofline import matrix_flops
from hetis.solver.cluster import GpuType
from hetis.solver.model import ModelSpec
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile

FILE = "latent.json"
MODEL = "deepseek-ai/DeepSeek-V3"  # model of the tables
# vLLM's kernel is Triton's on GPUs without one made for them, and SGLang's, too. There TensorRT-LLM's takes as long for
# one request as for 16, which no sum of FLOPs and bytes expresses; its table is left out. a100_sxm has no such tables.
_VERSIONS = {
    **{system: {"vllm": "0.24.0", "trtllm": "1.3.0rc20"} for system in ("h100_sxm", "b200_sxm")},
    **{system: {"vllm": "0.24.0"} for system in ("rtx_pro_6000_server", "l40s")},
}
# On the others SGLang runs TensorRT-LLM's kernels (trtllm_mla), and its tables lack the projections.
_SAME_KERNELS = {"sglang": "trtllm"}
_OPS = {Op.DECODE_ATTENTION: "generation", Op.PREFILL_ATTENTION: "context"}
_FORMATS = {"bfloat16": "bfloat16", "fp8_block": "fp8", "nvfp4": "nvfp4"}
_KV_BYTES = {"bfloat16": 2.0, "fp8": 1.0}
# Query heads of DeepSeek-V3 and of Kimi-K2: no model of grouped queries has as many in a group.
LATENT_HEADS = (128, 64)
_LEAST_HEADS, _MOST_TOKENS, _MOST_CONTEXT = 8, 32768, 32768  # limits per rank, iteration and request


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


def derived(tables: Path) -> Iterator[LatentKernel]:
    """Yield the kernel of every system, engine and phase that is measured."""
    model = catalogue.find_model(MODEL).model
    for system, versions in _VERSIONS.items():
        name = SYSTEMS[system]
        gpu = catalogue.find_gpu(name).gpu
        for (engine, version), (op, phase) in itertools.product(versions.items(), _OPS.items()):
            path = tables / system / "mla" / engine / version / f"mla_{phase}_module_perf.parquet"
            rows = [row for row in rows_in(path) if _is_used(row, op)]
            origin = f"{PUBLISHER}, {engine} {version} on {name}, MLA {phase}"
            yield _kernel(rows, gpu, model, op=op, engine=engine, origin=origin)


def _is_used(row: Mapping[str, Any], op: Op) -> bool:
    tokens = row["batch_size"] * row["isl"]
    return (
        row["model"] == MODEL
        and row["gemm_type"] in _FORMATS
        and row["num_heads"] >= _LEAST_HEADS
        and tokens <= _MOST_TOKENS
        and row["step"] <= _MOST_CONTEXT
        and (op is Op.DECODE_ATTENTION or row["step"] == 0)
    )


def _kernel(
    rows: Sequence[Mapping[str, Any]], gpu: GpuType, model: ModelSpec, *, op: Op, engine: str, origin: str
) -> LatentKernel:  # fmt: skip
    features = np.array([_features(row, gpu, model, op) for row in rows])
    seconds = np.array([row["latency"] * 1e-3 for row in rows])
    found = fit_pieces(features, seconds, num_pieces=1)
    fixed_s, _, _, flop, *others = map(rounded, found.pieces[0])
    byte, token, head = (*others, 0.0, 0.0) if op is Op.DECODE_ATTENTION else (0.0, *others)
    return LatentKernel(
        architecture=gpu.architecture, engine=engine, op=op.value, fixed_s=fixed_s, flop=flop, byte=byte, token=token,
        head=head, num_points=len(rows), mape=rounded(found.mape), origin=origin,
    )  # fmt: skip


def _features(row: Mapping[str, Any], gpu: GpuType, model: ModelSpec, op: Op) -> tuple[float, ...]:
    """Return 1, and the seconds at the peaks of projections' FLOPs and bytes, of attention's FLOPs, and of its bytes.

    In decode these are of KV; in prefill one per token, and one per token and query head.
    """
    heads, batch, length = row["num_heads"], row["batch_size"], row["isl"]
    weights, bandwidth = BYTES_PER_PARAMETER[_FORMATS[row["gemm_type"]]], gpu.mem_bytes_per_s
    params, tokens = model.attention_params() * heads / model.q_heads, batch * length
    projected = 1.0, 2.0 * tokens * params / matrix_flops(gpu, weights), params * weights / bandwidth
    if op is Op.DECODE_ATTENTION:
        context, kv_bytes = row["step"] + length, _KV_BYTES[row["kv_cache_dtype"]]
        read = batch * context * replace(model, kv_bytes=kv_bytes).kv_bytes_per_token_group()
        flops = batch * model.decode_attention_flops(float(context), heads)
        return *projected, flops / gpu.fp16_flops, read / bandwidth
    flops = model.attention_flops(tokens * (length + 1) / 2, heads)
    return *projected, flops / gpu.fp16_flops, tokens / bandwidth, tokens * heads / bandwidth


def main(arguments: Sequence[str] | None = None) -> int:
    return make_file("latent", __doc__ or "", derived, arguments)


if __name__ == "__main__":
    sys.exit(main())
