"""One copy of a stage with its attention workers: the home of each head group, chosen by `hetis.solver.dispatch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from hetis.simulator.events import Events
from hetis.simulator.links import FleetLinks
from hetis.simulator.migration import Migration
from hetis.simulator.pool_load import Decoding, PoolLoad
from hetis.simulator.pool_timing import PoolTiming
from hetis.simulator.request_log import RequestLog
from hetis.simulator.values import FloatArray, IntArray, Settings
from hetis.solver.dispatch.problem import DeviceLoad, Requests
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.dispatch.state import DispatchState

LOOK_STEPS = 16  # steps of a micro-batch between two checks by re-dispatch


class SharedCard:
    """An attention worker that serves several stages in turn, with the time when it is free."""

    __slots__ = ("free_s",)

    def __init__(self) -> None:
        self.free_s = 0.0


class PoolCopy:
    """The primary of one stage copy, device 0, and the cards of its pool.

    Attributes:
        homes: the head groups of every request here on each device, [D].
        busy_s: seconds of attention on each device, [D].
    """

    def __init__(
        self, *, names: tuple[str, ...], blocks: IntArray, timing: PoolTiming, split: tuple[int, int], log: RequestLog,
        events: Events, settings: Settings, mean_output: float, growth: int, shared: tuple[SharedCard, ...] | None,
        links: FleetLinks,
    ) -> None:  # fmt: skip
        """``split``: head groups of a request on the primary and on the cards together, as in the plan.
        ``growth``: output tokens for which a new request needs room; its actual output is not known."""
        self.timing, self.settings, self._split, self._shared = timing, settings, split, shared
        self.state = DispatchState(timing.stage(names), blocks)
        self._growth = growth
        self.homes: dict[int, IntArray] = {}
        self.busy_s = np.zeros(len(names))
        self.total_blocks = np.asarray(blocks, np.int64)
        self._next_card = 0
        self._dispatch: Callable[[DeviceLoad, Requests], IntArray | None] = self._as_planned
        self._migration: Migration | None = None
        if settings.dispatch:
            self._dispatch = _dispatcher_of(self.state)
            if settings.redispatch:
                self._migration = Migration(
                    self.state, timing, links, log, events, theta=settings.theta, mean_output=mean_output
                )

    @property
    def is_shared(self) -> bool:
        return self._shared is not None

    @property
    def is_whole(self) -> bool:
        """Return whether no card has failed."""
        return all(device.status is DeviceStatus.OK for device in self.state.devices)

    @property
    def num_devices(self) -> int:
        return len(self.total_blocks)

    # --- requests

    def place(self, load: PoolLoad, request: int, tokens: int) -> bool:
        """Give the head groups of a request with a prompt of ``tokens`` homes with room; False if there is none."""
        state, heads = self.state, self.state.stage.heads
        free = state.load().free_blocks
        new = Requests(
            ids=(str(request),),
            context_tokens=np.array([tokens]),
            growth_tokens=np.array([self._growth if len(state) else 0]),
        )
        here = DeviceLoad(
            heads=load.groups * heads.queries_per_group,
            kv_bytes=load.tokens * heads.kv_bytes_per_token,
            free_blocks=free,
        )
        groups = self._dispatch(here, new)
        if groups is None:
            return False
        growth = int(new.growth_tokens[0])
        state.admit_one(str(request), context_tokens=tokens, remaining_tokens=growth, groups=groups)
        self.homes[request] = groups
        return True

    def remove(self, request: int) -> None:
        """Remove a request that is done or evicted; moves of it under way are aborted."""
        if self.homes.pop(request, None) is not None:
            self.state.finish(str(request))

    def grow(self, requests: Sequence[int]) -> list[int]:
        """Grow every request's cache by one token; return those that did not grow because no block was free."""
        return [int(name) for name in self.state.grow([str(request) for request in requests])]

    def _as_planned(self, load: DeviceLoad, new: Requests) -> IntArray | None:
        """Return the plan's split: whole head groups go to the cards in turn, over all requests."""
        kept, away = self._split
        groups = np.zeros(self.num_devices, np.int64)
        groups[0] = kept
        cards = [i for i in range(1, self.num_devices) if self.state.devices[i].status is DeviceStatus.OK]
        if away and not cards:
            return None
        for _ in range(away):
            groups[cards[self._next_card % len(cards)]] += 1
            self._next_card += 1
        blocks = int(new.blocks(self.state.stage.heads.block_tokens)[0])
        return groups if np.all(groups * blocks <= np.maximum(load.free_blocks, 0)) else None

    # --- time

    def seconds(self, loads: Sequence[PoolLoad], batches: Sequence[Decoding], layers_s: float) -> float:
        """Return the attention time of one iteration with these micro-batches in all layers, and the delay by KV moves.

        The rest of the layers takes ``layers_s``.
        """
        groups, tokens = loads[0].groups, loads[0].tokens
        for load in loads[1:]:
            groups, tokens = groups + load.groups, tokens + load.tokens
        timing = self.timing
        device_s = timing.device_seconds(groups, tokens)
        self.busy_s += timing.layers * device_s
        total = timing.attention_s(device_s, groups)
        chunk: FloatArray | None = None
        for batch in batches:
            for request, num, _ in batch.chunk:
                here = np.multiply(self.homes[request], float(num))
                chunk = here if chunk is None else np.add(chunk, here)
        if chunk is not None:
            total += timing.late_s(chunk, groups, layers_s / timing.layers + total)
        return timing.layers * total

    def after_others(self, start_s: float, end_s: float, load: PoolLoad) -> float:
        """Return when an iteration from ``start_s`` to ``end_s`` ends if its cards serve other stages too."""
        assert self._shared is not None
        seconds = self.timing.layers * self.timing.device_seconds(load.groups, load.tokens)
        for card, busy_s in zip(self._shared, seconds[1:].tolist(), strict=True):
            if busy_s:
                card.free_s = max(start_s, card.free_s) + busy_s
                end_s = max(end_s, card.free_s)
        return end_s

    # --- re-dispatch and faults

    def look(self, now_s: float, batch: Decoding, load: PoolLoad) -> None:
        """Let re-dispatch examine the head groups of a micro-batch, every few steps."""
        if self._migration is None or batch.step - load.looked < LOOK_STEPS or len(batch.decoding) == 0:
            return
        load.looked = batch.step
        if not self._migration.is_under_way:
            self._migration.look(now_s, batch, partial(self._moved, batch, load))

    def _moved(self, batch: Decoding, load: PoolLoad, request: int) -> None:
        """Update the home of a request that has moved."""
        if request not in self.homes:
            return
        before, after = self.homes[request], self.state.groups(str(request))
        self.homes[request] = after
        origin = batch.decoding.get(request)
        if origin is not None:
            is_within = origin + batch.growth.window > batch.step
            load.add(after - before, batch.growth.attended(batch.step + 1 - origin), grows=is_within)

    def holders(self, card: int) -> set[int]:
        """Return the requests that have head groups on a card."""
        return {request for request, home in self.homes.items() if home[card]}

    def lose(self, card: int) -> None:
        """Mark a card as failed, after its holders have left."""
        evicted = self.state.lose_device(card)
        assert not evicted, "holders have left before"

    def restore(self, card: int) -> None:
        """Restore a card, empty."""
        self.state.restore_device(card)


def _dispatcher_of(state: DispatchState) -> Callable[[DeviceLoad, Requests], IntArray | None]:
    from hetis.solver.dispatch.solve import Dispatcher

    dispatcher = Dispatcher(state.stage)

    def place(load: DeviceLoad, new: Requests) -> IntArray | None:
        plan = dispatcher.dispatch(load, new)
        return None if plan.unplaced else plan.groups[0]

    return place
