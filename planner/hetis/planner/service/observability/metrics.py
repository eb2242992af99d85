"""Prometheus metrics of the service; docs/reference lists them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from hetis.planner.service.observability import handshakes
from hetis.planner.store import Lease
from hetis.planner.store.health import BUCKETS_S, StoreHealth

if TYPE_CHECKING:
    from hetis.planner.fleet.settings import FleetCounters
    from hetis.planner.service.observability.overview import Overview

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOOK_S = 0.25  # between two checks of the event loop
LAG_WINDOW_S = 60.0  # Prometheus' default interval; several may scrape, so that a scrape must not reset what it reads
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServiceMetrics:
    """The service's metrics in a registry of their own, ``registry``, to which other modules add theirs."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        gauge, counter = partial(Gauge, registry=self.registry), partial(Counter, registry=self.registry)
        gauge("hetis_planner_info", "Version of the planner.", ["version"]).labels(version).set(1)
        self._calls = Histogram(
            "hetis_planner_rpc_seconds",
            "Duration of unary calls.",
            ["method", "code"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._streams = counter("hetis_planner_streams_ended", "Streams that ended.", ["method", "code"])
        self._internal_errors = counter(
            "hetis_planner_internal_errors", "Calls and streams that ended with INTERNAL, because of a bug."
        )
        self._quotas = counter(
            "hetis_planner_quota_exceeded",
            "Calls refused because their caller had used up a quota.",
            ["caller", "quota"],
        )
        self._failures = counter("hetis_planner_failures", "Calls and streams that failed, by reason.", ["reason"])
        self._searches = gauge("hetis_planner_caller_searches", "Searches by caller.", ["caller", "state"])
        self._running = gauge("hetis_planner_rpcs_running", "Calls and streams in progress.", ["method"])
        self._epoch = gauge("hetis_planner_epoch", "Leadership term.")
        self._leader_since = gauge("hetis_planner_leader_since_seconds", "Unix time at which the term began.")
        self._nodes = gauge("hetis_planner_nodes", "Nodes by state.", ["cluster", "state"])
        self._replicas = gauge("hetis_planner_replicas", "Replicas by state.", ["cluster", "state"])
        self._activation = gauge(
            "hetis_planner_activation", "1 for how far the active plan of a cluster is.", ["cluster", "state"]
        )
        self._plans = gauge("hetis_planner_plans", "Plans by state.", ["state"])
        self._desired = gauge(
            "hetis_desired_replicas", "Replicas that the planner would have for the traffic.", ["cluster", "shape"]
        )
        self._queued = gauge("hetis_planner_searches_queued", "Searches waiting for a process.")
        self._searching = gauge("hetis_planner_searches_running", "Searches running in a process.")
        self._processes = gauge("hetis_planner_solver_processes", "Maximum number of concurrent searches.")
        self._lag = gauge("hetis_planner_loop_lag_seconds", "Longest delay of the event loop in the last minute.")
        self._token_expiry = gauge(
            "hetis_planner_token_expiry_seconds", "Unix time at which the next token expires; 0 if none does."
        )
        self._tokens_expired = gauge("hetis_planner_tokens_expired", "Tokens in the file that have expired.")
        self._certificate_expiry = gauge(
            "hetis_planner_certificate_expiry_seconds",
            "Unix time of the earliest certificate expiry in a file.",
            ["file"],
        )
        self._backup = gauge(
            "hetis_planner_backup_seconds", "Unix time of the newest backup in a folder; 0 if it has none.", ["folder"]
        )
        self.connections_closed = counter(
            "hetis_planner_connections_closed", "Connections closed because their host had too many."
        )
        self.failed_loops = gauge(
            "hetis_planner_failed_loops", "Failed background tasks; only a restart recovers them."
        )
        self.registry.register(HandshakeCollector())
        ProcessCollector(registry=self.registry)  # memory, descriptors, CPU
        # Times and delays, each longer than all after it: the first is the longest of the window.
        self._lags_s = deque[tuple[float, float]]()

        # Finding the child for a set of labels takes as long as solving an admission, and there are only a few of them.
        self._running_of = cache(self._running.labels)
        self._calls_of, self._streams_of = cache(self._calls.labels), cache(self._streams.labels)

    def call_began(self, method: str) -> None:
        self._running_of(method).inc()

    def call_ended(self, method: str, code: str, seconds: float, *, is_stream: bool) -> None:
        """Count a call. ``method`` must exist: callers may send any name, and each label takes memory for ever."""
        self._running_of(method).dec()
        if is_stream:
            self._streams_of(method, code).inc()
        else:
            self._calls_of(method, code).observe(seconds)
        # Series with labels begin at 1, which rate() and increase() take for no change; this counter begins at 0.
        if code == "INTERNAL":
            self._internal_errors.inc()

    def call_failed(self, reason: str) -> None:
        """Count a failed call. ``reason`` is a name of the API's enumeration."""
        self._failures.labels(reason).inc()

    def quota_exceeded(self, caller: str, quota: str) -> None:
        """Count a refused call. ``caller`` is a name of verified credentials."""
        self._quotas.labels(caller, quota).inc()

    def show(self, overview: Overview) -> None:
        """Set the gauges of the planner's state, and remove those of deleted resources."""
        self._epoch.set(overview.epoch)
        self._leader_since.set(overview.leader_since_s)
        for gauge in (self._nodes, self._replicas, self._activation, self._plans, self._searches, self._desired):
            gauge.clear()
        for cluster in overview.clusters:
            for state, count in cluster.num_nodes.items():
                self._nodes.labels(cluster.name, state).set(count)
            for state, count in cluster.num_replicas.items():
                self._replicas.labels(cluster.name, state).set(count)
            if cluster.activation:
                self._activation.labels(cluster.name, cluster.activation).set(1)
            for shape, count in cluster.desired.items():
                self._desired.labels(cluster.name, shape).set(count)
        for state, count in overview.num_plans.items():
            self._plans.labels(state).set(count)
        for caller, counts in overview.searches_of.items():
            for state, count in counts.items():
                self._searches.labels(caller, state).set(count)
        self._queued.set(overview.queued)
        self._searching.set(overview.searching)
        self._processes.set(overview.solver_processes)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self._lag.set(self._lags_s[0][1] if self._lags_s else 0.0)
        return generate_latest(self.registry)

    def credentials_read(self, *, tokens_s: Iterable[float], certificates_s: Mapping[str, float], now_s: float) -> None:
        """Set the Unix times at which tokens and certificate files expire; expired tokens are counted separately."""
        ends_s = list(tokens_s)
        self._token_expiry.set(min((end_s for end_s in ends_s if end_s > now_s), default=0.0))
        self._tokens_expired.set(sum(end_s <= now_s for end_s in ends_s))
        for file, end_s in certificates_s.items():
            self._certificate_expiry.labels(file).set(end_s)

    async def watch_backups(self, folder: str, interval_s: float) -> None:
        """Set the time of the newest backup in a folder until cancelled."""
        while True:
            newest_s = await asyncio.to_thread(_newest_s, folder)
            self._backup.labels(folder).set(newest_s)  # not before it is known: a label alone reads 0
            await asyncio.sleep(interval_s)

    async def watch_loop(
        self, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Measure the delays of the event loop until cancelled."""
        while True:
            due_s = clock() + LOOK_S
            await sleep(LOOK_S)
            self._lagged(clock(), due_s)

    def _lagged(self, now_s: float, due_s: float) -> None:
        lags_s, lag_s = self._lags_s, max(0.0, now_s - due_s)
        while lags_s and lags_s[-1][1] <= lag_s:
            lags_s.pop()
        lags_s.append((now_s, lag_s))
        while lags_s[0][0] <= now_s - LAG_WINDOW_S:
            lags_s.popleft()


def _newest_s(folder: str) -> float:
    with suppress(OSError):  # a file is gone in the meantime, or the folder is not readable
        return max((found.stat().st_mtime for found in Path(folder).glob("*.db")), default=0.0)
    return 0.0


class FleetCollector(Collector):
    """Reads the fleet's counters at each scrape."""

    def __init__(self, counters: FleetCounters) -> None:
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        for field in fields(self._counters):
            name, label = f"hetis_planner_{field.metadata['metric']}", field.metadata["label"]
            family = CounterMetricFamily(name, field.metadata["help"], labels=[label] if label else [])
            count = getattr(self._counters, field.name)
            for key, number in count.items() if label else [("", count)]:
                family.add_metric([key] if label else [], number)
            yield family


class HandshakeCollector(Collector):
    """Reads the process's failed handshakes at each scrape."""

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "hetis_planner_handshakes_failed", "TLS handshakes that failed, by reason.", labels=["reason"]
        )
        for reason, number in dict(handshakes.FAILED).items():
            family.add_metric([reason], number)
        yield family


class StoreCollector(Collector):
    """Reads the store's own counters at each scrape."""

    def __init__(self, health: StoreHealth, lease: Lease) -> None:
        self._health, self._lease = health, lease

    def collect(self) -> Iterable[Metric]:
        health, lease = self._health, self._lease
        counts = list(accumulate(health.buckets))
        names = [*map(str, BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "hetis_planner_store_seconds",
            "Duration of store transactions.",
            buckets=list(zip(names, counts, strict=True)),
            sum_value=health.seconds,
        )
        yield CounterMetricFamily("hetis_planner_store_errors", "Failed store transactions.", value=health.errors)
        yield GaugeMetricFamily(
            "hetis_planner_store_answered_seconds", "Seconds since the store last answered.", health.answered_s_ago
        )
        yield GaugeMetricFamily(
            "hetis_planner_store_unwritable_seconds",
            "Seconds since a write to the store failed, with none known to work since; 0 if writes work.",
            health.unwritable_s,
        )
        yield GaugeMetricFamily(
            "hetis_planner_lease_age_seconds", "Seconds since the leader's lease was last renewed.", lease.age_s
        )
        yield GaugeMetricFamily(
            "hetis_planner_leads", "1 while this planner is the leader, else 0.", float(lease.is_held)
        )
