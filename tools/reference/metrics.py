"""The page of metrics in ``docs/reference``, from the registries of the programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tools.markdown import code, heading, page, prose, table


def metrics_page() -> str:
    parts = [
        heading(
            "Metrics",
            "What Prometheus reads. [Operations](../operations.md) says which of them to watch; `deploy/` has alerts"
            " and a dashboard.",
        ),
        "## hetis-planner\n\nOn the status page's port, under `/metrics`.\n",
        _metrics(_planner_metrics()),
        "## hetis-agent\n\nAt the address of `--metrics`.\n",
        _metrics(_agent_metrics()),
        "## vLLM with the plugin\n\nIn vLLM's own `/metrics`, with vLLM's labels beside these. `device` is `here` for"
        " the ranks, and otherwise the worker's name.\n",
        _metrics(_plugin_metrics()),
    ]
    return page(parts)


Described = tuple[str, str, Sequence[str], str]  # name, kind, labels, description


def _metrics(found: Iterable[Described]) -> str:
    return table(
        ("metric", "kind", "meaning"),
        (
            (code(f"{name}{{{','.join(labels)}}}" if labels else name), kind, prose(meaning))
            for name, kind, labels, meaning in sorted(found)
        ),
    )


def _of_registry(registry: Any) -> Iterator[Described]:
    """Yield the metrics of a registry, including those without a sample yet."""
    for collector in registry._collector_to_names:
        if hasattr(collector, "_labelnames"):
            (described,) = collector.describe()
            yield _described(described, collector._labelnames)


def _described(family: Any, labels: Sequence[str]) -> Described:
    return family.name + ("_total" if family.type == "counter" else ""), family.type, labels, family.documentation


def _planner_metrics() -> Iterator[Described]:
    from hetis.planner.fleet.settings import FleetCounters
    from hetis.planner.service.observability.metrics import (
        FleetCollector,
        HandshakeCollector,
        ServiceMetrics,
        StoreCollector,
    )
    from hetis.planner.store import Lease
    from hetis.planner.store.health import StoreHealth

    yield from _of_registry(ServiceMetrics("").registry)
    store = StoreCollector(StoreHealth(lambda: 0.0), Lease(0.0))
    for collector in (FleetCollector(FleetCounters()), HandshakeCollector(), store):
        for family in collector.collect():
            yield _described(family, getattr(family, "_labelnames", ()))


def _agent_metrics() -> Iterator[Described]:
    from hetis.runtime.agent.metrics import AgentMetrics

    return _of_registry(AgentMetrics(version="").registry)


def _plugin_metrics() -> Iterator[Described]:
    from hetis.runtime.vllm import counts

    for name, gauge in counts.GAUGES.items():
        yield name, "gauge", gauge.labels, gauge.text
    for name, counter in counts.COUNTERS.items():
        yield f"{name}_total", "counter", counter.labels, counter.text
    yield "hetis_dispatch_seconds", "histogram", counts.DISPATCH_SECONDS.labels, counts.DISPATCH_SECONDS.text
