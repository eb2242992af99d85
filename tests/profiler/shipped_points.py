"""Points derived from the shipped profiles' own fits, on a grid of the serving range, in place of their tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from hetis.formats import catalogue
from hetis.profiler.defaults import shipped_gpus, shipped_profile
from hetis.profiler.fit.points import FEATURES, Points
from hetis.profiler.fitting import predict
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Source
from tools.efficiency import relative_to_peaks

HEAD_BYTES = 2 * 2 * 128  # KV of a token and head group: key and value, 128 elements of 16 bits
_MODELS = ("Llama-3.1-8B", "Qwen3-32B", "Llama-2-70B")
_TP = (1, 2, 4, 8)
_TOKENS = 2.0 ** np.arange(0, 14)
_CONTEXTS = 2.0 ** np.arange(8, 15)
_BATCHES = 2.0 ** np.arange(2, 10)
_MESSAGES = 2.0 ** np.arange(13, 29)
_SCOPES = (FitScope(), FitScope(weight_bytes=1.0), FitScope(head_dim=128), *(FitScope(tp=tp) for tp in _TP))
Case = tuple[str, dict[str, float], tuple[float, ...]]  # shape, sizes, features in the order of `FEATURES`


def shipped_points() -> dict[str, list[Points]]:
    """Return points of every shipped GPU as `tools.efficiency.relative_points` does, with the fits' times."""
    found = {}
    for name in shipped_gpus():
        gpu, profile = catalogue.find_gpu(name).gpu, shipped_profile(name)
        fits = [fit for fit in profile.fits if fit.provenance.source is Source.FITTED and fit.scope in _SCOPES]
        found[name] = relative_to_peaks([_points(fit, gpu) for fit in fits if fit.op is not Op.STEP], gpu)
    return found


def _points(fit: Fit, gpu: GpuType) -> Points:
    cases = list(_CASES[fit.op](fit, gpu))
    features = np.array([case for _, _, case in cases])
    pieces = [tuple(getattr(piece, name) for name in FEATURES[fit.op]) for piece in fit.pieces]
    return Points(
        op=fit.op,
        scope=fit.scope,
        features=features,
        seconds=predict(pieces, features),
        shapes=[shape for shape, _, _ in cases],
        sizes={name: np.array([sizes[name] for _, sizes, _ in cases]) for name in cases[0][1]},
        origin="the shipped profile",
    )


def _dense(fit: Fit, _gpu: GpuType) -> Iterator[Case]:
    weight_bytes = fit.scope.weight_bytes or 2.0
    for name, tp, tokens in product(_MODELS, _TP, _TOKENS):
        model = catalogue.find_model(name).model
        params = model.dense_layer_params() / tp
        num_bytes = weight_bytes * params + 16.0 * model.hidden * tokens
        yield f"{name} {tp}", {"tokens": tokens}, (1.0, 2.0 * tokens * params, num_bytes)


def _prefill(_fit: Fit, _gpu: GpuType) -> Iterator[Case]:
    for tp, tokens in product(_TP, _CONTEXTS):
        heads, groups = 64 / tp, 8 / tp
        work = (2.0 * heads * 128 * tokens**2, HEAD_BYTES * groups * tokens, tokens, tokens * heads)
        yield str(tp), {"tokens": tokens, "context_tokens": tokens}, (1.0, *work)


def _decode(_fit: Fit, _gpu: GpuType) -> Iterator[Case]:
    for tp, batch, context in product(_TP, _BATCHES, _CONTEXTS):
        work = (HEAD_BYTES * 8 / tp * batch * context, 64 / tp * batch)
        yield str(tp), {"batch": batch, "context_tokens": context}, (1.0, *work)


def _all_reduce(fit: Fit, gpu: GpuType) -> Iterator[Case]:
    ranks, link = fit.scope.tp or 2, gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s
    for num_bytes in _MESSAGES:
        yield "one", {"num_bytes": num_bytes}, (1.0, 2.0 * (ranks - 1) / ranks * num_bytes / link)


def _transfer(_fit: Fit, gpu: GpuType) -> Iterator[Case]:
    for num_bytes in _MESSAGES:
        yield "one", {"num_bytes": num_bytes}, (1.0, num_bytes / (gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s))


_CASES = {
    Op.DENSE: _dense,
    Op.PREFILL_ATTENTION: _prefill,
    Op.DECODE_ATTENTION: _decode,
    Op.ALL_REDUCE: _all_reduce,
    Op.TRANSFER: _transfer,
}
