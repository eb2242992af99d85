"""The cost of attention on the devices of one engine: measured when they join, as coefficients of the solver's stage,
and updated while they work.

The measured time of a device is compared with the prediction of its calibration, step by step. The quotient is its
*scale*: the median of the latest quotients, within bounds, changed only if the difference is worth it, so that
dispatch stays calm under noise: a GPU that is throttled, or a link that is busy, gets fewer heads. A device without
heads is not measured: its scale decays step by step, so that it gets another chance.

A device in another process computes while the engine does something else, and its answer may have been there for long
when the engine requests it. Then only an upper bound is known: it took no longer than until that moment. `LayerTime` is
therefore an interval.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from statistics import median

import numpy as np

from hetis.runtime.vllm.calibration import Calibration, Coefficients, Piece, device_seconds, scaled, with_coefficients
from hetis.solver.dispatch.dispatch_problem import FloatArray, HeadShape, Primary, Stage

MOST_SCALE = 8.0  # bound on how many times slower, or faster, than calibrated a device is assumed to be
WINDOW = 15  # steps over which the median is taken; a change waits for as many
LEAST_CHANGE = 1.25  # quotient of the new scale and the one in use from which on the new one is used
FORGET_STEPS = 512  # steps without a measurement after which the scale in use moves halfway back to 1 (its root)
LOG_CHANGE = 2.0  # quotient of the new scale and the one last logged from which on it is logged
OVER_READING = 2.0  # waiting longer than this multiple of the time to read an answer was real waiting
_log = logging.getLogger(__name__)
HERE = "here"  # name of the ranks as a device
_LINK_BYTE_S = 1e-9  # seconds per byte of copies, if none were measured


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """The time that one layer of one step took on one device: ``least_s`` to ``most_s`` seconds, equal if it is known,
    for this many query heads and the KV bytes that they read.
    """

    heads: int
    kv_bytes: float
    least_s: float
    most_s: float


class CostTracker:
    """Follows the devices of a stage: pass their layers' times to `record`, then call `advance` once a step."""

    def __init__(self, calibrated: Stage, apply: Callable[[Stage], None]) -> None:
        """Initialise. ``apply`` receives the costs to use from now on."""
        self.calibrated = calibrated
        self._apply = apply
        self._recorded: SimpleQueue[tuple[int, LayerTime]] = SimpleQueue()
        self._devices = [_DeviceScale(name) for name in calibrated.devices]

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales in use, by device."""
        return tuple(device.scale for device in self._devices)

    def record(self, number: int, taken: LayerTime) -> None:
        """Record a layer's time on a device for the next `advance`. Other threads may call this."""
        self._recorded.put((number, taken))

    def advance(self) -> None:
        """Apply new costs, between two steps, if a scale has changed."""
        with suppress(Empty):
            while True:
                number, taken = self._recorded.get_nowait()
                loads = np.zeros((2, len(self._devices)))
                loads[:, number] = taken.heads, taken.kv_bytes
                self._devices[number].record(taken, float(device_seconds(self.calibrated, *loads)[number]))
        changed = [device for device in self._devices if device.settle()]
        if changed:
            self._apply(scaled(self.calibrated, np.array(self.scales)))
        for device in changed:
            device.log_change()


class _DeviceScale:
    """The scale of one device, and the quotients measured since it changed."""

    def __init__(self, name: str) -> None:
        self.name, self.scale = name, 1.0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._silent_steps = 0
        self._logged = 1.0

    def record(self, taken: LayerTime, calibrated_s: float) -> None:
        if calibrated_s > 0:
            self._silent_steps = 0
            # Any scale within the interval of a time is consistent with it.
            self._recent.append(min(max(self.scale, taken.least_s / calibrated_s), taken.most_s / calibrated_s))

    def settle(self) -> bool:
        """Apply the recorded quotients, once a step, and return whether the scale has changed."""
        self._silent_steps += 1
        if self._silent_steps > FORGET_STEPS:
            self._silent_steps = 0
            return self._change(1.0 if _apart(self.scale, 1.0) < LEAST_CHANGE else math.sqrt(self.scale))
        if len(self._recent) < WINDOW:
            return False
        found = min(max(median(self._recent), 1 / MOST_SCALE), MOST_SCALE)
        return _apart(found, self.scale) >= LEAST_CHANGE and self._change(found)

    def log_change(self) -> None:
        """Log a scale that is far from the one last logged."""
        if _apart(self.scale, self._logged) >= LOG_CHANGE:
            self._logged = self.scale
            _log.warning("device %s takes %.2g times what was measured at the start", self.name, self.scale)

    def _change(self, scale: float) -> bool:
        has_changed, self.scale = scale != self.scale, scale
        if has_changed:
            self._recent.clear()
        return has_changed


