"""Profiles that no GPU of their type can have, and what makes plans with a profile less certain than they look.

The peaks are those of a GPU type, which a cluster may define otherwise than the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from hetis.formats.units import format_bytes
from hetis.profiler.fit.points import CACHE_BYTES
from hetis.profiler.plausibility import KV_BYTES, LEAST_LINK, LEAST_PEAKS, STEP_SECONDS, beyond, outside
from hetis.profiler.ranges import stated_error
from hetis.profiler.roofline import matrix_flops
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Profile

WANTED_ERROR = 0.10
_TOLERANCE = 1.15  # boost clocks and rounding go slightly above nominal peaks
# The same for types without an architecture: their peaks are often the best rates of one short run (`host_cluster`).
_TOLERANCE_OF_MEASURED_PEAKS = 1.5
_NO_ARCHITECTURE = "unknown"
# Prefill attention reads KV that was just written from the cache, and its bytes are few beside its FLOPs.
_CACHED = 4.0
_MOST_QUERIES = 63  # queries per KV head of models with grouped queries; models with latents have more
_LARGEST_CACHE = 256e6  # assumed for GPUs whose cache is not known: that of an MI300X
# Work of Llama-3-8B on one GPU, large enough that neither launches nor caches matter. For decode attention, many short
# requests, so that its time per query head shows next to its bytes.
_LAYER = {"flops": 2 * 218e6 * 8192, "num_bytes": 2 * 218e6, "tokens": 8192}
_MUCH: Mapping[Op, tuple[str, Mapping[str, float]]] = {
    Op.DENSE: ("a layer on 8,192 tokens", _LAYER),
    Op.EXPERTS: ("experts on 8,192 tokens", _LAYER),
    Op.PREFILL_ATTENTION: (
        "a prompt of 8,192 tokens",
        {"flops": 4.0 * 32 * 128 * 8192 * 4096, "num_bytes": 4096.0 * 8192, "tokens": 8192, "heads": 32 * 8192},
    ),
    Op.DECODE_ATTENTION: (
        "512 requests of 256 tokens",
        {"flops": 4.0 * 32 * 128 * 512 * 256, "num_bytes": 4096.0 * 512 * 256, "tokens": 512, "heads": 32 * 512},
    ),
    Op.ALL_REDUCE: ("a message of 256 MiB", {"num_bytes": 2.0**28, "tokens": 2.0**15}),
    Op.TRANSFER: ("a message of 256 MiB", {"num_bytes": 2.0**28}),
}
# The most bytes that an operator reads for few FLOPs, many times what fits into any cache: so nearly all come from
# memory. Weights are those of a layer of Llama-3-70B, and KV is again Llama-3-8B's.
_WEIGHTS = {"flops": 2 * 855e6, "num_bytes": 2 * 855e6, "tokens": 1}
_READING: Mapping[Op, tuple[str, Mapping[str, float]]] = {
    Op.DENSE: ("1.7 GB of weights on 1 token", _WEIGHTS),
    Op.EXPERTS: ("1.7 GB of weights on 1 token", _WEIGHTS),
    Op.DECODE_ATTENTION: (
        "64 requests of 8,192 tokens",
        {"flops": 4.0 * 32 * 128 * 64 * 8192, "num_bytes": 4096.0 * 64 * 8192, "tokens": 64, "heads": 32 * 64},
    ),
}


def implausible_fits(profile: Profile, gpu: GpuType) -> Iterator[tuple[Fit, str]]:
    """Yield fits whose time for much work is impossible on ``gpu`` by a factor like that of a wrong unit, and why."""
    link = gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s
    for fit in profile.fits:
        if fit.op in (Op.STEP, Op.SAMPLE):
            seconds = np.array([fit.seconds(tokens=64.0)])
            if seconds[0] > 0 and (doubt := outside(seconds, STEP_SECONDS, f"a {fit.op} of 64 tokens")):
                yield fit, doubt
            continue
        name, work = _MUCH[fit.op]
        if fit.op in (Op.ALL_REDUCE, Op.TRANSFER):
            least, least_s = LEAST_LINK, work["num_bytes"] / link
        else:
            flops_s = work["flops"] / matrix_flops(gpu, fit.scope.weight_bytes)
            least, least_s = LEAST_PEAKS, max(flops_s, work["num_bytes"] / gpu.mem_bytes_per_s)
        seconds_s = fit.seconds(**work, wire_s=least_s)
        if doubt := beyond(least_s / seconds_s if seconds_s > 0 else float("inf"), least, name, gpu):
            yield fit, doubt


def impossible(profile: Profile, gpu: GpuType) -> Iterator[str]:
    """Yield a sentence per number of a profile that no ``gpu`` can reach."""
    if profile.usable_bytes > gpu.memory_bytes:
        yield (
            f"usable_bytes is {format_bytes(profile.usable_bytes)}, more than the {format_bytes(gpu.memory_bytes)} of "
            f"a {gpu.name}"
        )
    if profile.reserve_bytes >= profile.usable_bytes:
        yield f"reserve_bytes is {format_bytes(profile.reserve_bytes)}, which leaves nothing of usable_bytes"
    tolerance = _tolerance(gpu)
    for fit in profile.fits:
        if fit.op not in (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION):
            continue
        # The rates for large work: those of the piece with the largest slope.
        flop_s, byte_s = (max(getattr(piece, name) for piece in fit.pieces) for name in ("flop_s", "byte_s"))
        flops = matrix_flops(gpu, fit.scope.weight_bytes)
        if flop_s > 0 and fit.op is not Op.DECODE_ATTENTION and 1 / flop_s > flops * tolerance:
            yield f"{_name(fit)} reaches {1 / flop_s / 1e12:.4g} TFLOP/s, {gpu.name} at most {flops / 1e12:.4g}"
        if fit.op is Op.PREFILL_ATTENTION:
            if byte_s > 0 and 1 / byte_s > gpu.mem_bytes_per_s * _CACHED:
                most = f"{gpu.name} at most {gpu.mem_bytes_per_s / 1e9:,.0f} from memory"
                yield f"{_name(fit)} reads {1 / byte_s / 1e9:,.0f} GB/s, {most}"
            continue
        what, bytes_per_s, most_per_s = _reading(fit, gpu)
        if bytes_per_s > most_per_s * tolerance:
            most = f"{gpu.name} at most {most_per_s / 1e9:,.0f}, its cache included"
            yield f"{_name(fit)} reads {bytes_per_s / 1e9:,.0f} GB/s for {what}, {most}"
    for fit, doubt in implausible_fits(profile, gpu):
        yield f"{_name(fit)}: {doubt}"


def above_peaks(profile: Profile, gpu: GpuType) -> Iterator[str]:
    """Yield a sentence per operator that is faster than the peaks of ``gpu`` where `impossible` does not look.

    These are experts, whose routing decides how much of the weights they read, and latent attention, for which many
    GPUs have no kernel of their own.
    """
    worst = dict[tuple[Op, int | None], tuple[float, str]]()
    tolerance = _tolerance(gpu)
    for fit in profile.fits:
        if fit.op is Op.EXPERTS:
            what, bytes_per_s, most_per_s = _reading(fit, gpu)
            rates = [(bytes_per_s / most_per_s, f"the bandwidth of {gpu.name}", what)]
            what, work = _MUCH[Op.EXPERTS]
            flops_s = work["flops"] / matrix_flops(gpu, fit.scope.weight_bytes)
            rates += [(flops_s / fit.seconds(**work), f"the FLOP/s of {gpu.name}", what)]
        elif fit.op is Op.DECODE_ATTENTION and (queries := fit.scope.queries_per_group or 0) > _MOST_QUERIES:
            what, work = _latent_work(queries)
            rates = [(work["flops"] / gpu.fp16_flops / fit.seconds(**work), f"the FLOP/s of {gpu.name}", what)]
        else:
            continue
        for ratio, peak, what in rates:
            if ratio > tolerance and ratio > worst.get((fit.op, fit.scope.queries_per_group), (0.0, ""))[0]:
                sentence = f"{_name(fit)}: {what} at {ratio:.2g} times {peak}: times may be longer than in plans"
                worst[fit.op, fit.scope.queries_per_group] = ratio, sentence
    yield from (sentence for _, sentence in worst.values())


def doubts_of(profile: Profile) -> Iterator[str]:
    """Yield a sentence for everything that makes a plan with this profile less certain than it may look.

    Fits of one operator with the same doubt share a sentence.
    """
    found = dict[tuple[Op, str], list[Fit]]()
    for fit in profile.fits:
        for doubt in _doubts(fit):
            found.setdefault((fit.op, doubt), []).append(fit)
    for (op, doubt), fits in found.items():
        yield f"{_name(fits[0]) if len(fits) == 1 else f'{op} ({len(fits)} fits)'}: {doubt}"


def _doubts(fit: Fit) -> Iterator[str]:
    error, assumed = fit.provenance.held_out_mape, f"plans assume {stated_error(fit):.0%}"
    if error is None and fit.op not in (Op.STEP, Op.SAMPLE):
        yield f"its error on held-out points is unknown, {assumed}"
    elif error is not None and error > WANTED_ERROR:
        wider = f", {assumed}" if fit.provenance.range_error is not None else ""
        yield f"its error on held-out points is {error:.1%}, the target is {WANTED_ERROR:.1%}{wider}"
    if fit.op is not Op.STEP and all(
        piece.flop_s == piece.byte_s == piece.token_s == piece.wire == 0 for piece in fit.pieces
    ):
        yield "takes the same time for any amount of work"


def scope_words(scope: FitScope) -> Iterator[str]:
    """Yield the conditions of a fit's scope."""
    if scope.model is not None:
        yield scope.model.rpartition("/")[2]
    if scope.tp is not None:
        yield f"TP {scope.tp}"
    if scope.head_dim is not None:
        yield f"head {scope.head_dim}"
    if scope.queries_per_group is not None:
        yield f"{scope.queries_per_group} q/group"
    if scope.weights is not None:
        yield scope.weights
    if scope.weight_bytes is not None:
        yield f"{scope.weight_bytes:g} B/weight"
    if scope.state_flops is not None:
        yield f"linear attention, {scope.state_flops:g} FLOP/token/head"


