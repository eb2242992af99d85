"""The fleet's counters as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from hetis.planner.fleet.counters import FleetCounters


class FleetCollector(Collector):
    """Reads the counters at each scrape."""

    def __init__(self, counters: FleetCounters) -> None:
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        counters = self._counters
        yield _table("agent_messages", "Messages of agents.", "kind", counters.messages)
        yield _table("deltas_sent", "Deltas sent to agents.", "kind", counters.deltas)
        yield _table("deltas_refused", "Deltas that agents refused.", "reason", counters.nacks)
        yield _table("redispatches_ended", "Re-dispatches that ended.", "state", counters.redispatches)
        yield _number("reports_dropped", "Reports that a newer one had overtaken.", counters.reports_dropped)
        yield _number("agent_streams", "Streams of agents that began.", counters.streams)
        yield _number("agent_takeovers", "Streams that ended another of their node.", counters.takeovers)
        yield _number("agent_refusals", "Streams refused because another agent had the node.", counters.refusals)
        yield _number("contradictions", "Second words of an authority that differ: a bug.", counters.contradictions)


def _table(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"hetis_planner_{name}", text, labels=[label])
    for key, count in counts.items():
        family.add_metric([key], count)
    return family


def _number(name: str, text: str, count: int) -> CounterMetricFamily:
    return CounterMetricFamily(f"hetis_planner_{name}", text, value=count)
