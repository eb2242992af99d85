"""What fused experts reach under each engine: derived from the engines' published tables, in units of a GPU's peaks.

``python -m hetis.profiler.experts --tables DIR --out FILE`` reads ``SYSTEM/moe/ENGINE/VERSION/moe_perf.parquet`` of
aiconfigurator-core 0.12.0 (Apache-2.0; ``systems/data`` in its package) and writes the package's ``experts.json``. A
kernel's time is one piece, ``fixed + flop F + byte B``. The rows have skewed routing; B counts the experts that even
routing would touch, as in the cost model, so the skew is in the coefficients. Small experts reach a third of the
matrix rate of dense layers. Experts that are whole on their ranks (expert parallelism) have fits of their own: they
begin sooner than slices of experts, and the rank with the most tokens keeps the others waiting. The same tables always
give the same bytes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hetis.formats import catalogue
from hetis.formats.dtypes import BYTES_PER_PARAMETER
from hetis.profiler.engine_tables import (
    NEAREST,
    PUBLISHER,
    SYSTEMS,
    kernels_in,
    make_file,
    provenance_of,
    rows_in,
    started_s,
)
from hetis.profiler.fit.layers import COLD_RATIO
from hetis.profiler.fit.points import CACHE_BYTES
from hetis.profiler.fitting import fit_pieces, rounded
from hetis.profiler.roofline import matrix_flops
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile

FILE = "experts.json"
_VERSIONS = {"vllm": "0.24.0", "trtllm": "1.3.0rc20", "sglang": "0.5.14"}
# MXFP4 is left out: engines choose among kernels for it, and the tables do not cover those that run gpt-oss.
_FORMATS = {"bfloat16": "bfloat16", "fp8_block": "fp8", "nvfp4": "nvfp4"}
_ROUTING = "power_law_1.2"  # one of three in the tables: what their publisher assumes for most models
_MOST_TOKENS = 16384
_LEAST_POINTS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernel:
    """One engine's expert kernel for one format on one architecture. ``flop`` and ``byte`` are relative to the GPU's
    peaks. ``whole``: each expert is on one rank; otherwise, each rank has a slice of every expert.
    """

    architecture: str
    engine: str
    weights: str
    whole: bool
    fixed_s: float
    flop: float
    byte: float
    num_points: int
    mape: float
    origin: str


def expert_fits(gpu: GpuType, profile: Profile, engine: str, *, whole: bool) -> tuple[Fit, ...]:
    """Return the experts' fits of ``gpu`` under ``engine``, one per format; Hopper's if nobody measured its own.

    ``whole`` experts are shared out among the ranks of a stage; others are sliced.

    The fixed time of the profile's dense layers covers four products and the work between them. Next to experts two of
    the four remain, so half of it is subtracted from the experts' own.
    """
    kernels = [kernel for kernel in shipped() if kernel.engine == engine and kernel.whole == whole]
    own = [kernel for kernel in kernels if kernel.architecture == gpu.architecture]
    near = [kernel for kernel in kernels if kernel.architecture == NEAREST]
    known = {kernel.weights for kernel in own}
    return tuple(_fit(kernel, gpu, profile) for kernel in (*own, *(one for one in near if one.weights not in known)))


def _fit(kernel: ExpertKernel, gpu: GpuType, profile: Profile) -> Fit:
    weight_bytes = BYTES_PER_PARAMETER[kernel.weights]
    flops = matrix_flops(gpu, weight_bytes)
    layers = {fit.scope.weight_bytes: fit for fit in profile.fits if fit.op is Op.DENSE}
    layer = layers.get(weight_bytes) or layers[None]
    already_s = started_s(layer)
    piece = Piece(
        fixed_s=rounded(max(0.0, kernel.fixed_s - already_s)),
        flop_s=rounded(kernel.flop / flops),
        byte_s=rounded(kernel.byte / gpu.mem_bytes_per_s),
    )
    return Fit(
        op=Op.EXPERTS, pieces=(piece,), provenance=provenance_of(kernel, gpu), scope=FitScope(weight_bytes=weight_bytes)
    )


@functools.cache
def shipped() -> tuple[ExpertKernel, ...]:
    """Return the kernels that come with the package."""
    return kernels_in(FILE, ExpertKernel)


def derived(tables: Path) -> Iterator[ExpertKernel]:
    """Yield every kernel for which the tables have enough points."""
    for system, name in SYSTEMS.items():
        gpu = catalogue.find_gpu(name).gpu
        for engine, version in _VERSIONS.items():
            rows = rows_in(tables / system / "moe" / engine / version / "moe_perf.parquet")
            for dtype, weights in _FORMATS.items():
                origin = f"{PUBLISHER}, {engine} {version} on {name}, {dtype} experts"
                for whole in (False, True):
                    if points := _points(rows, dtype, whole=whole):
                        yield _kernel(points, gpu, engine=engine, weights=weights, whole=whole, origin=origin)


Point = tuple[float, float, float, float, float, float]  # tokens, hidden, width, experts per token, experts, ranks


def _points(rows: Sequence[Mapping[str, Any]], dtype: str, *, whole: bool) -> dict[Point, float]:
    """Return the seconds of experts that are whole or sliced, by the fastest kernel, or nothing if points are too few.

    Ranks share slices (`moe_tp_size`) or whole experts (`moe_ep_size`); rows with both are left out.
    """
    shared_by, other = ("moe_ep_size", "moe_tp_size") if whole else ("moe_tp_size", "moe_ep_size")
    best: dict[Point, float] = {}
    for row in rows:
        if row["moe_dtype"] != dtype or row["distribution"] != _ROUTING or row[other] != 1:
            continue
        if whole and row[shared_by] == 1:
            continue
        if row["num_tokens"] > _MOST_TOKENS or row["topk"] < 2:
            continue
        names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", shared_by)
        tokens, hidden, width, chosen, experts, ranks = (float(row[name]) for name in names)
        key = tokens, hidden, width, chosen, experts, ranks
        best[key] = min(best.get(key, float("inf")), row["latency"] * 1e-3)
    return best if len(best) >= _LEAST_POINTS else {}


def _kernel(
    points: Mapping[Point, float], gpu: GpuType, *, engine: str, weights: str, whole: bool, origin: str
) -> ExpertKernel:  # fmt: skip
    ordered = sorted(points.items())
    tokens, hidden, width, chosen, experts, ranks = np.array([key for key, _ in ordered]).T
    seconds = np.array([value for _, value in ordered])
    expert = 3.0 * hidden * width / ranks
    flops_s = 2.0 * tokens * chosen * expert / matrix_flops(gpu, BYTES_PER_PARAMETER[weights])
    read = experts * (1.0 - (1.0 - chosen / experts) ** tokens)  # the expectation in `ModelSpec.touched_experts`
    bytes_s = read * expert * BYTES_PER_PARAMETER[weights] / gpu.mem_bytes_per_s
    # When called repeatedly, experts that fit are read from the cache; serving reads them from memory.
    cached = bytes_s * gpu.mem_bytes_per_s < CACHE_BYTES[gpu.name]
    seconds = np.where(cached, np.maximum(seconds, bytes_s / COLD_RATIO), seconds)
    found = fit_pieces(np.stack([np.ones(len(seconds)), flops_s, bytes_s], axis=1), seconds, num_pieces=1)
    fixed_s, flop, byte = found.pieces[0]
    return ExpertKernel(
        architecture=gpu.architecture, engine=engine, weights=weights, whole=whole, fixed_s=rounded(fixed_s),
        flop=rounded(flop), byte=rounded(byte), num_points=len(seconds), mape=rounded(found.mape), origin=origin,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return make_file("experts", __doc__ or "", derived, arguments)


if __name__ == "__main__":
    sys.exit(main())
