"""All replicas of a plan, the requests that arrive, and the KV transfers between replicas."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from hetis.simulator.events import Events
from hetis.simulator.kv_transfers import KvTransfers
from hetis.simulator.micro_batch import MicroBatch
from hetis.simulator.replica import Outside, ReplicaRun
from hetis.simulator.request_log import RequestLog
from hetis.simulator.router import Router
from hetis.simulator.values import Request, SaturatingSource
from hetis.solver.errors import InvalidProblemError


class SimulatedFleet(Outside):
    """Gives requests to replicas at their arrival, and requests of a source as soon as there is room.

    Attributes:
        takers: replicas that take prompts: all except those that only decode, and prefill replicas without a route in
            the plan: a prompt there would wait forever.
        held: requests that arrived, or returned, while no taker was up.
    """

    def __init__(
        self, replicas: Sequence[ReplicaRun], log: RequestLog, events: Events, router: Router
    ) -> None:  # fmt: skip
        self.replicas, self.log, self.events, self.router = replicas, log, events, router
        self.transfers: KvTransfers | None = None
        self.takers = [replica for replica in replicas if replica.batching.chunk_tokens and replica.rate > 0]
        self.held: deque[int] = deque()
        self._arrivals: Iterator[Request] = iter(())
        self._source: SaturatingSource | None = None
        for replica in replicas:
            replica.outside = self

    def serve(self, arrivals: Iterator[Request]) -> None:
        """Serve requests at their arrival times, from now on."""
        self._arrivals = arrivals
        self._schedule_next(0.0)

    def serve_all(self, source: SaturatingSource) -> None:
        """Serve a source in which requests are always waiting."""
        self._source = source
        for replica in self.takers:
            replica.wake(0.0)

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

    def has_room(self, now_s: float, replica: ReplicaRun) -> None:
        if self.transfers is not None:
            for sender in self.transfers.senders.get(replica.number, ()):
                sender.wake(now_s)

    def requeue(self, now_s: float, replica: ReplicaRun, request: int) -> None:
        if replica.batching.chunk_tokens and replica.is_up:
            super().requeue(now_s, replica, request)
        else:  # it has to be prefilled elsewhere, or this replica cannot do it now
            self.events.at(now_s, self.route, request)

    # --- arrivals

    def route(self, now_s: float, request: int) -> None:
        """Give a request to a replica."""
        up = [replica for replica in self.takers if replica.is_up]
        if not up:
            self.held.append(request)
            return
        self.router.choose(up if len(up) < len(self.takers) else self.takers).offer(now_s, request)

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
