"""The store's response times and the lease's age as Prometheus metrics; reading them makes no query."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from hetis.planner.store import Store
from hetis.planner.store.store import BUCKETS_S


class StoreCollector(Collector):
    """Reads the store's own counts at each scrape."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        health, lease = self._store.health, self._store.lease
        counts = list(accumulate(health.buckets))
        names = [*map(str, BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "hetis_planner_store_seconds",
            "Time of transactions in the store.",
            buckets=list(zip(names, counts, strict=True)),
            sum_value=health.seconds,
        )
        yield CounterMetricFamily(
            "hetis_planner_store_errors", "Transactions that the store could not do.", value=health.errors
        )
        yield GaugeMetricFamily(
            "hetis_planner_store_answered_seconds", "Seconds since the store last answered.", health.answered_s_ago
        )
        yield GaugeMetricFamily("hetis_planner_lease_age_seconds", "Seconds since the last renewal.", lease.age_s)
        yield GaugeMetricFamily("hetis_planner_leads", "1 while this planner leads.", float(lease.is_held))
