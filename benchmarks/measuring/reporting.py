"""What it costs a planner to take in the traffic of many replicas: its own code and store, with reports at once.

Time is virtual: every replica reports every few seconds, and the planner folds and stores as it does by the clock.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from hetis.planner.convert.traffic import traffic_to_proto
from hetis.planner.fleet.views import Clock
from hetis.planner.resources.traffic import FOLD_S, MeasuredTraffic
from hetis.planner.store import ClusterRecord, PlanRecord, Store
from hetis.solver.traffic import SCALES, Histogram, TrafficSketch
from hetis.v1 import cluster_pb2, plan_pb2, report_pb2

CLUSTER, PLAN, START_S = "clusters/a", "plans/p", 1e9
RATE_RPS = 3.0  # of each replica
TRACED_S = 150.0
VALUES = {"prompt_tokens": 700.0, "output_tokens": 200.0, "ttft_s": 0.3, "tpot_s": 0.03, "wait_s": 0.01}


class Reporting(NamedTuple):
    """Cores that are busy, and bytes that are kept of the reports."""

    cores: float
    kept_bytes: float


class _Hand(Clock):
    now_s = START_S

    def time(self) -> float:
        return self.now_s


def report_for(replicas: int, seconds: float) -> Reporting:
    """Let so many replicas report for a virtual time, and for some minutes once more to see what is kept of it."""
    cores, _ = _run(replicas, seconds)
    tracemalloc.start()
    try:
        return Reporting(cores, _run(replicas, min(seconds, TRACED_S))[1])
    finally:
        tracemalloc.stop()


def _run(replicas: int, seconds: float) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="hetis-benchmark-") as folder:
        return asyncio.run(_report_for(Path(folder), replicas, seconds))


async def _report_for(folder: Path, replicas: int, seconds: float) -> tuple[float, float]:
    """Return the cores, and the bytes if they are traced."""
    store = await Store.open(f"sqlite:///{folder / 'planner.db'}")
    try:
        await store.leadership.grant("benchmark")
        body = cluster_pb2.Cluster(name=CLUSTER)
        cluster = ClusterRecord(name=CLUSTER, body=body, create_time_s=START_S, update_time_s=START_S)
        plan = PlanRecord(
            name=PLAN, cluster=CLUSTER, body=plan_pb2.Plan(name=PLAN, cluster=CLUSTER),
            state=plan_pb2.PLAN_STATE_READY, activation=plan_pb2.ACTIVATION_STATE_ACTIVE, create_time_s=START_S,
        )  # fmt: skip
        await store.write(lambda tx: (tx.clusters.insert(cluster), tx.plans.insert(plan)))
        live = SimpleNamespace(plan=PLAN, shape=SimpleNamespace(role=0))
        fleet = SimpleNamespace(cluster_names=[CLUSTER], replica_view=lambda name: live, replicas_of=lambda name: [])
        clock = _Hand()
        traffic = MeasuredTraffic(store, cast(Any, fleet), cast(Any, _Documents()), clock)
        names = [f"{CLUSTER}/replicas/{number}" for number in range(replicas)]
        before, begun_s, making_s = tracemalloc.get_traced_memory()[0], time.process_time(), 0.0
        for turn in range(1, round(seconds / FOLD_S) + 1):
            clock.now_s = START_S + turn * FOLD_S
            made_s, message = time.process_time(), traffic_to_proto(_sketch(turn * FOLD_S))
            for name in names:
                report = report_pb2.ReplicaReport(replica=name, is_primary=True, traffic=message, num_running=8)
                traffic.replica_reported(name, report)
            making_s += time.process_time() - made_s
            await traffic.step()
        spent_s = time.process_time() - begun_s - making_s
        return spent_s / seconds, tracemalloc.get_traced_memory()[0] - before
    finally:
        await store.close()


class _Documents:
    async def in_force(self, cluster: str) -> None:
        """Return that no plan is in force, whose replicas would be compared with their profiles once a minute."""

    async def of(self, record: object) -> Any:
        return SimpleNamespace(
            record=record, problem=SimpleNamespace(model=SimpleNamespace(name="tiny"), workload=None)
        )


def _sketch(clock_s: float) -> TrafficSketch:
    """Return what a replica has counted until then, spread over some buckets."""
    counted: dict[str, Any] = {
        name: Histogram.of_values(scale, [VALUES[name] * factor for factor in (0.2, 0.5, 1.0, 2.3)]).times(
            RATE_RPS * clock_s / 4
        )
        for name, scale in SCALES.items()
    }
    return TrafficSketch(seconds=clock_s, arrivals=RATE_RPS * clock_s, **counted)
