"""Timing of a node's reports: at once when KV use rises to a threshold, soon after a change, else a heartbeat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from copy import deepcopy

from hetis.v1.agent_service_pb2 import ConnectNodeRequest, Heartbeat, NodeReport, Settings
from hetis.v1.report_pb2 import DeviceLoad, DeviceReport

SPEED_CHANGE_RATIO = 0.1  # change of observed / predicted time that is reported: a device became slower or faster
JITTER_RATIO = 0.1


class NodeReporter:
    """Decides what to send and when, without a clock of its own.

    These count as changes: a device's share of used blocks differs by more than ``kv_change_ratio``; a state, failure
    or generation differs; waiting for KV or preemptions begin; a device runs slower. Other figures (steps, running
    requests) wait for the next message that is due anyway.
    """

    def __init__(self, seed: random.Random) -> None:
        self._random = seed
        self._settings = Settings()
        self._sent = NodeReport()
        self._has_sent = False
        self._above = set[tuple[object, float]]()  # devices with the thresholds that they have reached, see `_rises`
        self._sent_s = float("-inf")  # time of the last report
        self._spoke_s, self._beat_s = float("-inf"), 0.0  # time of the last message of any kind, which renews the lease

    def begin(self, settings: Settings, now_s: float) -> None:
        """Begin a new stream, whose planner has received no report yet."""
        self._has_sent, self._sent_s = False, float("-inf")
        self.change_settings(settings, now_s)

    def change_settings(self, settings: Settings, now_s: float) -> None:
        self._settings.CopyFrom(settings)
        self._spoke_s = now_s
        self._draw_beat()

    def due(self, report: NodeReport, now_s: float, *, is_requested: bool = False) -> ConnectNodeRequest | None:
        """Return the report or heartbeat to send now, or None."""
        rested = now_s - self._sent_s >= self._settings.min_report_interval.ToNanoseconds() / 1e9
        rises = self._rises(report)
        if is_requested or not self._has_sent or rises or (rested and self._is_news(report)):
            return self._send(report, now_s)
        if now_s - self._spoke_s < self._beat_s:
            return None
        if rested and report != self._sent:
            return self._send(report, now_s)
        self._spoke_s = now_s
        self._draw_beat()
        return ConnectNodeRequest(heartbeat=Heartbeat())

    def next_s(self) -> float:
        """Return when a heartbeat is due if nothing changes."""
        return self._spoke_s + self._beat_s

    def _send(self, report: NodeReport, now_s: float) -> ConnectNodeRequest:
        self._sent.CopyFrom(report)
        self._has_sent = True
        self._sent_s = self._spoke_s = now_s
        self._draw_beat()
        return ConnectNodeRequest(report=report)

    def _draw_beat(self) -> None:
        interval_s = self._settings.heartbeat_interval.ToNanoseconds() / 1e9
        self._beat_s = interval_s * (1 + self._random.uniform(-JITTER_RATIO, JITTER_RATIO))

    def _rises(self, report: NodeReport) -> bool:
        """Return whether a share of used blocks that was last reported below a threshold has reached it.

        Since the last time it must have fallen below the threshold by more than ``kv_change_ratio``: one that hovers
        there is no reason to disregard the least interval again and again.
        """
        sent, before, band = _shares(self._sent), self._above, self._settings.kv_change_ratio
        self._above = {
            (key, limit)
            for key, share in _shares(report).items()
            for limit in self._settings.kv_thresholds
            if share >= limit - (band if (key, limit) in before else 0.0)
        }
        return any(sent.get(key, 0.0) < limit for key, limit in self._above - before)

    def _is_news(self, report: NodeReport) -> bool:
        if _words(report) != _words(self._sent):
            return True
        before, now = _shares(self._sent), _shares(report)
        if before.keys() != now.keys():
            return True
        if any(abs(now[key] - before[key]) > self._settings.kv_change_ratio for key in now):
            return True
        slower, slow = _speeds(self._sent), _speeds(report)
        return any(abs(slow[key] - slower.get(key, 1.0)) > SPEED_CHANGE_RATIO for key in slow)


def with_kv(sampled: Iterable[DeviceReport], said: Iterable[DeviceReport]) -> list[DeviceReport]:
    """Return the devices as sampled, with the KV figures from the engine, which alone knows them."""
    kv = {device.index: device for device in said}
    devices = [deepcopy(device) for device in sampled]
    for device in devices:
        if (found := kv.get(device.index)) is not None:
            device.total_blocks, device.used_blocks = found.total_blocks, found.used_blocks
            device.evictable_blocks = found.evictable_blocks
    return devices


def _shares(report: NodeReport) -> dict[object, float]:
    """Return the used share of KV blocks by device of the node, and by device of a stage."""
    devices: list[tuple[object, DeviceReport | DeviceLoad]] = [(device.index, device) for device in report.devices]
    devices += _loads(report)
    return {key: device.used_blocks / device.total_blocks for key, device in devices if device.total_blocks}


def _speeds(report: NodeReport) -> dict[object, float]:
    """Return observed over predicted time for every measured device."""
    loads = [(key, load) for key, load in _loads(report) if load.observed_s > 0 and load.predicted_s > 0]
    return {key: load.observed_s / load.predicted_s for key, load in loads}


def _loads(report: NodeReport) -> Iterator[tuple[object, DeviceLoad]]:
    """Yield the load of every device of a stage, with a key that names it."""
    for replica in report.replicas:
        for stage in replica.stages:
            yield from (((replica.replica, stage.stage, stage.copy, load.device), load) for load in stage.devices)


def _words(report: NodeReport) -> object:
    """Return everything that is not a measurement: any difference in it is news."""
    return (
        [
            # The reasons for a lower clock except idleness, which comes and goes.
            (d.index, d.total_blocks, d.unhealthy, sorted(reason for reason in d.throttle_reasons if reason > 1))
            for d in report.devices
        ],
        [
            (
                r.replica,
                r.assignment_state,
                r.generation,
                r.is_primary,
                r.num_waiting_for_kv > 0,
                r.num_preempted,
                r.failure.reason,
                [(s.stage, s.copy, d.device, d.status) for s in r.stages for d in s.devices],
            )
            for r in report.replicas
        ],
    )
