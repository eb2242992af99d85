"""The planner at a glance: the data of the status page and the gauges, and the recent history of KV use."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hetis.planner.fleet.views import LiveNode, LiveReplica
from hetis.v1 import redispatch_pb2

SAMPLE_S = 5.0
NUM_SAMPLES = 180  # a quarter of an hour
MAX_DEVICES = 20_000  # per cluster: 7 MB; later ones are not kept
_AT_ONCE = 500  # devices read before the loop may do other work

_log = logging.getLogger("hetis.planner.kv_history")

Shares = npt.NDArray[np.float32]
KvInUse = Iterable[tuple[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRecord:
    """The history of one device."""

    device: str  # as ``node/index``
    times_s: Sequence[float]  # Unix seconds of the samples, ascending
    shares: Shares  # of its KV blocks in use, one per sample; NaN if it reported nothing

    @property
    def now(self) -> float:
        """The last share; NaN if the device no longer reports."""
        return float(self.shares[-1]) if len(self.shares) else math.nan

    @property
    def peak(self) -> float:
        known = self.shares[~np.isnan(self.shares)]
        return float(known.max()) if len(known) else math.nan


class KvHistory:
    """The last samples of one cluster: a row per sample, a column per device."""

    def __init__(self) -> None:
        self._columns: dict[str, int] = {}
        self._times_s: list[float] = []
        self._rows = np.full((NUM_SAMPLES, 0), np.nan, dtype=np.float16)

    def add(self, time_s: float, in_use: KvInUse) -> None:
        """Add a sample; the oldest is dropped if there are too many."""
        found = dict(in_use)
        for device in found:
            if device not in self._columns and len(self._columns) < MAX_DEVICES:
                self._columns[device] = len(self._columns)
        missing = len(self._columns) - self._rows.shape[1]
        if missing > 0:
            more = np.full((NUM_SAMPLES, max(missing, self._rows.shape[1])), np.nan, dtype=np.float16)
            self._rows = np.concatenate([self._rows, more], axis=1)
        self._rows = np.roll(self._rows, -1, axis=0)
        self._rows[-1] = np.nan
        for device, share in found.items():
            if device in self._columns:
                self._rows[-1, self._columns[device]] = share
        self._times_s = [*self._times_s, time_s][-NUM_SAMPLES:]

    def records(self, most: int) -> list[KvRecord]:
        """Return the ``most`` devices that are fullest now, or else were in the history, sorted by name."""
        num = len(self._times_s)
        if not num or not self._columns:
            return []
        rows = self._rows[-num:, : len(self._columns)].astype(np.float32)
        known = ~np.isnan(rows)
        peaks = np.where(known, rows, -1.0).max(axis=0)
        now = np.where(known[-1], rows[-1], -1.0)
        fullest = sorted(self._columns, key=lambda device: (now[self._columns[device]], peaks[self._columns[device]]))
        chosen = [device for device in fullest[-most:] if peaks[self._columns[device]] >= 0]
        begin = int(known.any(axis=1).argmax())  # nothing was reported before
        return [
            KvRecord(device=device, times_s=self._times_s[begin:], shares=rows[begin:, self._columns[device]])
            for device in sorted(chosen, key=natural_order)
        ]

    def now(self) -> dict[str, float]:
        """Return the shares in the last sample by device."""
        if not self._times_s:
            return {}
        last = self._rows[-1]
        return {device: float(last[i]) for device, i in self._columns.items() if not np.isnan(last[i])}

    @property
    def num_devices(self) -> int:
        """The number of devices that reported anything in the history."""
        if not self._times_s or not self._columns:
            return 0
        return int((~np.isnan(self._rows[-len(self._times_s) :])).any(axis=0).sum())


class KvHistories:
    """Samples every cluster while `run` runs.

    Args:
        clusters: returns the names of all clusters.
        in_use: yields a cluster's devices with their shares in use.
    """

    def __init__(
        self,
        clusters: Callable[[], Sequence[str]],
        in_use: Callable[[str], Iterator[tuple[str, float]]],
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clusters, self._in_use = clusters, in_use
        self._clock, self._sleep = clock, sleep
        self._of: dict[str, KvHistory] = {}

    def of(self, cluster: str) -> KvHistory:
        return self._of.get(cluster, KvHistory())

    async def run(self) -> None:
        while True:
            try:
                await self.sample()
            except Exception:  # a picture for people: its failure must not affect anything else
                _log.exception("the KV in use could not be read")
            await self._sleep(SAMPLE_S)

    async def sample(self) -> None:
        """Read every device of every cluster once, in batches of a few hundred."""
        names = set(self._clusters())
        self._of = {name: history for name, history in self._of.items() if name in names}
        for name in sorted(names):
            found = list[tuple[str, float]]()
            for item in self._in_use(name):
                found.append(item)
                if len(found) % _AT_ONCE == 0:
                    await self._sleep(0)
            self._of.setdefault(name, KvHistory()).add(self._clock(), found)


def natural_order(device: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which ``p100-2/0`` comes before ``p100-10/0``."""
    parts = re.split(r"(\d+)", device)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOverview:
    """One cluster. ``num_nodes`` has a count per node state, such as ``READY``."""

    name: str
    active_plan: str
    num_nodes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The planner's state. ``queued, searching``: searches that wait for a solver process, and that have one."""

    epoch: int  # the planner's leadership term
    leader_since_s: float  # when it began, Unix seconds
    clusters: tuple[ClusterOverview, ...] = ()
    num_plans: Mapping[str, int]  # plans by state, such as ``SOLVING``
    queued: int
    searching: int
    solver_processes: int  # the most there may be
    # Searches by caller and state, ``running`` or ``queued``
    searches_of: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    counted_s_ago: float = 0.0  # how old the counts of clusters and plans are, as the store may not answer
    leads: bool = True  # whether this planner does
    leader: str = ""  # who does, for people; empty if unknown
    lease_age_s: float = 0.0  # since the last renewal; 0 if there is no lease
    store_answered_s_ago: float = 0.0  # since the store's last successful transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNow:
    """A cluster as the planner has it in memory, without a query to the store."""

    name: str
    nodes: Mapping[str, LiveNode]  # by resource name
    replicas: Sequence[LiveReplica]  # all that were not stopped, by name
    redispatches: Sequence[redispatch_pb2.Redispatch]  # of this leadership term, the latest change first
    kv: KvHistory  # recent history of the devices' KV
    high_water: float | None  # share of a device's KV above which head groups leave; None: the stage's own
    now_s: float  # the time of this snapshot, Unix seconds
