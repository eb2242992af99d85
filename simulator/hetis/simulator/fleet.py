"""All replicas of a plan: routing of requests, the KV that replicas send each other, and devices that fail and return.

For a prompt that is prefilled on one replica and decoded on another, a seat and blocks at the decode replica are taken
when the prompt begins, because its KV is sent layer by layer while later layers and chunks are computed. A transfer
may therefore use its links from then on, and cannot end before the last layer of the last chunk has arrived. Links
are shared: those of the GPUs at both ends, and the link between two zones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hetis.simulator.events import Events, FleetLinks, SharedLink, transfer
from hetis.simulator.micro_batch import MicroBatch, SimulatedStageCopy
from hetis.simulator.replica import Outside, ReplicaRun
from hetis.simulator.routers import RangeRouter, Router
from hetis.simulator.timing import Wire
from hetis.simulator.values import Request, RequestLog, SaturatingSource
from hetis.solver.check.replica_shapes import Fleet as Devices
from hetis.solver.check.replica_shapes import slowest
from hetis.solver.cluster import Link
from hetis.solver.errors import InvalidProblemError
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
    """A prompt whose KV goes to a micro-batch of another replica; sending starts at ``begun_s``."""

    begun_s: float
    replica: ReplicaRun
    batch: MicroBatch


class KvTransfers:
    """All KV routes of a plan. ``requeue`` receives requests whose KV was lost in transfer.

    Requests are distributed as in the plan or, with ``to_emptiest``, to the decode replica with the fewest requests.

    Attributes:
        senders: prefill replicas, by the number of the decode replica to which they send.
    """

    def __init__(
        self, plan: Plan, problem: PlacementProblem, devices: Devices, replicas: Sequence[ReplicaRun], log: RequestLog,
        events: Events, requeue: Callable[[float, int], None], links: FleetLinks, *, to_emptiest: bool = False,
    ) -> None:  # fmt: skip
        self._to_emptiest = to_emptiest
        self._log, self._events, self._requeue = log, events, requeue
        self._models = [problem.of_replica(one).model for one in plan.replicas]  # each in its replica's precision
        self._network = problem.cluster.network
        self._zones = [devices.zones_of(one.devices())[0] for one in plan.replicas]
        self._devices, self._of_replica = devices, [one.devices() for one in plan.replicas]
        self._paths: dict[tuple[MicroBatch, MicroBatch], _Path] = {}
        self._links = links
        self._routes: dict[int, list[_Route]] = {}
        self.senders: dict[int, list[ReplicaRun]] = {}
        for route in plan.kv_routes:
            self.senders.setdefault(route.decode, []).append(replicas[route.prefill])
            self._routes.setdefault(route.prefill, []).append(_Route(replicas[route.decode], route.rate))
        self._expected: dict[int, _Expected] = {}

    def may_start(self, now_s: float, replica: ReplicaRun, request: int) -> bool:
        """Reserve a seat and blocks for a prompt at a target of its replica's routes; False if no target has room."""
        routes = self._routes.get(replica.number)
        if routes is None or self._log.output[request] - self._log.produced[request] == 1:
            return True  # it decodes on its own replica, or its prompt produces its only token
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

    def most_tokens(self, sender: ReplicaRun) -> int:
        """Return the most tokens of a prompt for which a decode replica that a prefill replica sends to has room."""
        routes = self._routes.get(sender.number)
        return max(route.replica.most_tokens for route in routes) if routes else sender.most_tokens

    def take_prompt(self, now_s: float, replica: ReplicaRun, batch: MicroBatch, request: int) -> bool:
        """Send the KV of a finished prompt; return False if it decodes on the same replica."""
        if request not in self._expected:
            return False
        batch.sending.add(request)
        self._events.at(self._landed_s(now_s, replica, batch, request), self._land, replica, batch, request)
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

    def _path(self, sender: ReplicaRun, batch: MicroBatch, expected: _Expected) -> _Path:
        """Return what the KV of a micro-batch's prompts passes on its way to one that decodes."""
        path = self._paths.get((batch, expected.batch))
        if path is None:
            model, receiver = self._models[sender.number], expected.replica
            wires = dict[tuple[str, int, Link], Wire]()

            def wire(copy: SimulatedStageCopy, other: ReplicaRun) -> Wire:
                shape, link = copy.timing.shape, self._kv_link(copy, other)
                return wires.setdefault((shape.gpu, shape.tp, link), copy.timing.wire(link))

            def coming(copy: SimulatedStageCopy) -> Iterator[_Part]:
                """Yield what enters one copy: kept groups go to its ranks, the others directly to its cards."""
                timing, pool = copy.timing, copy.timing.shape.pool
                away, each = 0 if pool is None else pool.head_groups * timing.shape.tp, model.kv_bytes_per_token_group()
                kept = model.head_groups - away
                if kept:  # otherwise no KV is sent to the ranks, and their links are not used
                    end = self._links.coming(copy.devices[0])
                    yield _Part(end, timing.layers, wire(copy, sender), kept, model.state_bytes(), each)
                for card in copy.cards if pool is not None else ():
                    assert pool is not None, "it has the card"
                    over = copy.timing.wire(pool.link)
                    yield _Part(self._links.coming(card), timing.layers, over, away, 0.0, each, pool.cards)

            zones = self._zones[sender.number], self._zones[receiver.number]
            is_afar = zones[0] != zones[1]
            self._paths[batch, expected.batch] = path = _Path(
                leaving=[(self._links.leaving(c.devices[0]), c.timing.layers, wire(c, receiver)) for c in batch.copies],
                coming=[part for copy in expected.batch.copies for part in coming(copy)],
                between=(self._links.between(*zones), self._network.zone_link(*zones)) if is_afar else None,
            )
        return path

    def _kv_link(self, copy: SimulatedStageCopy, other: ReplicaRun) -> Link:
        """Return the link of a stage copy, or a slower one that it has to a node of the replica at the other end."""
        explicit = self._devices.node_links(copy.devices, self._of_replica[other.number])
        return slowest([copy.timing.shape.hop_link, *explicit])

    def _landed_s(self, now_s: float, replica: ReplicaRun, batch: MicroBatch, request: int) -> float:
        """Return when a finished prompt's KV is there: its last chunk's last layer, and all else over all links."""
        expected, tokens, model = self._expected[request], self._log.target[request], self._models[replica.number]
        path, chunk_tokens = self._path(replica, batch, expected), replica.batching.chunk_tokens
        chunks, begun_s = math.ceil(tokens / chunk_tokens), expected.begun_s
        layer_bytes = tokens * model.head_groups * model.kv_bytes_per_token_group() + model.state_bytes()
        last_bytes, part_bytes = min(1.0, chunk_tokens / tokens) * layer_bytes, 1.0 / chunks * layer_bytes
        times = dict[Wire, tuple[float, float]]()  # of the last chunk, and of each
        landed_s = now_s
        for end, layers, wire in path.leaving:
            of_wire = times.get(wire)
            if of_wire is None:
                of_wire = wire.seconds(last_bytes) + wire.latency_s, wire.seconds(part_bytes)
                times[wire] = of_wire
                landed_s = max(landed_s, now_s + of_wire[0])
            sent_s = transfer(begun_s, layers * chunks * of_wire[1], end)
            landed_s = sent_s if sent_s > landed_s else landed_s
        for part in path.coming:
            num_bytes = part.groups * (tokens * part.group_bytes) / part.cards + part.state_bytes
            landed_s = max(landed_s, transfer(begun_s, part.layers * part.wire.seconds(num_bytes), part.end))
        if path.between is not None:
            end, link = path.between
            landed_s = max(landed_s, transfer(begun_s, model.prompt_kv_bytes(tokens) / link.bytes_per_s, end))
        return landed_s


