"""Measured traffic: from reports through the store to GetClusterTraffic, over restarts, with a bounded store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hetis.planner.convert.traffic import ModelTraffic, TrafficWindow, models_of, traffic_from_proto, traffic_to_proto
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.views import Clock
from hetis.planner.resources.traffic import MeasuredTraffic
from hetis.planner.store import Store
from hetis.solver.traffic import TOKENS, Histogram, TrafficSketch
from hetis.v1 import report_pb2, traffic_pb2
from hetis.v1.cluster_service_pb2 import GetClusterTrafficRequest
from tests.planner.store import samples

HOUR_S = 3600
START_S = 500_000.0 * HOUR_S


class Hand(Clock):
    """A clock that is set by hand."""

    now_s = START_S

    def time(self) -> float:
        return self.now_s


class World:
    """A planner's measured traffic with one cluster, `clusters/a`, and replicas of `plans/p`."""

    def __init__(self, store: Store) -> None:
        self.store, self.clock = store, Hand()
        self.begin()

    def begin(self) -> None:
        replica = SimpleNamespace(plan="plans/p", shape=SimpleNamespace(role=0))
        fleet = SimpleNamespace(
            cluster_names=["clusters/a"], replica_view=lambda name: replica, replicas_of=lambda name: ()
        )
        model = SimpleNamespace(problem=SimpleNamespace(model=SimpleNamespace(name="tiny")))

        class Plans:
            async def of(self, record: object) -> object:
                return model

            async def in_force(self, cluster: str) -> None: ...

        self.traffic = MeasuredTraffic(self.store, cast(Any, fleet), cast(Any, Plans()), self.clock)

    async def pass_time(self, seconds: float, *, rate: float, every_s: float = 5.0) -> None:
        """Let a replica report a steady rate, and the planner take it in."""
        for _ in range(round(seconds / every_s)):
            self.clock.now_s += every_s
            clock_s = self.clock.now_s - START_S
            num = rate * clock_s
            lengths = Histogram.of_buckets(TOKENS, {1000.0: num}, 700 * num)
            sketch = TrafficSketch(seconds=clock_s, arrivals=num, prompt_tokens=lengths, output_tokens=lengths)
            self.report(traffic_to_proto(sketch))
            await self.traffic.step()

    def report(self, message: traffic_pb2.Traffic) -> None:
        report = report_pb2.ReplicaReport(replica="clusters/a/replicas/0", is_primary=True, traffic=message)
        self.traffic.replica_reported(report.replica, report)

    async def shown(self) -> traffic_pb2.ClusterTraffic:
        request = GetClusterTrafficRequest(name="clusters/a/traffic")
        return (await self.traffic.get(request)).cluster_traffic

    async def models(self) -> list[ModelTraffic]:
        return models_of(map(TrafficWindow.from_proto, (await self.shown()).windows))

    async def num_stored(self) -> int:
        return len(await self.store.read(lambda tx: tx.traffic.versions()))


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    store = await Store.open(f"sqlite:///{folder / 'planner.db'}")
    try:
        await store.leadership.grant("test")
        await store.write(
            lambda tx: (tx.clusters.insert(samples.cluster("clusters/a")), tx.plans.insert(samples.plan("plans/p")))
        )
        yield World(store)
    finally:
        await store.close()


async def test_reports_become_windows_that_survive_the_planner(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        await one.pass_time(200, rate=3.0)
        (model,) = await one.models()
        assert model.name == "tiny"
        assert model.last(180).rate_per_s == pytest.approx(3.0)
        assert await one.num_stored() == 3  # whole minutes
        one.begin()  # the next planner
        await one.pass_time(130, rate=3.0)
        (model,) = await one.models()
        assert model.last(600).rate_per_s == pytest.approx(3.0)
        assert model.last(600).prompt_tokens.mean == pytest.approx(700)


async def test_the_store_is_bounded_and_hours_are_kept(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        await one.pass_time(26 * HOUR_S, rate=1.0, every_s=600.0)
        assert await one.num_stored() <= 360 + 2 + 26  # minutes of six hours, and hours
        (model,) = await one.models()
        yesterday = model.same_hour(1)
        assert yesterday is not None
        assert yesterday.rate_per_s == pytest.approx(1.0)
        assert model.same_hour(7) is None
        assert model.last(24 * HOUR_S).seconds == pytest.approx(24 * HOUR_S, rel=0.05)


async def test_a_deleted_cluster_takes_its_traffic_along(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        await one.pass_time(100, rate=1.0)
        await one.store.write(lambda tx: tx.traffic.delete_all(cluster="clusters/a"))
        await one.store.write(lambda tx: tx.clusters.delete("clusters/a"))
        await one.pass_time(100, rate=1.0)
        assert await one.num_stored() == 0
        with pytest.raises(ServiceError, match="clusters/a does not exist"):
            await one.shown()


@pytest.mark.parametrize(
    "wrong",
    [
        traffic_pb2.Traffic(arrivals=-1),
        traffic_pb2.Traffic(observed_s=float("nan")),
        traffic_pb2.Traffic(prompt_tokens=traffic_pb2.Histogram(first=2**31, counts=[1.0])),
        traffic_pb2.Traffic(ttft_s=traffic_pb2.Histogram(counts=[float("inf")])),
    ],
)
async def test_counts_that_cannot_be_are_left_out(tmp_path: Path, wrong: traffic_pb2.Traffic) -> None:
    async with world(tmp_path) as one:
        await one.pass_time(20, rate=1.0)
        one.report(wrong)
        await one.traffic.step()
        await one.pass_time(20, rate=1.0)
        (model,) = await one.models()
        assert model.last(60).rate_per_s == pytest.approx(1.0)


def test_a_message_says_all_of_a_sketch_in_a_few_hundred_bytes() -> None:
    lengths = Histogram.of_buckets(TOKENS, {float(edge): 10.0 * k for k, edge in enumerate(TOKENS.edges[:18])}, 1e6)
    sketch = TrafficSketch(seconds=5.0, arrivals=7.0, cached_tokens=3.0, prompt_tokens=lengths, output_tokens=lengths)
    message = traffic_to_proto(sketch)
    assert traffic_from_proto(message) == sketch
    assert message.ByteSize() < 400
    assert traffic_from_proto(traffic_pb2.Traffic()) == replace(sketch, **vars_of(TrafficSketch()))


def vars_of(sketch: TrafficSketch) -> dict[str, Any]:
    return {name: getattr(sketch, name) for name in sketch.__dataclass_fields__}
