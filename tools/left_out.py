"""Trials in which a measured GPU is left out: modelled from the others, and compared with its own measurements.

A GPU is modelled from other GPUs of its architecture where the operator was measured on one; otherwise every other
measured architecture is its relative in a trial of its own, so that none is chosen by the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from statistics import fmean

import numpy as np

from hetis.profiler.fit.errors import error_stats
from hetis.profiler.fit.points import Points
from hetis.profiler.fitting import Coefficients, FloatArray, predict, rounded

COVERED = 0.9
ANY_HOST = "other hosts"  # the relative of operators that depend on the host and not on the architecture

Pieces = tuple[Coefficients, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """The points of one operator on every GPU that was measured, with work relative to the GPU's peaks.

    Attributes:
        points: by GPU.
        sources: the GPUs from which others may be modelled.
        fit: fits the pieces to the points of some of them.
        family: operators of one family state one range, since none has enough trials of its own; None: the range is
            assumed and not derived from trials.
        by_architecture: whether only GPUs of one architecture are fitted together.
    """

    name: str
    points: Mapping[str, Points]
    sources: tuple[str, ...]
    fit: Callable[[Sequence[Points]], Pieces]
    family: str | None
    by_architecture: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One operator on one GPU, modelled without it from ``relative``, an architecture or `ANY_HOST`.

    ``ratios`` are modelled / measured seconds of every point.
    """

    op: str
    gpu: str
    relative: str
    ratios: FloatArray

    @property
    def factors(self) -> FloatArray:
        """The error of each modelled time in either direction: 0.5 is half as much again, or two thirds."""
        return np.maximum(self.ratios, 1.0 / self.ratios) - 1.0

    def covered(self, error: float) -> float:
        """Return the share of measured times from ``1 / (1 + error)`` to ``1 + error`` times the modelled one."""
        return float((self.factors <= error).mean())


@dataclass(slots=True, kw_only=True)
class Tables:
    """Measurements, and the trials that they make. Fits are kept, since trials share them."""

    operators: Mapping[str, Operator]
    architectures: Mapping[str, str]  # architecture of each GPU
    _pieces: dict[tuple[str, tuple[str, ...]], Pieces] = field(default_factory=dict)
    _errors: dict[tuple[str, frozenset[str]], float | None] = field(default_factory=dict)  # by family and `without`

    def trials(self, *, without: Collection[str] = ()) -> Iterator[Trial]:
        """Yield every trial of the GPUs that are not in ``without``, which take no part at all."""
        for op in self.operators.values():
            for gpu in sorted(set(op.points) - set(without)):
                for relative, names in self.relatives(op.name, gpu, without=without).items():
                    ratios = self._predicted(op, names, gpu) / op.points[gpu].seconds
                    yield Trial(op=op.name, gpu=gpu, relative=relative, ratios=ratios)

    def relatives(self, op_name: str, gpu: str, *, without: Collection[str] = ()) -> Mapping[str, tuple[str, ...]]:
        """Return, by architecture, the GPUs that can model ``gpu``: its own if one of that was measured."""
        op = self.operators[op_name]
        found: dict[str, tuple[str, ...]] = {}
        for name in op.sources:
            if name != gpu and name not in without:
                relative = self.architectures[name] if op.by_architecture else ANY_HOST
                found[relative] = (*found.get(relative, ()), name)
        own = self.architectures[gpu]
        return {own: found[own]} if own in found else found

    def range_error(self, op_name: str, *, without: Collection[str] = ()) -> float | None:
        """Return the range that the trials of the operator's family require, or None without trials.

        The GPUs in ``without`` take no part.
        """
        family = self.operators[op_name].family
        if family is None:
            return None
        key = (family, frozenset(without))
        if key not in self._errors:
            trials = [trial for trial in self.trials(without=without) if self.operators[trial.op].family == family]
            self._errors[key] = covering_error(trials) if trials else None
        return self._errors[key]

    def mean_error(self, op_name: str, *, without: Collection[str] = ()) -> float | None:
        """Return the mean error of predicting each remaining source from every other one. None: only one remains."""
        op = self.operators[op_name]
        pairs = list(permutations([name for name in op.sources if name not in without], 2))
        if not pairs or op.family is None:
            return None
        return rounded(fmean(error_stats(self._predicted(op, (a,), b), op.points[b].seconds).mape for a, b in pairs))

    def pieces(self, op_name: str, names: tuple[str, ...]) -> Pieces:
        """Return the pieces fitted to the points of these GPUs."""
        op, key = self.operators[op_name], (op_name, names)
        if key not in self._pieces:
            self._pieces[key] = op.fit([op.points[name] for name in names])
        return self._pieces[key]

    def _predicted(self, op: Operator, names: tuple[str, ...], gpu: str) -> FloatArray:
        return predict(self.pieces(op.name, names), op.points[gpu].features)


def covering_error(trials: Sequence[Trial]) -> float:
    """Return the error that nine in ten times of the next GPU do not exceed, if it is like those of the trials.

    This is the conformal quantile of two layers (Dunn, Wasserman and Ramdas 2023, pooled distributions): every trial
    has one vote, spread over its points, and one vote more is never covered, as the next GPU may be worse than any
    before. With fewer than nine trials there is no such quantile, and the largest error of all counts.
    """
    votes = min(COVERED * (len(trials) + 1), len(trials))
    factors = np.concatenate([trial.factors for trial in trials])
    weights = np.concatenate([np.full(len(trial.ratios), 1.0 / len(trial.ratios)) for trial in trials])
    order = np.argsort(factors, kind="stable")
    # The last sum is the number of trials up to rounding, so a vote that misses it by rounding is the last point.
    last = int(np.searchsorted(np.cumsum(weights[order]), votes * (1.0 - 1e-12)))
    # Upwards to a hundredth: rounding down would leave out the point that decides.
    return math.ceil(float(factors[order][min(last, len(order) - 1)]) * 100.0) / 100.0


def joined(sets: Sequence[Points]) -> Points:
    """Join the points of several GPUs, or of several GPU counts, into one set."""
    first = sets[0]
    cells = [cell for points in sets for cell in (points.cells or [frozenset()] * len(points))]
    return replace(
        first,
        features=np.concatenate([points.features for points in sets]),
        seconds=np.concatenate([points.seconds for points in sets]),
        shapes=[shape for points in sets for shape in points.shapes],
        sizes={name: np.concatenate([points.sizes[name] for points in sets]) for name in first.sizes},
        cells=cells if any(cells) else (),
        origin=" and ".join(dict.fromkeys(points.origin for points in sets)),
    )
