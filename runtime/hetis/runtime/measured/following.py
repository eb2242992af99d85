"""Coefficients that follow measured steps: a GPU that is throttled, or a link that is busy, gets fewer heads.

The measured time of a device is compared with the prediction of its calibration, step by step. The quotient is its
*scale*: the median of the latest quotients, within bounds, changed only if the difference is worth it, so that
dispatch stays calm under noise. A device without heads is not measured: its scale decays step by step, so that it gets
another chance.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from statistics import median

import numpy as np

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.measured.calibration import Clock, Taken, TimedDevice, device_seconds, scaled
from hetis.solver.dispatch.problem import Stage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Rules by which measured times become coefficients.

    Attributes:
        most_scale: bound on how many times slower, or faster, than calibrated a device is assumed to be.
        window: steps over which the median is taken; a change waits for as many.
        least_change: quotient of the new scale and the one in use from which on the new one is used.
        forget_steps: steps without a measurement after which the scale in use moves halfway back to 1 (its root).
        tell_change: quotient of the new scale and the one last logged from which on it is logged.
    """

    most_scale: float = 8.0
    window: int = 15
    least_change: float = 1.25
    forget_steps: int = 512
    tell_change: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDevice:
    """One device's scale in use and, summed over the layers whose time is known, their measured time and the time
    predicted with the scale then in use.
    """

    name: str
    scale: float
    measured_s: float
    predicted_s: float


class Following:
    """Follows the devices of a stage: `hear` their layers' times, or let `through` time them; then `advance`."""

    def __init__(
        self,
        calibrated: Stage,
        apply: Callable[[Stage], None],
        *,
        read_s: Sequence[float] = (),
        rules: Rules | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Initialise. ``apply`` receives the costs to use from now on; ``read_s`` holds the seconds to read an answer
        that is already there, for each device.
        """
        self.calibrated, self.rules = calibrated, rules or Rules()
        self._apply, self._clock = apply, clock
        self._heard: SimpleQueue[tuple[int, Taken]] = SimpleQueue()
        self._devices = [
            _Followed(name, self.rules, read_s[i] if read_s else 0.0) for i, name in enumerate(calibrated.devices)
        ]

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales in use, by device."""
        return tuple(device.scale for device in self._devices)

    @property
    def read_s(self) -> tuple[float, ...]:
        """The seconds to read an answer that is already there, by device."""
        return tuple(device.read_s for device in self._devices)

    def costs(self) -> tuple[MeasuredDevice, ...]:
        """Return the costs of every device. Other threads may call this."""
        return tuple(
            MeasuredDevice(
                name=device.name,
                scale=device.scale,
                measured_s=device.measured_s,
                predicted_s=device.predicted_s,
            )
            for device in self._devices
        )

    def through(self, number: int, device: AttentionDevice) -> AttentionDevice:
        """Return the device wrapped so that its next step is timed."""
        return TimedDevice(
            device,
            heard=lambda taken: self.hear(number, taken),
            clock=self._clock,
            read_s=self._devices[number].read_s,
        )

    def hear(self, number: int, taken: Taken) -> None:
        """Note a layer's time on a device, to count from the next `advance` on. Other threads may call this."""
        self._heard.put((number, taken))

    def advance(self) -> None:
        """Apply new costs, between two steps, if a scale has changed."""
        with suppress(Empty):
            while True:
                number, taken = self._heard.get_nowait()
                self._devices[number].hear(taken, self._calibrated_s(number, taken))
        changed = [device for device in self._devices if device.settle()]
        if changed:
            self._apply(scaled(self.calibrated, np.array(self.scales)))
        for device in changed:
            device.tell()

    def _calibrated_s(self, number: int, taken: Taken) -> float:
        loads = np.zeros((2, len(self._devices)))
        loads[:, number] = taken.heads, taken.kv_bytes
        return float(device_seconds(self.calibrated, loads[0], loads[1])[number])


class _Followed:
    """One device."""

    def __init__(self, name: str, rules: Rules, read_s: float) -> None:
        self.name, self.read_s = name, read_s
        self.scale = 1.0
        self.measured_s = self.predicted_s = 0.0
        self._rules = rules
        self._recent: deque[float] = deque(maxlen=rules.window)
        self._silent_steps = 0
        self._told = 1.0

    def hear(self, taken: Taken, calibrated_s: float) -> None:
        if calibrated_s <= 0:
            return
        self._silent_steps = 0
        if taken.is_known:
            self.measured_s += taken.most_s
            self.predicted_s += self.scale * calibrated_s
        # A time known only within an interval says nothing against a scale inside it.
        self._recent.append(min(max(self.scale, taken.least_s / calibrated_s), taken.most_s / calibrated_s))

    def settle(self) -> bool:
        """Use what was heard, once a step, and return whether the scale has changed."""
        rules = self._rules
        self._silent_steps += 1
        if self._silent_steps > rules.forget_steps:
            self._silent_steps = 0
            return self._change(1.0 if _apart(self.scale, 1.0) < rules.least_change else math.sqrt(self.scale))
        if len(self._recent) < rules.window:
            return False
        found = min(max(median(self._recent), 1 / rules.most_scale), rules.most_scale)
        return _apart(found, self.scale) >= rules.least_change and self._change(found)

    def tell(self) -> None:
        """Log a scale that is far from the one last logged."""
        if _apart(self.scale, self._told) >= self._rules.tell_change:
            self._told = self.scale
            _log.warning("device %s takes %.2g times what was measured at the start", self.name, self.scale)

    def _change(self, scale: float) -> bool:
        has_changed = scale != self.scale
        self.scale = scale
        if has_changed:
            self._recent.clear()
        return has_changed


def _apart(one: float, other: float) -> float:
    """Return the larger of the two divided by the smaller."""
    return max(one / other, other / one)
