"""Samples of every device over time: the shares of KV in use and of busy time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetis.simulator.events import Events
from hetis.simulator.micro_batch import SimulatedStageCopy
from hetis.simulator.replica import ReplicaRun
from hetis.simulator.values import FloatArray, Series


class Sampler:
    """Samples the devices of all replicas every ``every_s``, until no other event is scheduled."""

    def __init__(self, replicas: Sequence[ReplicaRun], events: Events, every_s: float) -> None:
        self._copies = [copy for replica in replicas for copies in replica.stages for copy in copies]
        self._devices = tuple(dict.fromkeys(name for copy in self._copies for name in (*copy.devices, *copy.cards)))
        self._place = {name: position for position, name in enumerate(self._devices)}
        self._events, self._every_s = events, every_s
        self._times = list[float]()
        self._used = list[FloatArray]()
        self._busy = list[FloatArray]()
        self._before = 0.0, np.zeros(len(self._devices))
        events.at(every_s, self._tick)

    def series(self, end_s: float) -> Series:
        """Return all samples and one at the end."""
        if not self._times or self._times[-1] < end_s:
            self._sample(end_s)
        return Series(
            devices=self._devices,
            times_s=np.array(self._times),
            kv_used_fraction=np.array(self._used),
            busy_fraction=np.array(self._busy),
        )

    def _tick(self, now_s: float) -> None:
        if self._events.is_empty:
            return  # no further change is possible
        self._sample(now_s)
        self._events.at(now_s + self._every_s, self._tick)

    def _sample(self, now_s: float) -> None:
        used, busy_s = np.zeros(len(self._devices)), np.zeros(len(self._devices))
        for copy in self._copies:
            self._add(copy, now_s, used, busy_s)
        before_s, busy_before = self._before
        self._times.append(now_s)
        self._used.append(used)
        self._busy.append(np.clip((busy_s - busy_before) / max(now_s - before_s, 1e-12), 0.0, 1.0))
        self._before = now_s, busy_s

    def _add(self, copy: SimulatedStageCopy, now_s: float, used: FloatArray, busy_s: FloatArray) -> None:
        ranks = [self._place[name] for name in copy.devices]
        busy_s[ranks] += copy.busy_until(now_s)
        if copy.room is not None:
            used[ranks] = copy.room.used / max(1, copy.room.total)
        if copy.pool is not None:
            pool = copy.pool
            share = 1.0 - pool.state.free_blocks() / np.maximum(1, pool.total_blocks)
            used[ranks] = share[0]
            cards = [self._place[name] for name in copy.cards]
            used[cards] = np.maximum(used[cards], share[1:])
            busy_s[cards] += pool.busy_s[1:]
