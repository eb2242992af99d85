"""What Prometheus reads of measured costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hetis.runtime.measured.following import DeviceCost


class CostMetrics(Collector):
    """Scale and times of every device, as they are when they are asked for."""

    def __init__(self, labels: Mapping[str, str], costs: Callable[[], Sequence[DeviceCost]]) -> None:
        self._labels, self._costs = labels, costs

    def collect(self) -> Iterator[Metric]:
        costs = self._costs()
        names = [*self._labels, "device"]
        scale = GaugeMetricFamily(
            "hetis_device_cost_scale",
            "What attention costs on the device over what was measured at the start.",
            labels=names,
        )
        measured = CounterMetricFamily(
            "hetis_device_layer_seconds_measured",
            "Time of the decode layers of the device whose time is known.",
            labels=names,
        )
        predicted = CounterMetricFamily(
            "hetis_device_layer_seconds_predicted",
            "What was predicted of the same layers, with the coefficients then in use.",
            labels=names,
        )
        for cost in costs:
            values = [*self._labels.values(), cost.name]
            scale.add_metric(values, cost.scale)
            measured.add_metric(values, cost.measured_s)
            predicted.add_metric(values, cost.predicted_s)
        yield from (scale, measured, predicted)