class _Part(NamedTuple):
    """One end of what enters a copy of a stage: some head groups of every layer, shared by a number of cards."""

    end: SharedLink
    layers: int
    wire: Wire
    groups: int
    state_bytes: float
    group_bytes: float  # of a token and layer
    cards: int = 1


@dataclass(frozen=True, slots=True)
class _Path:
    """What the KV of a prompt passes: the ends that it leaves, those at which it arrives, and a link between zones."""

    leaving: Sequence[tuple[SharedLink, int, Wire]]  # with the layers
    coming: Sequence[_Part]
    between: tuple[SharedLink, Link] | None


class SimulatedFleet(Outside):
    """Routes requests to replicas on arrival, or draws requests from a source whenever there is room.

    Attributes:
        takers: replicas that accept prompts: all except decode replicas and prefill replicas without a route in the
            plan, where a prompt would wait forever.
    """

    def __init__(
        self, replicas: Sequence[ReplicaRun], log: RequestLog, events: Events, router: Router | RangeRouter
    ) -> None:
        self.replicas, self.log, self.events, self.router = replicas, log, events, router
        self.transfers: KvTransfers | None = None
        self.takers = [replica for replica in replicas if replica.batching.chunk_tokens and replica.rate > 0]
        self.held: deque[int] = deque()  # requests that arrived or were returned while no taker with room was up
        self._arrivals: Iterator[Request] = iter(())
        self._source: SaturatingSource | None = None
        for replica in replicas:
            replica.outside = self

    def serve(self, arrivals: Iterator[Request]) -> None:
        """Serve requests from now on, at their arrival times."""
        self._arrivals = arrivals
        self._schedule_next(0.0)

    def serve_all(self, source: SaturatingSource) -> None:
        """Serve a source in which requests are always waiting."""
        self._source, self.always_has_requests = source, True
        for replica in self.takers:
            replica.wake(0.0)

    @cached_property
    def _room(self) -> dict[int, int]:
        """The most tokens of a request that a taker, and where it sends its KV, have room for, by number."""
        others = self.transfers
        return {
            one.number: one.most_tokens if others is None else min(one.most_tokens, others.most_tokens(one))
            for one in self.takers
        }

    @cached_property
    def _least_room(self) -> int:
        return min(self._room.values())

    # --- calls by replicas

    def pull(self, now_s: float) -> int | None:
        if self._source is None:
            return None
        request = self._source.next_request(now_s)
        return None if request is None else self.log.arrive(request, now_s)

    def may_start(self, now_s: float, replica: ReplicaRun, request: int) -> bool:
        return self.transfers is None or self.transfers.may_start(now_s, replica, request)

    def take_prompt(self, now_s: float, replica: ReplicaRun, batch: MicroBatch, request: int) -> bool:
        return self.transfers is not None and self.transfers.take_prompt(now_s, replica, batch, request)

    def is_too_long(self, replica: ReplicaRun, request: int) -> bool:
        return self.transfers is not None and self.log.target[request] > self.transfers.most_tokens(replica)

    def refuse(self, now_s: float, replica: ReplicaRun, request: int) -> None:
        tokens = self.log.target[request]
        self._room[replica.number] = min(self._room[replica.number], tokens - 1)
        self._least_room = min(self._least_room, tokens - 1)
        if any(self._room[one.number] >= tokens for one in self._serving(request)):
            self.events.at(now_s, self.route, request)
        else:
            self.log.reject(request)

    def has_room(self, now_s: float, replica: ReplicaRun) -> None:
        if self.transfers is not None:
            for sender in self.transfers.senders.get(replica.number, ()):
                sender.wake(now_s)

    def requeue(self, now_s: float, replica: ReplicaRun, request: int) -> None:
        if replica.batching.chunk_tokens and replica.is_up:
            super().requeue(now_s, replica, request)
        else:  # it has to be prefilled elsewhere, or this replica cannot prefill it now
            self.events.at(now_s, self.route, request)

    # --- arrivals

    def route(self, now_s: float, request: int) -> None:
        """Assign a request to a replica, to one with room for it if there is any."""
        takers, tokens = self._serving(request), self.log.target[request]
        if tokens > self._least_room:
            takers = [replica for replica in takers if self._room[replica.number] >= tokens] or takers
        up = [replica for replica in takers if replica.is_up]
        chosen: ReplicaRun | None = None
        if isinstance(self.router, RangeRouter):
            chosen = self.router.choose(up, request)
        elif up:
            chosen = self.router(up if len(up) < len(takers) else takers)
        if chosen is None:
            self.held.append(request)
        else:
            chosen.offer(now_s, request)

    def _serving(self, request: int) -> list[ReplicaRun]:
        """Return the replicas that accept a request of its class."""
        if not isinstance(self.router, RangeRouter):
            return self.takers
        return self.router.serving(self.takers, request)

    def route_held(self, now_s: float) -> None:
        """Route the held requests after a replica has returned."""
        held, self.held = self.held, deque()
        for request in held:
            self.route(now_s, request)

    def _schedule_next(self, now_s: float) -> None:
        request = next(self._arrivals, None)
        if request is None:
            return
        if request.arrival_s < now_s:
            raise InvalidProblemError(
                f"request {request.id} arrives at {request.arrival_s} s, before the one ahead of it at {now_s} s"
            )
        self.events.at(request.arrival_s, self._arrive, request)

    def _arrive(self, now_s: float, request: Request) -> None:
        self.route(now_s, self.log.arrive(request, now_s))
        self._schedule_next(now_s)


