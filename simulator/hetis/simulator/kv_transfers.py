"""Prompts that are prefilled on one replica and decoded on another: choice of the receiver, and the arrival of KV.

A seat and blocks at the decode replica are taken when a prompt begins, because its KV is sent layer by layer while
later layers and chunks compute. So a transfer may use its links from that time, and cannot end before the last layer of
the last chunk has arrived. Links are shared (`links.py`): the GPUs of both ends, and the link between two zones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hetis.simulator.events import Events
from hetis.simulator.links import FleetLinks, transfer
from hetis.simulator.micro_batch import MicroBatch, SimulatedStageCopy
from hetis.simulator.replica import ReplicaRun
from hetis.simulator.request_log import RequestLog
from hetis.solver.check.fleet import Fleet as Devices
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem


@dataclass(slots=True)
class _Route:
    """A target of a prefill replica: ``credit`` grows with the planned share and falls with every request sent."""

    replica: ReplicaRun
    share: float
    credit: float = 0.0


@dataclass(frozen=True, slots=True)
class _Expected:
    """A prompt whose KV goes to a micro-batch of another replica, from ``begun_s`` on."""

    begun_s: float
    replica: ReplicaRun
    batch: MicroBatch


class KvTransfers:
    """All KV routes of a plan. ``requeue`` takes requests whose KV was lost in transfer.

    Requests are distributed according to the plan, or ``to_emptiest``: to the decode replica with the fewest of them.

    Attributes:
        senders: prefill replicas by the number of the decode replica that they send to.
    """

    def __init__(
        self, plan: Plan, problem: PlacementProblem, devices: Devices, replicas: Sequence[ReplicaRun], log: RequestLog,
        events: Events, requeue: Callable[[float, int], None], links: FleetLinks, *, to_emptiest: bool = False,
    ) -> None:  # fmt: skip
        self._to_emptiest = to_emptiest
        self._log, self._events, self._requeue = log, events, requeue
        self._model, self._network = problem.model, problem.cluster.network
        self._zones = [devices.zones_of(one.devices())[0] for one in plan.replicas]
        self._links = links
        self._routes: dict[int, list[_Route]] = {}
        self.senders: dict[int, list[ReplicaRun]] = {}
        for route in plan.kv_routes:
            self.senders.setdefault(route.decode, []).append(replicas[route.prefill])
            self._routes.setdefault(route.prefill, []).append(_Route(replicas[route.decode], route.rate))
        self._expected: dict[int, _Expected] = {}

    def may_start(self, now_s: float, replica: ReplicaRun, request: int) -> bool:
        """Take a seat and blocks for a prompt at a target of its route; False if no target has room."""
        routes = self._routes.get(replica.number)
        if routes is None or self._log.output[request] - self._log.produced[request] == 1:
            return True  # it stays on its replica, or its prompt makes its last token
        for route in sorted(routes, key=self._turn):
            batch = route.replica.expect(request) if route.replica.is_up else None
            if batch is not None:
                total = sum(other.share for other in routes)
                for other in routes:
                    other.credit += other.share
                route.credit -= total
                self._expected[request] = _Expected(now_s, route.replica, batch)
                return True
        return False

    def _turn(self, route: _Route) -> float:
        """Return the sort key of a route; routes are tried in increasing order."""
        return route.replica.seats_taken() if self._to_emptiest else -(route.credit + route.share)

    def take_prompt(self, now_s: float, replica: ReplicaRun, batch: MicroBatch, request: int) -> bool:
        """Send the KV of a finished prompt; False: it decodes on the same replica."""
        expected = self._expected.get(request)
        if expected is None:
            return False
        batch.sending.add(request)
        landed_s = max(
            now_s + self._landing_s(replica, batch, request), self._sent_s(replica, batch, request, expected)
        )
        self._events.at(landed_s, self._land, replica, batch, request)
        return True

    def cancel(self, request: int) -> None:
        """Cancel the transfer of a prompt that was lost at its prefill replica."""
        expected = self._expected.pop(request, None)
        if expected is not None and request in expected.batch.reserved:
            expected.batch.reserved.discard(request)
            expected.replica.kv.release(expected.batch, request, self._log.target[request])

    def _land(self, now_s: float, sender: ReplicaRun, batch: MicroBatch, request: int) -> None:
        if request in batch.sending:
            batch.sending.discard(request)
            sender.kv.release(batch, request, self._log.target[request])
        sender.outstanding -= 1
        expected = self._expected.pop(request, None)
        is_there = expected is not None and expected.batch.alive and request in expected.batch.reserved
        if expected is not None and is_there and batch.alive:
            self._log.kv_transfers += 1
            expected.replica.land(now_s, expected.batch, request)
        else:
            if expected is not None:
                self._expected[request] = expected
                self.cancel(request)
            self._log.evict(request)
            self._requeue(now_s, request)
        sender.wake(now_s)

    # --- time

    def _landing_s(self, replica: ReplicaRun, batch: MicroBatch, request: int) -> float:
        """Return the time for the last layer of the last chunk, on the slowest stage."""
        target = self._log.target[request]
        num_bytes = self._layer_bytes(target, min(1.0, replica.batching.chunk_tokens / target))
        return max(
            float(copy.timing.cost.transfer_s(num_bytes, copy.timing.shape.hop_link))
            + copy.timing.shape.hop_link.latency_s
            for copy in batch.copies
        )

    def _sent_s(self, replica: ReplicaRun, batch: MicroBatch, request: int, expected: _Expected) -> float:
        """Return when the KV has passed all its links."""
        tokens, begun_s = self._log.target[request], expected.begun_s
        chunks = math.ceil(tokens / replica.batching.chunk_tokens)
        ends = list[float]()
        for copy in batch.copies:
            timing = copy.timing
            part_s = float(timing.cost.transfer_s(self._layer_bytes(tokens, 1.0 / chunks), timing.shape.hop_link))
            leaving = self._links.leaving(copy.devices[0])
            ends.append(transfer(begun_s, timing.layers * chunks * part_s, leaving))
        for copy in expected.batch.copies:
            ends.extend(self._received(begun_s, copy, tokens))
        zones = self._zones[replica.number], self._zones[expected.replica.number]
        if zones[0] != zones[1]:
            num_bytes = self._model.prompt_kv_bytes(tokens)
            seconds = num_bytes / self._network.zone_link(*zones).bytes_per_s
            ends.append(transfer(begun_s, seconds, self._links.between(*zones)))
        return max(ends)

    def _received(self, begun_s: float, copy: SimulatedStageCopy, tokens: int) -> Iterator[float]:
        """Yield when the KV of a prompt is in one copy: kept groups on its ranks, the others directly on its cards."""
        timing, model = copy.timing, self._model
        pool, group_bytes = timing.shape.pool, tokens * model.kv_bytes_per_token_group()
        away = 0 if pool is None else pool.head_groups * timing.shape.tp
        kept = model.head_groups - away
        if kept:  # otherwise no KV is sent to the ranks, and their link is not used
            layer_s = float(timing.cost.transfer_s(kept * group_bytes + model.state_bytes(), timing.shape.hop_link))
            yield transfer(begun_s, timing.layers * layer_s, self._links.coming(copy.devices[0]))
        if pool is not None:
            layer_s = float(timing.cost.transfer_s(away * group_bytes / pool.cards, pool.link))
            for card in copy.cards:
                yield transfer(begun_s, timing.layers * layer_s, self._links.coming(card))

    def _layer_bytes(self, tokens: int, share: float) -> float:
        """Return the bytes of one layer that a share of a prompt of ``tokens`` brings: KV, and as much of its state."""
        whole = tokens * self._model.head_groups * self._model.kv_bytes_per_token_group() + self._model.state_bytes()
        return share * whole
