"""The plugin's counters as values, taken periodically and shown by vLLM's own ``/metrics``.

Several label values of one sample are joined by ``|`` in transit, because vLLM carries plain data only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hetis.runtime.vllm.scheduler import SchedulerSide
from hetis.solver.dispatch.snapshot import DeviceStatus

Samples = dict[str, dict[str, float]]
EVERY_S = 0.5  # interval between takes while requests run
DISPATCH_BUCKETS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)


@dataclass(frozen=True, slots=True)
class Described:
    """A metric's description, and its labels besides vLLM's own."""

    text: str
    labels: tuple[str, ...] = ()


GAUGES = {
    "hetis_head_groups": Described("Head groups of running requests on the device, on each rank.", ("device",)),
    "hetis_kv_blocks": Described("KV blocks of one head group that the device has for requests.", ("device",)),
    "hetis_kv_blocks_used": Described("Of them, those in use.", ("device",)),
    "hetis_device_up": Described("1: the device takes head groups; 0: it is lost, or takes none.", ("device",)),
    "hetis_device_cost_scale": Described(
        "What attention takes on the device over what was measured when it joined.", ("device",)
    ),
}
COUNTERS = {
    "hetis_exchanges": Described("Calls to a worker: one for each layer, step and rank.", ("device",)),
    "hetis_exchange_seconds": Described("Seconds from those calls to their answers.", ("device",)),
    "hetis_exchange_bytes": Described("Bytes sent to a worker and received from it.", ("device", "direction")),
    "hetis_moves": Described(
        "Moves of head groups, by who wanted them (planner, engine, relief of a full pool) and what became of them "
        "(begun, committed, aborted).",
        ("by", "state"),
    ),
    "hetis_moved_groups": Described("Head groups that have moved."),
    "hetis_relieved_blocks": Described("Blocks that left for workers where a request would have been preempted."),
    "hetis_recomputes": Described("Requests that lost KV with a worker and are computed again."),
    "hetis_dispatch_decisions": Described(
        "Placements of requests: by costs, by policy, all here for a prefix hit, for want of a worker, or of room.",
        ("reason",),
    ),
}
DISPATCH_SECONDS = Described("Seconds that it took to decide where the head groups of a request live.")


class SchedulerCounts:
    """Takes the counts of one scheduler."""

    def __init__(self, side: SchedulerSide, clock: Callable[[], float] = time.monotonic) -> None:
        self._side, self._clock = side, clock
        self._told: Samples = {}
        self._taken_s = float("-inf")

    def take(self, is_last: bool) -> dict[str, Any] | None:
        """Return the counts since the last take and the gauges, or None if it is too early and not the last take."""
        now_s = self._clock()
        if not is_last and now_s < self._taken_s + EVERY_S:
            return None
        self._taken_s = now_s
        counted = _counted(self._side)
        new = {
            name: {label: value - self._told.get(name, {}).get(label, 0.0) for label, value in samples.items()}
            for name, samples in counted.items()
        }
        self._told = counted
        recent = self._side.allocator.stats.take_recent()
        return {"gauges": _gauges(self._side), "counters": new, "dispatch_s": recent}


def merged(one: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Merge two takes into one."""
    counters: Samples = {name: dict(samples) for name, samples in one.get("counters", {}).items()}
    for name, samples in later.get("counters", {}).items():
        own = counters.setdefault(name, {})
        for label, value in samples.items():
            own[label] = own.get(label, 0.0) + value
    return {
        "gauges": later.get("gauges") or one.get("gauges", {}),
        "counters": counters,
        "dispatch_s": [*one.get("dispatch_s", ()), *later.get("dispatch_s", ())],
    }


def summary(data: dict[str, Any]) -> dict[str, int | float]:
    """Return the figures of a take for a line in the log."""
    found: dict[str, int | float] = {
        f"groups on {device}": int(value)
        for device, value in data.get("gauges", {}).get("hetis_head_groups", {}).items()
    }
    counters = data.get("counters", {})
    exchanges = sum(counters.get("hetis_exchanges", {}).values())
    if exchanges:
        found["exchange us"] = round(1e6 * sum(counters["hetis_exchange_seconds"].values()) / exchanges, 1)
    for name in ("hetis_moved_groups", "hetis_recomputes"):
        found[name.removeprefix("hetis_").replace("_", " ")] = int(sum(counters.get(name, {}).values()))
    return found


def _gauges(side: SchedulerSide) -> Samples:
    allocator = side.allocator
    load, scales = allocator.state.load(), side.costs.scales
    queries = side.shape.heads.queries_per_group
    found: Samples = {name: {} for name in GAUGES}
    for device, name in enumerate(side.costs.stage.devices):
        total, used = allocator.totals(device)
        found["hetis_head_groups"][name] = int(load.heads[device]) // queries
        found["hetis_kv_blocks"][name], found["hetis_kv_blocks_used"][name] = total, used
        found["hetis_device_up"][name] = int(allocator.state.devices[device].status is DeviceStatus.OK)
        found["hetis_device_cost_scale"][name] = scales[device]
    return found


def _counted(side: SchedulerSide) -> Samples:
    stats = side.allocator.stats
    found: Samples = {name: {} for name in COUNTERS}
    for device, name in enumerate(side.costs.stage.devices):
        exchanged = side.exchanged.get(device)
        if exchanged is not None:
            found["hetis_exchanges"][name] = exchanged.exchanges
            found["hetis_exchange_seconds"][name] = exchanged.exchange_s
            found["hetis_exchange_bytes"][f"{name}|sent"] = exchanged.bytes_sent
            found["hetis_exchange_bytes"][f"{name}|received"] = exchanged.bytes_received
    found["hetis_moves"] = {f"{by}|{state}": count for (by, state), count in side.moves.items()}
    found["hetis_moved_groups"][""] = stats.moved_groups
    found["hetis_relieved_blocks"][""] = stats.relieved_blocks
    found["hetis_recomputes"][""] = stats.recomputed
    found["hetis_dispatch_decisions"] = dict(stats.decisions)
    return found