class Faults:
    """Failures and returns of a fleet's devices.

    When a GPU of a stage copy fails, the copy stops: requests in its micro-batches are prefilled again, on another copy
    of the stage if there is one, otherwise on another replica. When an attention worker fails, requests with head
    groups on it are evicted. A copy that returns takes its share of micro-batches again; the requests in those that
    move to it are prefilled again.
    """

    def __init__(self, fleet: SimulatedFleet) -> None:
        self._fleet = fleet
        self._copies: Mapping[str, list[tuple[ReplicaRun, SimulatedStageCopy, int]]] = _by_device(fleet)
        self._down: dict[SimulatedStageCopy, set[str]] = {}

    def change(self, now_s: float, device: str, joins: bool) -> None:
        """Make a device fail or return; a device that the plan does not use changes nothing."""
        changed = dict[ReplicaRun, None]()  # ordered set: copies that share experts stop together, their replica once
        for replica, copy, card in self._copies.get(device, ()):
            if card:
                self._change_card(now_s, replica, copy, card, joins)
            else:
                down = self._down.setdefault(copy, set())
                down.symmetric_difference_update({device} if (device in down) == joins else set())
                if copy.is_up == bool(down):
                    copy.is_up = not down
                    changed[replica] = None
        for replica in changed:
            self._rearrange(now_s, replica)

    def _change_card(self, now_s: float, replica: ReplicaRun, copy: SimulatedStageCopy, card: int, joins: bool) -> None:
        assert copy.pool is not None
        if joins:
            copy.pool.restore(card)
            replica.wake(now_s)
            self._fleet.has_room(now_s, replica)
            return
        hit = copy.pool.holders(card)
        for batch in replica.batches:
            if copy in batch.copies:
                for request in reversed([one for one in batch.requests() if one in hit]):
                    self._forget(request)
                    replica.lose(now_s, batch, request)
                self._release_moving(replica, batch, hit)
        copy.pool.lose(card)
        replica.wake(now_s)
        self._fleet.has_room(now_s, replica)

    def _rearrange(self, now_s: float, replica: ReplicaRun) -> None:
        """Restart micro-batches whose copies changed; a replica is down if a stage has no copy left."""
        replica.is_up = all(any(copy.is_up for copy in copies) for copies in replica.stages)
        for index, batch in enumerate(replica.batches):
            new = replica.new_batch(index)
            if not replica.is_up or new.copies != batch.copies or not batch.alive:
                self._stop(now_s, replica, batch)
                replica.batches[index] = new
                replica.set_idle(new)
        if replica.is_up:
            self._fleet.route_held(now_s)
            replica.wake(now_s)
            self._fleet.has_room(now_s, replica)
        else:
            waiting = list(replica.queue)
            replica.queue.clear()
            replica.outstanding -= len(waiting)
            for request in waiting:
                self._fleet.route(now_s, request)

    def _stop(self, now_s: float, replica: ReplicaRun, batch: MicroBatch) -> None:
        batch.alive = False
        for request in reversed(batch.requests()):
            self._forget(request)
            replica.lose(now_s, batch, request)
        self._release_moving(replica, batch, batch.sending | batch.reserved)

    def _release_moving(self, replica: ReplicaRun, batch: MicroBatch, lost: set[int]) -> None:
        """Free the blocks of lost requests whose KV is in transfer from or to a micro-batch.

        When the transfer ends, `KvTransfers` finds that it is no longer expected.
        """
        for request in batch.sending & lost:
            self._forget(request)
        for request in [*batch.sending & lost, *batch.reserved & lost]:
            replica.kv.release(batch, request, replica.log.target[request])
        batch.sending -= lost
        batch.reserved -= lost

    def _forget(self, request: int) -> None:
        if self._fleet.transfers is not None:
            self._fleet.transfers.cancel(request)


def _by_device(fleet: SimulatedFleet) -> dict[str, list[tuple[ReplicaRun, SimulatedStageCopy, int]]]:
    """Return the roles of every device: a rank (0), or a card's number in a pool; a shared card is in several pools."""
    found: dict[str, list[tuple[ReplicaRun, SimulatedStageCopy, int]]] = {}
    for replica in fleet.replicas:
        for copies in replica.stages:
            for copy in copies:
                for device in copy.devices:
                    found.setdefault(device, []).append((replica, copy, 0))
                for card, device in enumerate(copy.cards, start=1):
                    found.setdefault(device, []).append((replica, copy, card))
    return found
