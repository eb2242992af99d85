"""The agent's own metrics, served to Prometheus on the loopback interface by default.

Names begin with ``hetis_agent_``. Devices are labelled with their index and type; KV is counted as in `DeviceReport`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from hetis.commands.endpoints import joined
from hetis.runtime.agent.pressure import ScrapeState
from hetis.v1 import agent_service_pb2, inventory_pb2, report_pb2

LOOPBACK = "127.0.0.1"
# The text of each metric of a device, and its value in a report.
_OF_DEVICES: dict[str, tuple[str, Callable[[report_pb2.DeviceReport], float]]] = {
    "kv_blocks": ("Total KV blocks, in the engine's unit.", lambda report: report.total_blocks),
    "kv_blocks_used": ("KV blocks in use, which cannot be evicted.", lambda report: report.used_blocks),
    "memory_used_bytes": ("GPU memory used by all processes.", lambda report: report.memory_used_bytes),
    "busy_ratio": ("Fraction of time in which a kernel ran.", lambda report: report.busy_ratio),
    "clock_hertz": ("Clock frequency of the multiprocessors (SMs).", lambda report: report.clock_hz),
    "throttled": (
        "1 if the clock is reduced for a reason other than idleness, else 0.",
        lambda report: bool(set(report.throttle_reasons) - {report_pb2.THROTTLE_REASON_IDLE}),
    ),
    "healthy": ("1 if the device is usable, else 0.", lambda report: not report.unhealthy),
}


class AgentMetrics:
    """The agent's metrics. Every agent has its own registry, so that one process can hold several agents."""

    def __init__(self, *, version: str) -> None:
        self.registry = CollectorRegistry()
        self._types: dict[int, str] = {}
        self._serving: tuple[object, ...] | None = None
        self._gauge("build", "Always 1; the label holds the software version.", "version").labels(version).set(1)
        self._connected = self._gauge("connected", "1 if the stream to the planner is open, else 0.")
        self._epoch = self._gauge("epoch", "Highest epoch accepted from a planner.")
        self._connects = self._counter("connects", "Attempts to open a stream to the planner, by outcome.", "outcome")
        self._sent = self._counter("messages_sent", "Messages sent to the planner, by kind.", "kind")
        self._received = self._counter("messages_received", "Messages received from the planner, by kind.", "kind")
        self._refused = self._counter("deltas_refused", "Deltas rejected with a NACK, by reason.", "reason")
        self._changes = self._counter("changes", "Changes that ended on this node, by outcome.", "outcome")
        self._scrapes = self._counter("engine_scrapes", "Scrapes of the engine's metrics, by outcome.", "state")
        self._age = self._gauge("engine_age_seconds", "Age of the engine's most recent metrics.")
        self._engine = self._gauge("engine_connected", "1 if the engine answers, or there is none; else 0.")
        labels = ("index", "gpu_type")
        self._devices = {name: self._gauge(f"device_{name}", text, *labels) for name, (text, _) in _OF_DEVICES.items()}

    def serve(self, port: int, *, host: str = LOOPBACK) -> int:
        """Serve ``/metrics`` in a thread, and return the port (0: any). Raises OSError if the address is taken, or not
        this machine's.
        """
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise OSError(f"--metrics: cannot listen on {joined(host, port)}: {error.strerror or error}") from None
        server.set_app(_answering(server.get_app()))
        self._serving = (server, thread)
        return int(server.server_address[1])

    def close(self) -> None:
        """Stop serving."""
        if self._serving is not None:
            server, thread = self._serving
            server.shutdown()  # type: ignore[attr-defined]  # its class is private to prometheus_client
            server.server_close()  # type: ignore[attr-defined]
            thread.join()  # type: ignore[attr-defined]
            self._serving = None

    # --- the stream

    def stream_opened(self, epoch: int) -> None:
        self._connected.set(1)
        self._epoch.set(epoch)
        self._connects.labels("welcome").inc()

    def stream_ended(self, outcome: str) -> None:
        """Count the end of a stream. ``outcome`` is the status code or reason in lower case."""
        self._connected.set(0)
        self._connects.labels(outcome).inc()

    def sent(self, message: agent_service_pb2.ConnectNodeRequest) -> None:
        self._sent.labels(message.WhichOneof("message") or "none").inc()

    def received(self, message: agent_service_pb2.ConnectNodeResponse) -> None:
        self._received.labels(message.WhichOneof("message") or "none").inc()

    def delta_refused(self, reason: str) -> None:
        """Count a refused delta. ``reason`` is an ErrorReason without its prefix."""
        self._refused.labels(reason).inc()

    def change_ended(self, outcome: str) -> None:
        """Count a change that ended. ``outcome`` is flipped or aborted."""
        self._changes.labels(outcome).inc()

    # --- the node

    def engine_reached(self, is_reached: bool) -> None:
        """Record whether the engine answers. An agent without an engine lacks nothing."""
        self._engine.set(is_reached)

    def engine_scraped(self, state: str, age_s: float) -> None:
        """Count a scrape of the engine. ``state`` is a `ScrapeState`."""
        self._scrapes.labels(state).inc()
        self.engine_reached(state == ScrapeState.READ)
        self._age.set(age_s)

    def inventory_found(self, inventory: inventory_pb2.NodeInventory) -> None:
        """Set the devices that samples belong to, and forget those that are gone."""
        for gauge in self._devices.values():
            gauge.clear()
        self._types = {device.index: device.gpu_type for device in inventory.devices}

    def devices_sampled(self, reports: Iterable[report_pb2.DeviceReport]) -> None:
        for report in reports:
            for name, (_, value_in) in _OF_DEVICES.items():
                gauge = self._devices[name].labels(str(report.index), self._types.get(report.index, ""))
                gauge.set(value_in(report))

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"hetis_agent_{name}", meaning, labels, registry=self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"hetis_agent_{name}", meaning, labels, registry=self.registry)


def _answering(app: Any) -> Any:
    """Wrap ``app`` to answer in the plainest format if an accepted version is not a number: the library fails on it."""

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        try:
            return app(environ, start_response)
        except (TypeError, ValueError):
            return app({**environ, "HTTP_ACCEPT": ""}, start_response)

    return answer