def _tolerance(gpu: GpuType) -> float:
    return _TOLERANCE_OF_MEASURED_PEAKS if gpu.architecture == _NO_ARCHITECTURE else _TOLERANCE


def _latent_work(queries: int) -> tuple[str, Mapping[str, float]]:
    """Return decode attention over DeepSeek-V3's latents (512 dimensions, 64 more for keys) with this many queries."""
    tokens = 64 * 8192
    work = {"flops": 2.0 * (576 + 512) * queries * tokens, "num_bytes": KV_BYTES * 576 * tokens, "heads": 64 * queries}
    return "64 requests of 8,192 tokens", work


def _reading(fit: Fit, gpu: GpuType) -> tuple[str, float, float]:
    """Return much reading, the rate of ``fit`` in it in bytes per second, and the GPU's with a full cache."""
    what, work = _READING[fit.op]
    most = gpu.mem_bytes_per_s / (1.0 - CACHE_BYTES.get(gpu.name, _LARGEST_CACHE) / work["num_bytes"])
    seconds = fit.seconds(**work)
    return what, work["num_bytes"] / seconds if seconds > 0 else 0.0, most


def _name(fit: Fit) -> str:
    scope = ", ".join(scope_words(fit.scope))
    return f"{fit.op.value} ({scope})" if scope else fit.op.value
