"""What Prometheus reads of measured costs."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from hetis.runtime.measured.following import DeviceCost
from hetis.runtime.measured.metrics import CostMetrics


def test_every_device_has_its_scale_and_its_times() -> None:
    costs = [DeviceCost(name="a", scale=1.0, measured_s=2.0, predicted_s=2.5)]
    registry = CollectorRegistry()
    registry.register(CostMetrics({"model_name": "m"}, lambda: costs))
    costs.append(DeviceCost(name="b", scale=4.0, measured_s=0.0, predicted_s=0.0))
    lines = generate_latest(registry).decode().splitlines()
    for line in (
        'hetis_device_cost_scale{device="b",model_name="m"} 4.0',
        'hetis_device_layer_seconds_measured_total{device="a",model_name="m"} 2.0',
        'hetis_device_layer_seconds_predicted_total{device="a",model_name="m"} 2.5',
    ):
        assert line in lines
