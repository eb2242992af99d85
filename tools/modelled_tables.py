"""The tables of docs/accuracy.md: the coefficients, their errors, and the assumptions.

The errors are of predictions for tables that were not used in the fit: other kernels, experts, whole engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hetis.formats import catalogue
from hetis.formats.measurements import MeasuredOp
from hetis.profiler.fit import selected_points
from hetis.profiler.fit.attention import LAUNCH_S, decode_points
from hetis.profiler.fit.errors import SERVING, within
from hetis.profiler.fit.points import CACHE_BYTES, FEATURES, Points, tables_of
from hetis.profiler.fitting import FloatArray
from hetis.profiler.importers.reading import read_sheet
from hetis.profiler.roofline import Efficiencies, OpEfficiency, RelativePiece, modelled_profile
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Profile
from tools.profiles import ENGINE_TABLE, measurements_for
from tools.simulator_tables import import_tables
from tools.whole_engine import EngineTime, engine_times

LLAMA_2_70B = "meta-llama/Llama-2-70b-hf"
_GPUS = ("A100-SXM-80GB", "H100-SXM-80GB", "L40S")
_EXPERTS = {"A100-SXM-80GB": "aic_a100_sxm", "H100-SXM-80GB": "aic_h100_sxm", "L40S": "aic_l40s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Measured compared with predicted; ``ratio`` is the median of measured / predicted."""

    what: str
    num_points: int
    ratio: float
    mape: float


def comparisons(efficiencies: Efficiencies, folder: Path) -> Iterator[Comparison]:
    """Yield every table that has a counterpart in the model and was not used in the fit."""
    for name in _GPUS:
        gpu = catalogue.find_gpu(name).gpu
        profile, measurements = modelled_profile(gpu, efficiencies), measurements_for(name, folder)
        for others in selected_points(measurements, gpu).others:
            if others.scope in (FitScope(), FitScope(head_dim=128), FitScope(head_dim=128, queries_per_group=8)):
                what = f"{name} {others.op.replace('_', ' ')}, {_source(others.origin)}"
                yield _compare_points(what, profile, others)
        origin, table = next(tables_of(measurements, MeasuredOp.DECODE_ATTENTION))
        cache = CACHE_BYTES[name]
        for points in decode_points(replace(table, cold=True), gpu, origin):
            if points.scope == FitScope(head_dim=128):
                num_bytes = points.sizes["kv_bytes"]
                warm = (num_bytes < 2 * cache) & (num_bytes > LAUNCH_S * gpu.mem_bytes_per_s)
                yield _compare_points(f"{name} decode attention, KV within twice the cache", profile, points.kept(warm))
        for what, few in (("up to 64 tokens", True), ("above 64 tokens", False)):
            yield _experts(f"{name} fused experts, bf16, {what}", gpu, _fit(profile, Op.DENSE), folder, few=few)


def splitwise_token_times(efficiencies: Efficiencies, folder: Path) -> list[EngineTime]:
    """Return Llama-2-70B's times for one request (512 prompt, 128 output tokens), by tensor parallelism on NVLink."""
    profiles = {name: modelled_profile(catalogue.find_gpu(name).gpu, efficiencies) for name in _GPUS[:2]}
    times, _ = engine_times(import_tables("splitwise", [folder / ENGINE_TABLE]), profiles, LLAMA_2_70B)
    wanted = ("token", 1, 512, 128)
    return [time for time in times if (time.phase, time.batch, time.prompt_tokens, time.output_tokens) == wanted]


def _compare_points(what: str, profile: Profile, points: Points) -> Comparison:
    served = points.kept(within(SERVING[points.op], points.sizes, len(points)))
    features = dict(zip(FEATURES[points.op], served.features.T, strict=True))
    return _comparison(what, _predicted(_fit(profile, points.op), features), served.seconds)


def _experts(what: str, gpu: GpuType, dense: Fit, folder: Path, *, few: bool) -> Comparison:
    """Compare a fused expert layer (without attention and projections); routing is assumed to be even."""
    sheet = read_sheet(folder / f"{_EXPERTS[gpu.name]}_moe.csv.gz")
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    found = []
    for row in sheet:
        counts = [row.count(name) for name in names]
        seconds = row.seconds("latency_ms", unit_s=1e-3)
        if row.text("distribution") == "power_law_1.01" and None not in counts and seconds is not None:
            found.append([*(float(count) for count in counts if count is not None), seconds])
    sheet.finish()
    tokens, hidden, inner, topk, experts, tp, ep, seconds_s = np.array(found).T
    keep = (ep == 1) & (tokens <= 8192) & ((tokens <= 64) == few)
    params = 3.0 * hidden * inner / tp
    touched = experts * (1.0 - (1.0 - topk / experts) ** tokens)
    work = {"flop_s": 2.0 * tokens * topk * params, "byte_s": 2.0 * touched * params + 16.0 * hidden * tokens}
    predicted = _predicted(dense, {"fixed_s": np.ones(len(tokens)), **work})
    return _comparison(what, predicted[keep], seconds_s[keep])


