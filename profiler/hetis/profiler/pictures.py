"""Profiles compared with measurements, in pictures, and with each other over typical points of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis.commands.pictures import file_of
from hetis.formats.measurements import Measurements
from hetis.profiler.calibrate.replica import ANY_LENGTHS, rank_of
from hetis.profiler.fit import selected_points
from hetis.profiler.fit.points import Points, seconds_by
from hetis.profiler.fitting import FloatArray
from hetis.solver.cluster import GpuType, Link
from hetis.solver.cost import DeviceCost
from hetis.solver.model import ModelSpec
from hetis.solver.profile import Fit, FitScope, Op, Profile

# The rows and columns of a picture of residuals; "" for none.
_AXES = {
    Op.DENSE: ("", "tokens"),
    Op.PREFILL_ATTENTION: ("batch", "context_tokens"),
    Op.DECODE_ATTENTION: ("batch", "context_tokens"),
    Op.ALL_REDUCE: ("", "num_bytes"),
    Op.TRANSFER: ("", "num_bytes"),
    Op.STEP: ("", "batch"),
}
_NEAR = 1.25  # an axis is divided by powers of two: a value this close to one counts as it
_LIMIT = 50.0  # percent at the ends of the colour scale
_LINK_BYTES_PER_S = 25e9  # for typical messages: a wire factor is multiplied with this


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """One operator: measured and fitted seconds, shape [rows], and each row's region."""

    title: str  # the operator and its shapes
    measured: FloatArray
    fitted: FloatArray
    # (row label, column label) of each row; the first is empty if one axis is enough
    regions: tuple[tuple[str, str], ...]
    axes: tuple[str, str]  # meaning of the two labels

    @property
    def residual(self) -> FloatArray:
        """Fitted over measured time minus one: above 0 the fit is too slow."""
        value: FloatArray = self.fitted / self.measured - 1.0
        return value

    @property
    def mape(self) -> float:
        return float(np.abs(self.residual).mean())

    @property
    def bias(self) -> float:
        return float(self.residual.mean())

    def by_region(self) -> tuple[list[str], list[str], FloatArray, NDArray[np.intp]]:
        """Return row and column labels, mean signed residual of each cell (NaN: nothing measured), and number of
        points.
        """
        rows, columns = (sorted({pair[i] for pair in self.regions}, key=_size) for i in (0, 1))
        total, count = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), dtype=np.intp)
        for (row, column), value in zip(self.regions, self.residual, strict=True):
            cell = rows.index(row), columns.index(column)
            total[cell] += value
            count[cell] += 1
        mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        return rows, columns, mean, count


def pairs_of(profile: Profile, measurements: Sequence[Measurements], gpu: GpuType) -> list[Pairs]:
    """Return every measured operator with the points that a fit would select, each point by its own fit.

    Shapes that differ in TP size or queries per group share a picture. A fit of all of them is omitted if there are
    fits of each, because it sees the same points.
    """
    families: dict[tuple[Op, int | None, float | None], list[tuple[Fit, Points]]] = {}
    for points in selected_points(measurements, gpu).points:
        of_op = [fit for fit in profile.fits if fit.op is points.op]
        of_scope = (fit for scope in (points.scope, FitScope()) for fit in of_op if fit.scope == scope)
        if fit := next(of_scope, None):
            key = points.op, points.scope.head_dim, points.scope.weight_bytes
            families.setdefault(key, []).append((fit, points))
    found = []
    for (op, head_dim, weight_bytes), members in families.items():
        single = [pair for pair in members if pair[1].scope.queries_per_group or pair[1].scope.tp] or members
        conditions = [f"head {head_dim}"] if head_dim else []
        conditions += [f"{weight_bytes:g} bytes/weight"] if weight_bytes else []
        conditions += [f"{len(single)} fits"] if len(single) > 1 else []
        name = op.value.replace("_", " ")
        found.append(
            Pairs(
                title=f"{name} ({', '.join(conditions)})" if conditions else name,
                measured=np.concatenate([points.seconds for _, points in single]),
                fitted=np.concatenate([seconds_by(fit, points.features) for fit, points in single]),
                regions=tuple(region for _, points in single for region in _regions(points)),
                axes=_AXES[op],
            )
        )
    return found


def _regions(points: Points) -> Iterator[tuple[str, str]]:
    labels = (
        [_bucket(size) for size in points.sizes[axis]] if axis in points.sizes else [""] * len(points)
        for axis in _AXES[points.op]
    )
    return zip(*labels, strict=True)


def _bucket(value: float) -> str:
    """Return the power of two at or below, as ``4k``. Sizes that miss the next one by little belong to it."""
    if value < 1:
        return "0"
    power = 2 ** int(np.floor(np.log2(value * _NEAR)))
    for limit, unit in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if power >= limit:
            return f"{power // limit}{unit}"
    return str(power)


def _size(label: str) -> float:
    """Return a key that sorts buckets by size."""
    factor = {"k": 2**10, "M": 2**20, "G": 2**30}.get(label[-1:], 1)
    digits = label.rstrip("kMG")
    return float(digits) * factor if digits else 0.0


