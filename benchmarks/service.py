"""The planner under load: connected agents, reports, re-dispatches, durable writes.

    python -m benchmarks.service [--quick] [--json] [--agents N]
    python -m benchmarks.service --soak MINUTES [--agents N]

One real `hetis-planner` (SQLite, no TLS) serves agents on real gRPC streams, each with its own TCP connection. Most of
them run in one other process, those of one cell in this one. A cell is a node with two H100, the primary of a replica,
and eight nodes with a P100 each, its attention workers. Agents and engines are scripted and act at once, so that the
times are those of the planner, gRPC and this machine's scheduler. Everything shares the same few cores; ``load`` shows
how busy they were.

``rate_per_s`` is the rate of the row's subject, for timed calls over all lanes together. ``p50_ms``, ``p99_ms`` and
``max_ms`` are those of ``count`` latencies, ``at_once`` at a time. ``over_empty_p50`` and ``over_empty_p99`` are the
same over those of an empty call (health's Check) on the same channel just before, with as many at once. ``cores`` is
the CPU time of the planner's process per second, and ``cpu_us`` that per unit of the row's subject. ``rss_mib`` is its
memory, and ``kb_per_agent`` its growth since before the first agent, per agent. ``lag_s`` is the time to process the
reports that were sent but not processed yet, at the present rate. ``load`` is the machine's mean number of running
processes over a minute.

``--soak`` applies 500 reports/s and 200 reads/s, and in every fourth part a flood of 10,000 reports/s by 500 agents.
It prints a row for each twelfth of the time, and one that compares the last part with the second: memory as a share,
p99 as a ratio. This p99 covers the calls during which, and for 2 s before which, the machine's host kept less than a
twentieth of a processor from it.

``GetPlan beside a flood`` has the reads of 50 calls/s while agents send more reports than the planner reads.

``change`` rows count from the writing of the report that shows the need to the named step; ``DONE`` is durable and
timed by the planner's clock.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from benchmarks.measuring.service_calls import (
    PLAN,
    Bench,
    CellUnderStress,
    ChangeTimes,
    Extent,
    opened,
    paced,
    percentiles,
    timed,
    timed_call,
)
from benchmarks.measuring.service_planner import HostWatch, Watched, cell_fleet
from hetis.v1 import cluster_pb2, cluster_service_pb2, plan_pb2, plan_service_pb2

QUICK = Extent(agents=100, idle_s=3.0, report_s=2.0, rates=(200, 1000), beside_rate=50, changes=20, calls=200)
AT_ONCE = (1, 16)
SMALL = "clusters/small"
MANY = 10_000  # number of agents to which costs are extrapolated
MOST_CORES, MOST_LAG_S = 0.95, 1.0  # beyond either, the planner counts as saturated


async def measure(extent: Extent) -> AsyncIterator[Row]:
    """Measure everything in sequence on one planner."""
    async with opened(extent) as bench:
        await bench.create_cluster()
        async for row in connections(bench):
            yield row
        async for row in empty_calls(bench):
            yield row
        async for row in writes(bench):
            yield row
        async for row in changes(bench):
            yield row
        async for row in reports(bench):
            yield row
        async for row in floods(bench):
            yield row


SOAK_REPORTS_PER_S, SOAK_READS_PER_S, SOAK_PARTS = 500.0, 200.0, 12


async def soak(extent: Extent, *, minutes: float) -> AsyncIterator[Row]:
    """Apply one load for a long time, to see whether memory or latencies grow."""
    async with opened(extent) as bench:
        await bench.create_cluster()
        await bench.connect()
        await bench.until_quiet()
        await bench.activate()
        await bench.until_quiet()
        read = timed_call(lambda: bench.client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name=PLAN)))
        parts = list[tuple[float, float]]()  # memory, and p99 of the calls that the host did not disturb
        part_s = 60 * minutes / SOAK_PARTS
        for number in range(SOAK_PARTS):
            is_flooded = number % 4 == 2
            rate, agents = FLOODS[-1] if is_flooded else (SOAK_REPORTS_PER_S, None)
            await bench.set_rate(rate, agents=agents)
            with Watched(bench.planner) as watched, HostWatch() as host:
                latencies = await paced(read, per_s=SOAK_READS_PER_S, seconds=part_s)
            _, behind = await bench.behind()
            memory = bench.memory()
            calm = np.array(latencies.seconds)[host.undisturbed(latencies.began_s, latencies.seconds)]
            calm_ms = 1e3 * float(np.percentile(calm, 99)) if len(calm) else float("nan")
            parts.append((float(memory["rss_mib"] or 0.0), calm_ms))
            note = f"p99 {calm_ms:.1f} ms of the {len(calm) / len(latencies.seconds):.0%} that the host let be"
            name = f"soak, {(number + 1) * minutes / SOAK_PARTS:g} min" + (", beside a flood" if is_flooded else "")
            row = bench.latency_row(name, latencies, at_once=1, watched=watched, note=note)
            yield {**row, **memory, "cpu_us": None, "lag_s": behind / SOAK_REPORTS_PER_S}
        early, last = parts[max(0, SOAK_PARTS // 6 - 1)], parts[-1]
        note = f"memory {last[0] / early[0] - 1:+.1%} and p99 times {last[1] / early[1]:.2f} since {minutes / 6:g} min"
        yield bench.row("soak, all of it", rss_mib=last[0], p99_ms=last[1], note=note)
        await bench.set_rate(0)


async def connections(bench: Bench) -> AsyncIterator[Row]:
    """Yield the cost of connected agents, without and with replicas."""
    extent = bench.extent
    with Watched(bench.planner) as watched:
        await asyncio.sleep(extent.idle_s / 3)
    yield bench.row("no agents", cores=watched.cores, rss_mib=bench.planner.rss_bytes() / 2**20)
    alone = watched.cores
    with Watched(bench.planner) as watched:
        seconds = await bench.connect()
        await bench.until_quiet()
    yield bench.row(
        "connecting", rate_per_s=extent.agents / seconds, cpu_us=1e6 * watched.cpu_s / extent.agents, **bench.memory()
    )
    await asyncio.sleep(extent.idle_s / 3)  # lets heartbeats spread out
    yield await idle(bench, "heartbeats, no replicas", alone)
    with Watched(bench.planner) as watched:
        seconds = await bench.activate()
    num = len(bench.fleet.cells)
    yield bench.row(
        "activating a plan",
        rate_per_s=num / seconds,
        cpu_us=1e6 * watched.cpu_s / num,
        note=f"of {num} replicas, {seconds:.1f} s",
    )
    await bench.until_quiet()
    yield await idle(bench, "heartbeats, serving", alone)


async def idle(bench: Bench, name: str, alone: float) -> Row:
    """Measure agents that only send heartbeats. ``alone`` is the cores used without agents."""
    with Watched(bench.planner) as watched:
        await asyncio.sleep(bench.extent.idle_s)
    beats_per_s = bench.extent.agents / 5.0
    memory = bench.memory()
    each, num = memory["kb_per_agent"], bench.extent.agents
    assert isinstance(each, float)
    cores = alone + (watched.cores - alone) * MANY / num
    total = bench.base_bytes / 2**20 + each * 1e3 * MANY / 2**20
    return bench.row(
        name,
        rate_per_s=beats_per_s,
        cores=watched.cores,
        cpu_us=1e6 * (watched.cores - alone) / beats_per_s,
        **memory,
        note=f"{MANY:,} agents, if each takes as much: {cores:.2f} cores, {total:,.0f} MiB",
    )


async def empty_calls(bench: Bench) -> AsyncIterator[Row]:
    """Yield the cost of any call on this machine."""
    for at_once in AT_ONCE:
        await timed(timed_call(bench.client.is_serving), count=20 * at_once, at_once=at_once)
        with Watched(bench.planner) as watched:
            found = await timed(timed_call(bench.client.is_serving), count=bench.extent.calls, at_once=at_once)
        bench.empty[at_once] = found
        yield bench.latency_row(f"empty call, {at_once} at once", found, at_once=at_once, watched=watched)


async def writes(bench: Bench) -> AsyncIterator[Row]:
    """Measure durable writes to a small cluster, and a read."""
    client, small = bench.client, cell_fleet(2 * 9)
    policies = (cluster_pb2.REACTION_MODE_OFF, cluster_pb2.REACTION_MODE_ADVISORY)
    turn = 0

    async def update() -> None:
        nonlocal turn
        turn += 1
        policy = cluster_pb2.ClusterPolicy(placement=policies[turn % 2])
        cluster = cluster_pb2.Cluster(name=SMALL, policy=policy)
        await client.clusters.UpdateCluster(cluster_service_pb2.UpdateClusterRequest(cluster=cluster))

    async def create() -> None:
        plan = plan_pb2.Plan(cluster=SMALL, imported=small.plan)
        request = plan_service_pb2.CreatePlanRequest(plan_id=f"p-{uuid.uuid4()}", plan=plan)
        await client.plans.CreatePlan(request)

    async def get() -> None:
        await client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name="plans/small"))

    cluster = cluster_pb2.Cluster(document=small.cluster)
    await client.clusters.CreateCluster(
        cluster_service_pb2.CreateClusterRequest(cluster_id=SMALL.partition("/")[2], cluster=cluster)
    )
    plan = plan_pb2.Plan(cluster=SMALL, imported=small.plan)
    await client.plans.CreatePlan(plan_service_pb2.CreatePlanRequest(plan_id="small", plan=plan))
    for name, call, share in (("UpdateCluster", update, 4), ("CreatePlan, imported", create, 10), ("GetPlan", get, 2)):
        for at_once in AT_ONCE:
            with Watched(bench.planner) as watched:
                found = await timed(timed_call(call), count=max(16, bench.extent.calls // share), at_once=at_once)
            yield bench.latency_row(f"{name}, {at_once} at once", found, at_once=at_once, watched=watched)


async def changes(bench: Bench) -> AsyncIterator[Row]:
    """Measure re-dispatches of one replica, while the others are quiet and while they report."""
    cell = CellUnderStress(bench.cell, bench.client)
    for rate, count in ((0.0, max(2, bench.extent.changes // 5)), (bench.extent.beside_rate, bench.extent.changes)):
        await bench.set_rate(rate)
        await asyncio.sleep(1.0)
        found = list[ChangeTimes]()
        missed = 0
        with Watched(bench.planner) as watched:
            while len(found) < count:
                one = await cell.sample()
                if one is not None:
                    found.append(one)
                elif (missed := missed + 1) > 2:
                    raise RuntimeError(f"the planner moves nothing: {bench.planner.log()[-2000:]}")
        note = f"{sum(one.moves for one in found) / len(found):.0f} moves each, {missed} reports without a change"
        beside = f", beside {rate:g} reports/s" if rate else ""
        for step, what in STEPS.items():
            seconds = [getattr(one, f"{step}_s") for one in found]
            cores = watched.cores if step == "done" else None
            yield bench.row(f"change: {what}{beside}", count=count, **percentiles(seconds), cores=cores, note=note)
    await bench.set_rate(0)


STEPS = {
    "asked": "asks for the head map",
    "prepare": "first prepare",
    "commit": "commit",
    "resolved": "first resolved",
    "done": "DONE",
}


async def reports(bench: Bench) -> AsyncIterator[Row]:
    """Measure reports at growing rates."""
    for rate in bench.extent.rates:
        await bench.set_rate(rate)
        await asyncio.sleep(bench.extent.report_s / 4)
        before, _ = await bench.behind()
        crowd = await asyncio.to_thread(bench.crowd.counts)
        with Watched(bench.planner) as watched:
            end_s = time.monotonic() + bench.extent.report_s
            seconds = list[float]()
            probe = timed_call(bench.client.is_serving)
            while time.monotonic() < end_s:
                await probe(seconds)
                await asyncio.sleep(0.05)
        crowd_cpu_s = (await asyncio.to_thread(bench.crowd.counts)).cpu_s - crowd.cpu_s
        after, behind = await bench.behind()
        taken_per_s = (after - before) / watched.seconds
        lag_s = behind / taken_per_s if taken_per_s else math.inf if behind else 0.0
        is_saturated = watched.cores > MOST_CORES or lag_s > MOST_LAG_S
        yield bench.row(
            f"{rate:g} reports/s asked for",
            rate_per_s=taken_per_s,
            count=len(seconds),
            **percentiles(seconds),
            cores=watched.cores,
            cpu_us=1e6 * watched.cpu_s / (after - before) if after > before else None,
            lag_s=lag_s,
            rss_mib=bench.planner.rss_bytes() / 2**20,
            note=f"latencies: of empty calls; agents take {crowd_cpu_s / watched.seconds:.2f} cores"
            + (", the planner is saturated" if is_saturated else ""),
        )
        if is_saturated:
            break
    await bench.set_rate(0)


FLOOD_READS_PER_S = 50.0
FLOODS = ((0.0, 0), (7_000.0, 1), (10_000.0, 500))  # reports per second, of so many agents


async def floods(bench: Bench) -> AsyncIterator[Row]:
    """Measure reads beside agents that send more reports than the planner reads, and without them in the same run."""
    read = timed_call(lambda: bench.client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name=PLAN)))
    for rate, agents in FLOODS:
        await bench.set_rate(rate, agents=agents or None)
        before, sent = await bench.behind(), await asyncio.to_thread(bench.crowd.counts)
        with Watched(bench.planner) as watched:
            found = await paced(read, per_s=FLOOD_READS_PER_S, seconds=bench.extent.report_s)
        after, sent_then = await bench.behind(), await asyncio.to_thread(bench.crowd.counts)
        of = f"a flood of {rate:g} reports/s by {agents} agents" if agents else "no flood"
        read_per_s, sent_per_s = (
            (b - a) / watched.seconds for a, b in ((before[0], after[0]), (sent.sent, sent_then.sent))
        )
        note = f"{sent_per_s:.0f} reports/s sent, {read_per_s:.0f} processed"
        yield bench.latency_row(f"GetPlan beside {of}", found, at_once=1, watched=watched, note=note)
    await bench.set_rate(0)


Measure = Callable[[Extent], AsyncIterator[Row]]


def all_rows(extent: Extent, what: Measure = measure) -> Iterator[Row]:
    """Yield the rows as they are measured."""
    with asyncio.Runner() as runner:
        found = what(extent)
        try:
            while True:
                try:
                    yield runner.run(anext(found))  # type: ignore[arg-type]
                except StopAsyncIteration:
                    return
        finally:
            runner.run(found.aclose())  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> None:
    parser = rows.parser("benchmarks.service", __doc__)
    parser.add_argument("--agents", type=int, metavar="N", help="instead of 3,000, or 100 with --quick")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="one load for so long")
    arguments = parser.parse_args(argv)
    extent = QUICK if arguments.quick else Extent()
    if arguments.agents is not None:
        if arguments.agents < 2 * 9:
            parser.error(f"--agents {arguments.agents}: two cells have 18")
        extent = replace(extent, agents=arguments.agents)
    what: Measure = measure if arguments.soak is None else partial(soak, minutes=arguments.soak)
    found = all_rows(extent, what)
    rows.show((row for row in found if arguments.only in str(row["name"])), arguments, name="service")


if __name__ == "__main__":
    main()
