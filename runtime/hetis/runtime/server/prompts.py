"""Prompts that `hetis-serve` computes for other engines, and those that others compute for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hetis.runtime.engine.engine import Engine
from hetis.runtime.handover.kv import whole_shape
from hetis.runtime.handover.peer import Arrivals, PrefillPeer
from hetis.runtime.handover.prompts import PromptCounts, RemotePrompts
from hetis.runtime.handover.service import PromptService
from hetis.runtime.server.desk import Desk
from hetis.runtime.server.errors import ServeError
from hetis.runtime.transport.tcp import listen

_LEAST_SILENT_S = 5.0  # something is said every second
_END_S = 2.0  # for the peers' threads, all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompts:
    """Both ends, as far as this engine has them; ``close`` before the engine ends."""

    service: PromptService | None
    remote: RemotePrompts | None
    peers: tuple[PrefillPeer, ...] = ()

    def close(self) -> None:
        """Ends the connections: whoever waits for KV from here has it computed elsewhere."""
        for peer in self.peers:
            peer.end()
        if self.service is not None:
            self.service.close()
        deadline_s = time.monotonic() + _END_S
        for peer in self.peers:
            peer.close(max(deadline_s - time.monotonic(), 0.0))


def listen_for_prompts(address: tuple[str, int] | None) -> socket.socket | None:
    """Where decoding engines connect; before anything is loaded, so that an address that is taken is told at once.

    Raises:
        ServeError: it is taken, or not ours.
    """
    if address is None:
        return None
    try:
        return listen(*address)
    except OSError as error:
        host, port = address
        raise ServeError(f"--kv-listen {host}:{port}: {(error.strerror or str(error)).lower()}") from None


def share_prompts(
    engine: Engine,
    desk: Desk,
    listener: socket.socket | None,
    peers: Sequence[tuple[str, int]],
    *,
    key: bytes,
    silent_s: float,
) -> SharedPrompts:
    """Computes prompts for those that connect to ``listener``, and has ours computed by ``peers``.

    The engine must be warm and measured. A peer or caller that says nothing for ``silent_s``, 5 at least, is lost.
    """
    silent_s = max(silent_s, _LEAST_SILENT_S)
    service = remote = None
    found: tuple[PrefillPeer, ...] = ()
    if listener is not None:
        service = PromptService(engine, key=key, do=desk.between_steps, silent_s=silent_s)
        service.listen(listener)
    if peers:
        arrivals, shape = Arrivals(), whole_shape(engine)
        found = tuple(
            PrefillPeer(
                *where,
                arrivals,
                shape=shape,
                heads=engine.config.kv_heads,
                key=key,
                epoch=engine.epoch,
                silent_s=silent_s,
            )
            for where in peers
        )
        remote = RemotePrompts(engine, found, arrivals)
        for peer in found:
            peer.start()
    return SharedPrompts(service=service, remote=remote, peers=found)


class PromptMetrics(Collector):
    """What Prometheus reads of prompts that go between engines."""

    def __init__(self, labels: Mapping[str, str], prompts: SharedPrompts) -> None:
        self._labels, self._prompts = labels, prompts

    def collect(self) -> Iterator[Metric]:
        service, remote = self._prompts.service, self._prompts.remote
        counts = remote.counts if remote is not None else PromptCounts()
        names, values = list(self._labels), list(self._labels.values())
        for name, meaning, value in (
            ("hetis_prompts_sent", "Prompts computed here for other engines.", service.num_prompts if service else 0),
            ("hetis_prompts_sent_bytes", "KV that was sent of them.", service.sent_bytes if service else 0),
            ("hetis_prompts_received", "Prompts whose KV came from another engine.", counts.received),
            ("hetis_prompts_received_bytes", "KV that came.", counts.received_bytes),
            ("hetis_prompts_failed", "Prompts that another engine was asked for and did not compute.", counts.failed),
        ):
            counter = CounterMetricFamily(name, meaning, labels=names)
            counter.add_metric(values, value)
            yield counter
        up = GaugeMetricFamily("hetis_prefill_peers_up", "Engines that compute prompts for this one.", labels=names)
        up.add_metric(values, remote.num_up if remote is not None else 0)
        yield up
