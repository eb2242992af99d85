"""Devices that fail and return: the losses, and the devices that continue their work."""

from __future__ import annotations

from collections.abc import Mapping

from hetis.simulator.fleet import SimulatedFleet
from hetis.simulator.micro_batch import MicroBatch, SimulatedStageCopy
from hetis.simulator.replica import ReplicaRun


class Faults:
    """Lets devices of a fleet fail and join.

    A failed GPU of a stage copy stops the copy: requests on its micro-batches are prefilled again, on another copy of
    the stage if there is one, otherwise on another replica. A failed attention worker evicts the requests that had head
    groups on it. A copy that returns takes its share of micro-batches again; those that move to it are prefilled again.
    """

    def __init__(self, fleet: SimulatedFleet) -> None:
        self._fleet = fleet
        self._copies: Mapping[str, list[tuple[ReplicaRun, SimulatedStageCopy, int]]] = _by_device(fleet)
        self._down: dict[SimulatedStageCopy, set[str]] = {}

    def change(self, now_s: float, device: str, joins: bool) -> None:
        """Let a device fail or join; one that the plan does not use changes nothing."""
        changed = dict[ReplicaRun, None]()  # in order; once each, though all copies that share experts stop together
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
            return
        hit = copy.pool.holders(card)
        for batch in replica.batches:
            if copy in batch.copies:
                for request in reversed([one for one in batch.requests() if one in hit]):
                    self._forget(request)
                    replica.lose(now_s, batch, request)
        copy.pool.lose(card)
        replica.wake(now_s)

    def _rearrange(self, now_s: float, replica: ReplicaRun) -> None:
        """Restart micro-batches whose copies changed; without a copy of some stage the replica is down."""
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
        log = replica.log
        for request in [*batch.sending, *batch.reserved]:  # `KvTransfers` handles them at the time of their arrival
            replica.kv.release(batch, request, log.target[request])
        batch.sending.clear()
        batch.reserved.clear()

    def _forget(self, request: int) -> None:
        if self._fleet.transfers is not None:
            self._fleet.transfers.cancel(request)


def _by_device(fleet: SimulatedFleet) -> dict[str, list[tuple[ReplicaRun, SimulatedStageCopy, int]]]:
    """Return the places of every device: as a rank (0) or as a pool's card by number; shared cards in several pools."""
    found: dict[str, list[tuple[ReplicaRun, SimulatedStageCopy, int]]] = {}
    for replica in fleet.replicas:
        for copies in replica.stages:
            for copy in copies:
                for device in copy.devices:
                    found.setdefault(device, []).append((replica, copy, 0))
                for card, device in enumerate(copy.cards, start=1):
                    found.setdefault(device, []).append((replica, copy, card))
    return found