def _apart(one: float, other: float) -> float:
    """Return the larger of the two divided by the smaller."""
    return max(one / other, other / one)


class EngineCosts:
    """The costs of one engine's devices: 0 is the ranks themselves, the workers follow.

    Each rank and its workers are measured separately; the slowest counts.
    """

    def __init__(self, heads: HeadShape, workers: Sequence[str]) -> None:
        """Initialise with equally fast devices, until they are measured; reaching a worker costs a little."""
        num = 1 + len(workers)
        away = np.array([0.0] + [1.0] * len(workers))
        self._first = Stage(
            heads=heads,
            devices=(HERE, *workers),
            head_s=np.full((num, 1), 1e-7),
            kv_byte_s=np.full((num, 1), 1e-10),
            call_s=np.full((num, 1), 1e-5),
            transfer_byte_s=1e-10 * away,
            transfer_s=1e-5 * away,
            primary=Primary(device=0),
        )
        self.stage = self._first  # the costs in use
        self._measured: dict[tuple[int, int], Calibration] = {}  # keyed by device and rank
        self._tracker: CostTracker | None = None
        self._apply: Callable[[Stage], None] = lambda stage: None

    def follow(self, apply: Callable[[Stage], None]) -> None:
        """Set the function that receives the costs to use from now on."""
        self._apply = apply

    def measured(self, rank: int, calibrations: Mapping[int, Calibration], share: float = 1.0) -> None:
        """Take a rank's calibrations of devices, by their numbers, from the time when they joined it.

        ``share``: of the model's layers, those that the rank computes; times per layer count by it.
        """
        if not calibrations:
            return
        self._measured |= {(device, rank): found.weighted(share) for device, found in calibrations.items()}
        names = self._first.devices
        known = {names[device]: self._slowest(device).coefficients for device in self._devices_measured()}
        calibrated = with_coefficients(self._first, known)
        self._use(calibrated)
        # Scales of the other devices were learnt against the same coefficients, and are soon learnt again.
        self._tracker = CostTracker(calibrated, self._use)

    def planned(self, known: Mapping[str, Coefficients]) -> None:
        """Take a plan's coefficients, by device. They are only used if nothing was measured at all."""
        if not self._measured:
            self._use(with_coefficients(self._first, known))

    def record(self, device: int, taken: Sequence[LayerTime], share: float = 1.0) -> None:
        """Record the times of steps on a device; ``share`` as in `measured`."""
        if self._tracker is not None and any(number == device for number, _ in self._measured):
            for one in taken:
                weighted = replace(one, least_s=share * one.least_s, most_s=share * one.most_s)
                self._tracker.record(device, weighted)

    def advance(self) -> None:
        """Update the costs, once a step, from the recorded times."""
        if self._tracker is not None:
            self._tracker.advance()

    @property
    def is_measured(self) -> bool:
        """Return whether any device has been measured."""
        return bool(self._measured)

    @property
    def scales(self) -> tuple[float, ...]:
        """The present cost of each device divided by that measured when it joined."""
        return (1.0,) * len(self._first.devices) if self._tracker is None else self._tracker.scales

    @property
    def link_byte_s(self) -> FloatArray:
        """Seconds per byte of KV that leaves each device, shape [D]."""
        found = np.full(len(self._first.devices), _LINK_BYTE_S)
        for device in self._devices_measured():
            found[device] = self._slowest(device).copy_byte_s or _LINK_BYTE_S
        return found

    def _use(self, stage: Stage) -> None:
        self.stage = stage
        self._apply(stage)

    def _devices_measured(self) -> list[int]:
        return sorted({device for device, _ in self._measured})

    def _slowest(self, device: int) -> Calibration:
        """Return the maximum of each number over the ranks."""
        found = [one for (number, _), one in self._measured.items() if number == device]
        costs = [one.coefficients for one in found]
        pieces: list[Piece] = [
            (max(p[0] for p in same), max(p[1] for p in same), max(p[2] for p in same))
            for same in zip(*(one.pieces for one in costs), strict=True)
        ]
        byte_s, exchange_s = max(one.transfer_byte_s for one in costs), max(one.transfer_s for one in costs)
        return Calibration(
            coefficients=Coefficients(pieces=tuple(pieces), transfer_byte_s=byte_s, transfer_s=exchange_s),
            copy_byte_s=max(one.copy_byte_s for one in found),
            read_s=max(one.read_s for one in found),
        )
