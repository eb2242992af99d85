"""The agent's own metrics: counters are served on the loopback, in the format of Prometheus."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hetis.runtime.agent.devices import discover
from hetis.runtime.agent.metrics import LOOPBACK, AgentMetrics
from hetis.v1 import agent_service_pb2, report_pb2


def served(metrics: AgentMetrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    port = metrics.serve(0)
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        metrics.close()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_address_that_is_taken_is_named_with_its_option() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"^--metrics: cannot listen on {LOOPBACK}:{port}: Address already in use$"):
            AgentMetrics(version="1.2").serve(port)


def test_the_stream_and_its_messages_are_counted() -> None:
    metrics = AgentMetrics(version="1.2")
    metrics.stream_opened(7)
    metrics.sent(agent_service_pb2.ConnectNodeRequest(heartbeat=agent_service_pb2.Heartbeat()))
    metrics.received(agent_service_pb2.ConnectNodeResponse(delta=agent_service_pb2.Delta()))
    metrics.delta_refused("STALE_EPOCH")
    metrics.change_ended("flipped")
    metrics.engine_scraped("unreachable", 3.5)
    found = served(metrics)
    assert found["hetis_agent_build", "1.2"] == 1
    assert found["hetis_agent_connected",] == 1
    assert found["hetis_agent_epoch",] == 7
    assert found["hetis_agent_messages_sent_total", "heartbeat"] == 1
    assert found["hetis_agent_messages_received_total", "delta"] == 1
    assert found["hetis_agent_deltas_refused_total", "STALE_EPOCH"] == 1
    assert found["hetis_agent_changes_total", "flipped"] == 1
    assert found["hetis_agent_engine_scrapes_total", "unreachable"] == 1
    assert found["hetis_agent_engine_age_seconds",] == 3.5
    metrics.stream_ended("unavailable")
    assert served(metrics)["hetis_agent_connected",] == 0


def test_devices_are_shown_by_index_and_type_and_forgotten_when_they_are_gone() -> None:
    metrics = AgentMetrics(version="1.2")
    metrics.inventory_found(discover("simulated:L4:2"))
    ill = report_pb2.DeviceReport(
        index=1, total_blocks=10, used_blocks=4, throttle_reasons=[report_pb2.THROTTLE_REASON_THERMAL], unhealthy="XID"
    )
    metrics.devices_sampled([report_pb2.DeviceReport(throttle_reasons=[report_pb2.THROTTLE_REASON_IDLE]), ill])
    found = served(metrics)
    assert found["hetis_agent_device_kv_blocks_used", "L4", "1"] == 4
    assert [found["hetis_agent_device_throttled", "L4", index] for index in "01"] == [0, 1]
    assert [found["hetis_agent_device_healthy", "L4", index] for index in "01"] == [1, 0]
    metrics.inventory_found(discover("simulated:L4:1"))
    assert not [key for key in served(metrics) if key[0].startswith("hetis_agent_device")]
