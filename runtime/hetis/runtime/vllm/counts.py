"""Statistics of vLLM's requests and of their placements, and the counters that vLLM's own ``/metrics`` shows.

Several label values of one sample are joined by ``|`` in transit, because vLLM carries plain data only.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from hetis.solver.traffic import TrafficCounter

Samples = dict[str, dict[str, float]]
_RECENT = 64  # number of times over which means are taken
DISPATCH_BUCKETS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)


@dataclass(slots=True, kw_only=True)
class AllocatorStats:
    """Decisions since the start."""

    # Number of placements by reason: ``costs`` (the solver chose), ``policy`` (the settings decide), ``prefix_hit`` and
    # ``no_worker`` (all groups stay here), ``no_room`` (nowhere; vLLM tries again)
    decisions: Counter[str] = field(default_factory=Counter)
    dispatch_s: float = 0.0  # seconds that the decisions took
    longest_dispatch_s: float = 0.0  # seconds of the longest decision
    recent_s: list[float] = field(default_factory=list)  # seconds of each recent decision, until they are taken
    recomputed: int = 0  # requests that lost KV with a worker
    moved_groups: int = 0  # head groups that have moved
    relieved_blocks: int = 0  # blocks that moved to workers where a request would have been preempted
    released: int = 0  # requests that ended, or were preempted, while they ran

    def take_recent(self) -> list[float]:
        """Return the seconds of each decision since the last call, as far as they are kept."""
        recent, self.recent_s = self.recent_s, []
        return recent


class VllmRequest(Protocol):
    """The part of vLLM's requests that is used here."""

    request_id: str
    max_tokens: int
    arrival_time: float
    num_computed_tokens: int
    num_in_flight_tokens: int
    num_stale_output_tokens: int
    drop_stale_output: bool

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...


class RequestStats:
    """Counts and times of vLLM's requests that the allocator does not need.

    Attributes:
        num_finished: requests that have ended since the start.
        num_ran_to_end: of these, requests that were running when they ended.
        traffic: lengths and latencies of all requests since the start.
    """

    def __init__(self) -> None:
        self.num_finished = self.num_ran_to_end = 0
        self.traffic = TrafficCounter()
        self._known: set[str] = set()
        self._awaited: dict[str, VllmRequest] = {}  # requests that have no token yet
        self._first_s: dict[str, float] = {}  # time of each request's first token
        self._ttft_s: deque[float] = deque(maxlen=_RECENT)
        self._tpot_s: deque[float] = deque(maxlen=_RECENT)

    @property
    def is_empty(self) -> bool:
        """Return whether vLLM has no request."""
        return not self._known

    @property
    def num_known(self) -> int:
        """The number of requests that run or wait."""
        return len(self._known)

    @property
    def ttft_s(self) -> float:
        """Mean seconds from arrival to the first token, over the latest requests; 0 if there are none."""
        return sum(self._ttft_s) / len(self._ttft_s) if self._ttft_s else 0.0

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first."""
        return sum(self._tpot_s) / len(self._tpot_s) if self._tpot_s else 0.0

    def arrived(self, request: VllmRequest) -> None:
        self._known.add(request.request_id)
        self.traffic.num_arrivals += 1
        self._awaited[request.request_id] = request

    def look(self, now_s: float) -> None:
        """Record, once a step, which requests got their first token."""
        for request in [one for one in self._awaited.values() if one.num_output_tokens]:
            del self._awaited[request.request_id]
            self._first_s[request.request_id] = now_s
            self._ttft_s.append(max(now_s - request.arrival_time, 0.0))
            self.traffic.add(ttft_s=self._ttft_s[-1])

    def finished(self, request: VllmRequest, *, has_run: bool) -> None:
        name = request.request_id
        if name not in self._known:
            return
        self._known.discard(name)
        self._awaited.pop(name, None)
        self.num_finished += 1
        self.num_ran_to_end += has_run
        begun_s, num = self._first_s.pop(name, None), request.num_output_tokens
        if begun_s is not None:
            self.traffic.add(prompt_tokens=request.num_tokens - num, output_tokens=num)
        if begun_s is not None and num > 1:
            self._tpot_s.append(max(time.time() - begun_s, 0.0) / (num - 1))
            self.traffic.add(tpot_s=self._tpot_s[-1])


# --- counters


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
