"""The plugin's counts in vLLM's own metrics. See `hetis.runtime.vllm.counts` for the list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from hetis.runtime.vllm.counts import COUNTERS, DISPATCH_BUCKETS, DISPATCH_SECONDS, GAUGES, merged, summary

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class HetisStats(KVConnectorStats):  # type: ignore[misc]
    """The counts of an interval as plain data, which vLLM carries from the scheduler to its metrics."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return HetisStats(merged(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        return summary(self.data)

    def is_empty(self) -> bool:
        return not self.data


class HetisPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters, gauges and a histogram next to vLLM's, with vLLM's labels."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._gauges = {
            name: self._gauge_cls(
                name=name,
                documentation=one.text,
                labelnames=[*labelnames, *one.labels],
                multiprocess_mode="mostrecent",
            )
            for name, one in GAUGES.items()
        }
        self._counters = {
            name: self._counter_cls(name=name, documentation=one.text, labelnames=[*labelnames, *one.labels])
            for name, one in COUNTERS.items()
        }
        self._dispatch = self._histogram_cls(
            name="hetis_dispatch_seconds",
            documentation=DISPATCH_SECONDS.text,
            labelnames=labelnames,
            buckets=list(DISPATCH_BUCKETS),
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for name, samples in transfer_stats_data.get("gauges", {}).items():
            for label, value in samples.items():
                self._gauges[name].labels(*values, *_split(label)).set(value)
        for name, samples in transfer_stats_data.get("counters", {}).items():
            for label, value in samples.items():
                self._counters[name].labels(*values, *_split(label)).inc(value)
        for seconds in transfer_stats_data.get("dispatch_s", ()):
            self._dispatch.labels(*values).observe(seconds)


def _split(label: str) -> list[str]:
    return label.split("|") if label else []
