"""What can be measured: a point of an operator, and the candidates among which the next one is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """One thing to time.

    Attributes:
        op: name of the table it belongs to, such as ``gemm``.
        kernel: what computes it, such as ``torch sdpa``; points of two kernels never share a fit.
        columns: the table's numeric columns but ``seconds``; sizes in bytes, lengths in tokens.
        texts: its text columns, such as the path of a transfer.
    """

    op: str
    kernel: str
    columns: Mapping[str, int]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for points that are the same measurement, and hashable."""
        return (self.op, self.kernel, *sorted(self.texts.items()), *sorted(self.columns.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSample:
    """Seconds of one call at a point.

    ``spread`` is the half-width of the 95% confidence interval of the median, relative to it; ``jitter`` is how far
    the slow tenth of the samples lies above the median, relative to it, which is what a busy neighbour shows in.
    ``cold``: every call found its operands outside the cache (`hetis.profiler.measure.rotation`).
    """

    seconds: float
    spread: float
    jitter: float = 0.0
    cold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A point and what was found there."""

    point: MeasuredPoint
    sample: TimedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSeries:
    """Points that one smooth surface describes, because one kernel computes them all.

    Attributes:
        name: what progress calls it.
        candidates: every point worth measuring, the cheap ones first.
        axes: the columns that vary; the surface lives over their logarithms.
        groups: of points by key, where some are of use only together, such as the products of a layer: one that is
            measured brings the others of its group.
    """

    name: str
    candidates: tuple[MeasuredPoint, ...]
    axes: tuple[str, ...]
    groups: Mapping[tuple[object, ...], str] = field(default_factory=dict)
