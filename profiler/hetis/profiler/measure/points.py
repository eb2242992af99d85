"""Measurable points of an operator, and the candidates among which the next one is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """One thing to time.

    Attributes:
        op: name of the table it belongs to, such as ``gemm``.
        kernel: what computes it, such as ``torch sdpa``; points of two kernels never share a fit.
        columns: the table's numeric columns except ``seconds``; sizes in bytes, lengths in tokens.
        texts: its text columns, such as the path of a transfer.
    """

    op: str
    kernel: str
    columns: Mapping[str, int]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """A hashable value that is equal for points that are the same measurement."""
        return (self.op, self.kernel, *sorted(self.texts.items()), *sorted(self.columns.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSample:
    """Seconds of one call at a point.

    ``spread`` is the half-width of the 95% confidence interval of the median, relative to it. ``jitter`` is how far the
    slowest tenth of the samples lies above the median, relative to it, which reveals a busy neighbour. ``cold`` means
    that every call found its operands outside the cache (`hetis.profiler.measure.rotation`).
    """

    seconds: float
    spread: float
    jitter: float = 0.0
    cold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A point and its measurement."""

    point: MeasuredPoint
    sample: TimedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSeries:
    """Points that one smooth surface describes, because one kernel computes them all.

    Attributes:
        name: shown in progress messages.
        candidates: every point worth measuring, cheap ones first.
        axes: the columns that vary; the surface is over their logarithms.
        groups: groups of points, by key, that are only useful together, such as the products of a layer: measuring one
            leads to the others of its group.
    """

    name: str
    candidates: tuple[MeasuredPoint, ...]
    axes: tuple[str, ...]
    groups: Mapping[tuple[object, ...], str] = field(default_factory=dict)