def picture(pairs: Sequence[Pairs], title: str, form: str) -> bytes:
    """Draw, per operator, measured against fitted times, and the mean residual of each region.

    The result is a file of one of `hetis.commands.pictures.FORMS`. Needs matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(12, 3.6 * len(pairs) + 0.6), layout="constrained")
    grid = figure.subplots(len(pairs), 2, squeeze=False, width_ratios=(1, 1.5))
    for (left, right), one in zip(grid, pairs, strict=True):
        ends = (min(one.measured.min(), one.fitted.min()), max(one.measured.max(), one.fitted.max()))
        left.scatter(one.measured, one.fitted, s=10, alpha=0.5, color="#2a6fbb", linewidths=0)
        left.plot(ends, ends, ":", color="#888888", linewidth=1)
        left.set(xscale="log", yscale="log", xlabel="measured, s", ylabel="fitted, s")
        for axis in (left.xaxis, left.yaxis):
            axis.set_minor_formatter(NullFormatter())  # labels between the powers of ten overlap
        left.set_title(f"{one.title}: MAPE {one.mape:.1%} of all points", fontsize=10)
        rows, columns, mean, _ = one.by_region()
        image = right.imshow(
            100 * mean, cmap="RdBu_r", vmin=-_LIMIT, vmax=_LIMIT, aspect="auto", origin="lower", interpolation="nearest"
        )
        right.set_xticks(range(len(columns)), columns)
        right.set_yticks(range(len(rows)), rows)
        right.set(xlabel=one.axes[1].replace("_", " "), ylabel=one.axes[0].replace("_", " "))
        right.set_title("fitted / measured - 1, %, mean of each region", fontsize=10)
        for y, x in zip(*np.nonzero(~np.isnan(mean)), strict=True):
            color = "white" if abs(mean[y, x]) > 0.7 * _LIMIT / 100 else "black"
            right.text(x, y, f"{round(100 * mean[y, x]):+d}", ha="center", va="center", fontsize=7, color=color)
        figure.colorbar(image, ax=right, pad=0.01)
    return file_of(figure, title, form)


def typical_times(profile: Profile, model: ModelSpec, tp: int) -> Iterator[tuple[Op, str, float]]:
    """Yield (operator, point, seconds) at the same points in the same order; 0 s if the profile has no fit for it.

    The features are those of docs/cost-model.md. Times of dense layers include routed experts, by the experts' own fit
    if the profile has one, as in plans. Raises InvalidProblemError if the model cannot be split ``tp`` ways.
    """
    link = Link(bytes_per_s=_LINK_BYTES_PER_S, latency_s=0.0)
    cost = DeviceCost(model, profile, ANY_LENGTHS, rank_of(model, tp), link)
    heads, groups = model.q_heads / tp, max(1.0, model.head_groups / tp)
    kv_bytes = model.kv_bytes_per_token_group()

    def at(op: Op, point: str, **features: float) -> tuple[Op, str, float]:
        fit = profile.fit(op, model, tp)
        return op, point, 0.0 if fit is None else fit.seconds(**features)

    for tokens in (1, 16, 64, 256, 1024, 4096):
        yield Op.DENSE, f"{tokens} tokens", float(cost.dense_s(float(tokens)))
    for tokens, past in ((512, 0), (2048, 0), (2048, 8192)):
        context = past + tokens / 2
        yield at(
            Op.PREFILL_ATTENTION,
            f"{tokens} tokens after {past}",
            flops=model.attention_flops(tokens * model.attended_tokens(context), heads)
            + tokens * model.state_flops() / tp
            + tokens * model.scan_flops(context),
            num_bytes=(model.read_tokens(context) + tokens / 2) * groups * kv_bytes,
            tokens=tokens,
            heads=tokens * heads,
        )
    for batch, context in ((1, 1024), (8, 1024), (32, 1024), (32, 4096), (128, 2048)):
        attended = model.attended_tokens(context)
        yield at(
            Op.DECODE_ATTENTION,
            f"batch {batch}, context {context}",
            flops=model.decode_attention_flops(attended, 1.0) * batch * heads + batch * model.scan_flops(context),
            num_bytes=batch * groups * model.read_tokens(context) * kv_bytes
            + batch * model.state_traffic_bytes(1.0) / model.state_ranks(tp),
            heads=batch * heads,
        )
    for op in (Op.ALL_REDUCE, Op.TRANSFER):
        for num_bytes, words in ((2.0**14, "16 KiB"), (2.0**20, "1 MiB"), (2.0**26, "64 MiB")):
            wire_s = num_bytes / _LINK_BYTES_PER_S
            yield at(op, f"{words} at 25 GB/s", num_bytes=num_bytes, wire_s=wire_s)
    yield at(Op.STEP, "64 tokens", tokens=64.0)
    yield at(Op.SAMPLE, "64 sequences", tokens=64.0)
