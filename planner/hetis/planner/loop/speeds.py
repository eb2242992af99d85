"""Measured speeds of replicas beside those that their profiles say: corrections with error bars, and slow cards.

A minute of a replica gives the ratio of its measured mean TPOT to the time that the cost model says of an iteration
with as many requests as ran. A correction is the mean of the ratios of some minutes; its error is half the width of
the 95% interval of Student's t, in which minutes of one replica, or replicas of one kind, count as independent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev

import numpy as np

from hetis.solver.check.rederive import derive
from hetis.solver.check.replica_shapes import Fleet, ReplicaShape, replica_shape
from hetis.solver.check.setting import Setting
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import ReplicaPlan
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import Workload

LEAST_TOKENS = 20.0  # of a minute that counts
SLOW = 1.15  # times as long as expected, from which a card counts as slow
_SIZES = 12  # at which a replica's times are computed; between them they are interpolated
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSample:
    """A minute of a replica: the seconds per output token of so many tokens, while so many requests ran on average."""

    tpot_s: float
    tokens: float
    running: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredReplica:
    """A replica that runs, and its last minutes.

    ``slow_devices``: those that its engine, or their driver, says are slower than planned.
    """

    name: str
    plan: ReplicaPlan
    samples: Sequence[SpeedSample]
    slow_devices: tuple[str, ...] = ()

    @property
    def gpus(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.gpu for part in self.plan.parts()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The correction of one replica, or of all replicas on the same GPU types (``replica`` is empty).

    Attributes:
        correction: measured over expected seconds. ``error``: half its 95% interval; infinite if nothing says.
        is_slow: it is `SLOW` times as slow as its profile or, where there are several, as others of its kind.
        devices: what to look at.
    """

    replica: str
    gpus: tuple[str, ...]
    tpot_s: float
    expected_s: float
    correction: float
    error: float
    is_slow: bool = False
    devices: tuple[str, ...] = ()


class ExpectedTimes:
    """Seconds per output token of a plan's replicas for any number of running requests."""

    def __init__(self, problem: PlacementProblem, workload: Workload | None = None) -> None:
        """Prepare them for the problem's requests, or for those that were measured."""
        self._problem = problem if workload is None else replace(problem, workload=workload)
        clipped = self._problem.workload.clipped_to(problem.model.max_position)
        self._moments = clipped.moments(block_tokens=problem.assumptions.block_tokens)
        self._fleet = Fleet.of(problem.cluster)
        self._curves: dict[ReplicaShape, tuple[list[int], list[float]]] = {}

    def tpot_s(self, replica: ReplicaPlan, running: float) -> float:
        """Return the time with ``running`` requests. Raises InvalidProblemError if the fleet lacks its GPUs."""
        if any(device not in self._fleet.devices for device in replica.devices()):
            raise InvalidProblemError("the fleet lacks GPUs of the replica")
        shape = replica_shape(replica, self._problem, self._fleet)
        if shape not in self._curves:
            most = 2 * max(shape.micro_batch, math.ceil(replica.max_num_seqs / shape.in_flight))
            sizes = sorted({round(most ** (k / (_SIZES - 1))) for k in range(_SIZES)})
            self._curves[shape] = sizes, [self._at(shape, size) for size in sizes]
        sizes, times_s = self._curves[shape]
        return float(np.interp(running / shape.in_flight, sizes, times_s))

    def _at(self, shape: ReplicaShape, size: int) -> float:
        sized = replace(shape, micro_batch=size)
        derived = derive(Setting.of(self._problem, self._moments, sized), sized)
        return float(derived.t_s * derived.tpot_per_t)


def speeds(replicas: Iterable[MeasuredReplica], expected: ExpectedTimes) -> list[Speed]:
    """Return the corrections: of every kind of GPUs, then of its replicas that are slow."""
    by_gpus = defaultdict[tuple[str, ...], list[tuple[MeasuredReplica, Speed]]](list)
    for replica in replicas:
        if (found := _speed(replica, expected)) is not None:
            by_gpus[found.gpus].append((replica, found))
    rows = list[Speed]()
    for gpus, members in sorted(by_gpus.items()):
        every = [one for _, one in members]
        rows.append(_of_kind(gpus, every))
        for replica, one in members:
            others = [other.correction for other in every if other is not one]
            usual = median(others) if others else 1.0
            if one.correction - one.error > SLOW * usual:
                devices = replica.slow_devices or tuple(replica.plan.devices())
                rows.append(replace(one, is_slow=True, devices=devices))
    return rows


def corrections(rows: Iterable[Speed]) -> Mapping[str, float]:
    """Return what the profile of each GPU type is to be multiplied by: of types that run replicas of their own, where
    the correction is known within a tenth.
    """
    return {row.gpus[0]: row.correction for row in rows if not row.replica and len(row.gpus) == 1 and row.error < 0.1}


def _speed(replica: MeasuredReplica, expected: ExpectedTimes) -> Speed | None:
    samples = [one for one in replica.samples if one.tokens >= LEAST_TOKENS and one.tpot_s > 0 and one.running > 0]
    try:
        times_s = [expected.tpot_s(replica.plan, one.running) for one in samples]
    except InvalidProblemError:
        return None
    if not samples or min(times_s) <= 0:
        return None
    ratios = [one.tpot_s / time_s for one, time_s in zip(samples, times_s, strict=True)]
    return Speed(
        replica=replica.name,
        gpus=replica.gpus,
        tpot_s=fmean(one.tpot_s for one in samples),
        expected_s=fmean(times_s),
        correction=fmean(ratios),
        error=_error(ratios),
    )


def _of_kind(gpus: tuple[str, ...], members: Sequence[Speed]) -> Speed:
    correction = fmean(one.correction for one in members)
    error = members[0].error if len(members) == 1 else _error([one.correction for one in members])
    return Speed(
        replica="",
        gpus=gpus,
        tpot_s=fmean(one.tpot_s for one in members),
        expected_s=fmean(one.expected_s for one in members),
        correction=correction,
        error=error,
        is_slow=correction - error > SLOW,
    )


def _error(values: Sequence[float]) -> float:
    """Return half the width of the 95% interval of the mean."""
    if len(values) < 2:
        return math.inf
    return _T95[min(len(values) - 1, len(_T95)) - 1] * stdev(values) / math.sqrt(len(values))