def _fit(profile: Profile, op: Op) -> Fit:
    return next(fit for fit in profile.fits if fit.op is op and fit.scope == FitScope())


def _predicted(fit: Fit, features: Mapping[str, FloatArray]) -> FloatArray:
    """Return the seconds of every row of ``features``, which are named like their coefficients."""
    pieces = [sum((getattr(piece, name) * column for name, column in features.items()), 0.0) for piece in fit.pieces]
    seconds: FloatArray = np.max(np.stack([np.asarray(piece) for piece in pieces]), axis=0)
    return seconds


def _comparison(what: str, predicted: Sequence[float] | FloatArray, measured: FloatArray) -> Comparison:
    predicted = np.asarray(predicted)
    return Comparison(
        what=what,
        num_points=len(measured),
        ratio=float(np.median(measured / predicted)),
        mape=float(np.abs(predicted / measured - 1.0).mean()),
    )


def _source(origin: str) -> str:
    tool, _, engine = origin.partition(", ")
    return f"{tool.split()[0]} ({engine})"


Rows = Iterable[Sequence[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A fit of one GPU, its work relative to the peaks, compared with all points of another."""

    op: str
    fitted: str
    judged: str
    num_points: int
    mape: float
    bias: float


def modelled_tables(
    efficiencies: Efficiencies, pairs: Sequence[Pair], folder: Path, relatives: Mapping[str, str]
) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Yield name, headings and rows of every table.

    ``relatives`` has the relatives of architectures that were not measured and have operators of their own.
    """
    own = [
        (name, arch.name, op)
        for arch in efficiencies.architectures.values()
        for name, op in arch.ops.items()
        if arch.relative is None or op.measured_on
    ]
    rows = [_row(*each) for each in own]
    rows += [_row(name, "any", op) for name, op in efficiencies.links.items()]
    headings = ("op", "architecture", "pieces", "points", "fitted", "held out", "unseen GPUs")
    yield "modelled coefficients", headings, sorted(rows)
    origins = {f"{name} ({arch})": op for name, arch, op in own if op.num_points}
    origins.update(efficiencies.links)
    yield (
        "modelled provenance",
        ("fit", "origin"),
        ((name, f"{op.origin}{'; ' + op.note if op.note else ''}") for name, op in origins.items()),
    )
    yield (
        "modelled pairs",
        ("op", "fitted on", "predicts", "points", "MAPE", "bias"),
        ((p.op, p.fitted, p.judged, p.num_points, f"{p.mape:.1%}", f"{p.bias:+.1%}") for p in pairs),
    )
    yield (
        "modelled relatives",
        ("architecture", "relative", "FLOPs take", "why"),
        (
            (arch.name, relative, f"{arch.compute_factor:.3g}x", arch.reason)
            for arch in efficiencies.architectures.values()
            if (relative := arch.relative or relatives.get(arch.name)) is not None
        ),
    )
    yield (
        "modelled other tables",
        ("table", "points", "measured / predicted", "MAPE"),
        ((c.what, c.num_points, f"{c.ratio:.2f}", f"{c.mape:.0%}") for c in comparisons(efficiencies, folder)),
    )
    yield (
        "modelled engine",
        ("GPU", "TP", "measured ms/token", "predicted", "measured / predicted"),
        (
            (
                t.gpu,
                t.tp,
                f"{t.measured_s * 1e3:.1f}",
                f"{t.predicted_s * 1e3:.1f}",
                f"{t.measured_s / t.predicted_s:.2f}",
            )
            for t in splitwise_token_times(efficiencies, folder)
        ),
    )


def _row(name: str, arch: str, op: OpEfficiency) -> tuple[str, ...]:
    errors = (op.fitted_mape, op.held_out_mape, op.transfer_mape)
    points = str(op.num_points) if op.num_points else "borrowed" if arch != "any" else ""
    return name, arch, "; ".join(map(_piece, op.pieces)), points, *("" if e is None else f"{e:.1%}" for e in errors)


def _piece(piece: RelativePiece) -> str:
    terms = (
        (piece.fixed_s * 1e6, "us"),
        (piece.flop, "f"),
        (piece.byte, "b"),
        (piece.token_bytes / 1e3, "kB/token"),
        (piece.head_bytes / 1e3, "kB/head"),
        (piece.wire, "w"),
    )
    return " + ".join(f"{value:.3g} {unit}" for value, unit in terms if value) or "0"
