"""Readings as the messages that agents report. A value that the engine does not report stays 0, "not known"."""

from __future__ import annotations

from collections.abc import Iterable

from hetis.runtime.agent.pressure.judging import Pressure
from hetis.runtime.agent.pressure.reading import EngineReading
from hetis.v1 import failure_pb2, report_pb2

_MOST = 2**32 - 1  # of a uint32 field: an engine that reports more is broken, and must not break the report


def replica_report(
    replica: str, reading: EngineReading, *, earlier: EngineReading | None = None, pressure: Pressure | None = None
) -> report_pb2.ReplicaReport:
    """Return the report of a replica whose engine hetis does not steer. Means cover the time since ``earlier``."""
    waiting_for_kv = pressure.waiting_for_kv if pressure is not None else reading.num_waiting_for_kv
    return report_pb2.ReplicaReport(
        replica=replica,
        assignment_state=report_pb2.ASSIGNMENT_STATE_UNMANAGED,
        is_primary=True,
        num_running=_count(reading.num_running, _MOST),
        num_waiting=_count(reading.num_waiting, _MOST),
        num_waiting_for_kv=_count(waiting_for_kv, _MOST),
        num_preempted=_count(reading.num_preempted),
        num_steps=_count(reading.num_steps),
        num_finished=_count(reading.num_finished),
        ttft_s=reading.ttft_s.mean_since(earlier.ttft_s if earlier else None) if reading.ttft_s else 0.0,
        tpot_s=reading.tpot_s.mean_since(earlier.tpot_s if earlier else None) if reading.tpot_s else 0.0,
    )


def unreachable_report(replica: str, message: str) -> report_pb2.ReplicaReport:
    """Return the report of a replica whose engine does not answer, or whose answer is not metrics."""
    failure = failure_pb2.Failure(reason=failure_pb2.ERROR_REASON_ENGINE_UNREACHABLE, message=message)
    return report_pb2.ReplicaReport(
        replica=replica, assignment_state=report_pb2.ASSIGNMENT_STATE_UNMANAGED, is_primary=True, failure=failure
    )


def device_reports(readings: Iterable[EngineReading], devices: Iterable[int]) -> list[report_pb2.DeviceReport]:
    """Return the KV of every device that the engines run on. Each device counts the blocks of all engines together.

    Only the KV fields are set; `Devices.sample` knows the rest.

    Args:
        readings: one for every model that is served on these devices.
        devices: indices on the node.
    """
    totals = used = evictable = 0
    for reading in readings:
        totals += _count(reading.total_blocks)
        used += _count(reading.used_blocks)
        evictable += _count(reading.evictable_blocks)
    return [
        report_pb2.DeviceReport(index=index, total_blocks=totals, used_blocks=used, evictable_blocks=evictable)
        for index in devices
    ]


def _count(value: int | None, most: int = 2**64 - 1) -> int:
    return min(max(value or 0, 0), most)
