"""How much slower devices are than their profiles say, from measured times that are noisy."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 7  # reports
STEP = 0.25  # share that the factor must change by before it is believed
MOST = 16.0  # and its inverse: beyond that the measurement is nonsense, or the device is as good as lost


class Slowness:
    """Measured by predicted time of each device of a stage, as a factor that changes seldom.

    The median of the last seven ratios: three outliers of seven change nothing, and a device that is twice as slow is
    known as exactly that after four reports, where a mean would pass through all values in between, each of them a
    reason to move something. The factor is changed when the median has left it by more than a quarter, which medians of
    ordinary noise do not. Until seven ratios are known there are 1s in their place: the profile is right unless four
    reports say otherwise.
    """

    def __init__(self) -> None:
        self._ratios: dict[str, deque[float]] = {}
        self._factors: dict[str, float] = {}

    @property
    def factors(self) -> dict[str, float]:
        """Return slow-downs by device name; devices as fast as profiled are not there."""
        return dict(self._factors)

    def observe(self, device: str, observed_s: float, predicted_s: float) -> bool:
        """One measurement, 0 being none; whether the factor changed."""
        if observed_s <= 0 or predicted_s <= 0:
            return False
        ratios = self._ratios.get(device)
        if ratios is None:
            ratios = self._ratios[device] = deque([1.0] * WINDOW, WINDOW)
        ratios.append(min(MOST, max(1 / MOST, observed_s / predicted_s)))
        now, before = median(ratios), self._factors.get(device, 1.0)
        if 1 / (1 + STEP) <= now / before <= 1 + STEP:
            return False
        if 1 / (1 + STEP) <= now <= 1 + STEP:
            del self._factors[device]  # as profiled again: then exactly so
        else:
            self._factors[device] = now
        return True

    def forget(self, device: str) -> None:
        """The device went, or came back: what was measured before says nothing of it."""
        self._ratios.pop(device, None)
        self._factors.pop(device, None)
