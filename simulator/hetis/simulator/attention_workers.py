"""A copy of a stage with attention workers: the device of each head group is chosen by `hetis.solver.dispatch`.

The stage's own head groups and the workers' are computed in parallel, at their actual places. Running head groups move
by `hetis.solver.redispatch`, as copies in the background: one check covers one micro-batch, for which the stage's time
is that of its slowest device. Copies of a wave start together, but wait for one another, and for KV from prefill
replicas, if they need the same device's link. The next wave starts when all of them are committed. They do not delay
the exchange with the primary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from operator import add, sub
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hetis.simulator.events import Events, FleetLinks, transfer
from hetis.simulator.kv_memory import KvGrowth
from hetis.simulator.pool_timing import PoolLoad, PoolTiming
from hetis.simulator.values import IntArray, RequestLog, Settings
from hetis.solver.dispatch.dispatch_problem import DeviceLoad, Requests
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot
from hetis.solver.dispatch.state import DispatchState

if TYPE_CHECKING:
    from hetis.solver.redispatch.redispatch_problem import Move
    from hetis.solver.redispatch.triggers import Watch


class Decoding(Protocol):
    """The part of a micro-batch that a pool reads (see `MicroBatch`)."""

    index: int
    step: int
    growth: KvGrowth
    decoding: dict[int, int]
    chunk: list[tuple[int, int, bool]]


Moved = Callable[[int], None]


class Migration:
    """Moves of head groups in one copy of a stage, one plan at a time."""

    def __init__(
        self, state: DispatchState, timing: PoolTiming, links: FleetLinks, log: RequestLog, events: Events, *,
        theta: float, mean_output: float,
    ) -> None:  # fmt: skip
        from hetis.solver.dispatch.dispatcher import Dispatcher
        from hetis.solver.redispatch.redispatcher import Redispatcher

        self._state, self._timing, self._links, self._log, self._events = state, timing, links, log, events
        self._theta = theta
        self._remaining = max(1, round(mean_output))  # assumed for every request, since the actual output is unknown
        self._dispatcher = Dispatcher(state.stage)
        self._redispatcher = Redispatcher(self._dispatcher)
        self._devices = state.stage.devices
        self._link_byte_s = timing.move_byte_s(len(self._devices))
        self._watches: dict[int, Watch] = {}  # by index of the micro-batch
        self._waves: list[list[Move]] = []
        self._pending = 0  # bundles of the current wave that are not committed yet

    @property
    def is_under_way(self) -> bool:
        return self._pending > 0

    def look(self, now_s: float, batch: Decoding, moved: Moved) -> None:
        """Start moves that benefit a micro-batch, if its deviation exceeds Theta or memory is short.

        ``moved`` is called for every request whose home has changed.
        """
        from hetis.solver.redispatch.redispatch_problem import RedispatchProblem
        from hetis.solver.redispatch.triggers import Watch, triggers

        snapshot = self._snapshot(batch)
        fired = triggers(snapshot, self._dispatcher, theta=self._theta)
        watch = self._watches.setdefault(batch.index, Watch())
        if not watch.due(snapshot, fired):
            return
        problem = RedispatchProblem(
            snapshot=snapshot, num_layers=self._timing.layers, link_byte_s=self._link_byte_s
        )  # fmt: skip
        moves = self._redispatcher.solve(problem).moves
        watch.looked(snapshot, fired, moved=bool(moves))
        self._state.mark_seen()
        self._waves = [list(wave) for _, wave in groupby(moves, key=lambda move: move.wave)]
        self._next_wave(now_s, moved)

    def forget(self, request: str) -> None:
        """Drop the moves of a request that have not begun, since it may come back with other homes."""
        if self._waves:
            self._waves = [[move for move in wave if move.request != request] for wave in self._waves]

    def _snapshot(self, batch: Decoding) -> StateSnapshot:
        """Return the micro-batch's decoding requests, on devices that have only their blocks and the free ones."""
        state = self._state
        ids = [str(request) for request in batch.decoding]
        context = np.array([state.context_tokens(name) for name in ids], np.int64)
        groups = np.stack([state.groups(name) for name in ids])
        used = -(-context // state.stage.heads.block_tokens) @ groups
        total = used + np.maximum(0, state.free_blocks())
        return StateSnapshot(
            stage=state.stage,
            devices=tuple(map(_as_seen, state.devices, used.tolist(), total.tolist())),
            ids=tuple(ids),
            context_tokens=context,
            remaining_tokens=np.full(len(ids), self._remaining, np.int64),
            groups=groups,
        )

    def _next_wave(self, now_s: float, moved: Moved) -> None:
        """Start the moves that are still possible, in the next wave that has any."""
        while self._waves and not self._pending:
            bundles: dict[int, list[Move]] = {}
            for move in self._waves.pop(0):
                bundles.setdefault(move.together, []).append(move)
            for bundle in bundles.values():
                prepared = self._prepared(bundle)
                if prepared:
                    self._pending += 1
                    end_s = max(
                        self._copy(now_s, one, move.num_bytes) for one, move in zip(prepared, bundle, strict=True)
                    )
                    num_bytes = sum(move.num_bytes for move in bundle)
                    self._events.at(end_s, self._commit, prepared, num_bytes, moved)

    def _prepared(self, bundle: list[Move]) -> list[PreparedMove]:
        """Reserve blocks for moves that are committed together; empty if one of them is no longer possible."""
        state, prepared = self._state, list[PreparedMove]()
        for move in bundle:
            holds = move.request in state and state.groups(move.request)[move.source] >= move.groups
            one = None
            if holds and state.devices[move.target].status is DeviceStatus.OK:
                one = state.prepare_move(move.request, groups=move.groups, source=move.source, target=move.target)
            if one is None:
                for other in prepared:
                    state.abort_move(other.number)
                return []
            prepared.append(one)
        return prepared

    def _copy(self, now_s: float, move: PreparedMove, num_bytes: float) -> float:
        seconds = num_bytes * max(self._link_byte_s[move.source], self._link_byte_s[move.target])
        source, target = self._devices[move.source], self._devices[move.target]
        return transfer(now_s, float(seconds), self._links.leaving(source), self._links.coming(target))

    def _commit(self, now_s: float, prepared: list[PreparedMove], num_bytes: float, moved: Moved) -> None:
        self._pending -= 1
        under_way = {move.number for move in self._state.moves}
        numbers = [move.number for move in prepared]
        if under_way.issuperset(numbers):  # otherwise the request has finished, was evicted or has lost a device
            self._state.commit_moves(*numbers)
            request = int(prepared[0].request)
            self._log.migrations += len(prepared)
            self._log.migrated_bytes += num_bytes
            self._log.moved_bytes[request] += num_bytes
            moved(request)
        else:
            for number in under_way.intersection(numbers):
                self._state.abort_move(number)
        self._next_wave(now_s, moved)


def _as_seen(device: DeviceSnapshot, used: int, total: int) -> DeviceSnapshot:
    """Return a device with ``total`` blocks and a high-water mark that leaves as many of them free as before."""
    kept_free = (1.0 - device.high_water) * device.total_blocks
    mark = 1.0 if used + kept_free <= 0 else min(1.0, max(1e-9, used / (used + kept_free)))
    return DeviceSnapshot(
        name=device.name, total_blocks=total, status=device.status, high_water=mark, changed=device.changed
    )  # fmt: skip


LOOK_STEPS = 16  # steps of a micro-batch between two checks by re-dispatch


class SharedCard:
    """An attention worker that serves several stages in turn, and the time when it is free."""

    __slots__ = ("free_s",)

    def __init__(self) -> None:
        self.free_s = 0.0


class PoolCopy:
    """The primary of one copy of a stage (device 0), and the cards of its pool."""

    def __init__(
        self, *, names: tuple[str, ...], blocks: IntArray, timing: PoolTiming, split: tuple[int, int], log: RequestLog,
        events: Events, settings: Settings, mean_output: float, growth: int, shared: tuple[SharedCard, ...] | None,
        links: FleetLinks,
    ) -> None:  # fmt: skip
        """Create the pool.

        Args:
            split: head groups of a request on the primary, and on all cards together, as in the plan.
            growth: output tokens for which a new request needs room; its actual output is unknown.
        """
        self.timing, self.settings, self._split, self._shared = timing, settings, split, shared
        self.state = DispatchState(timing.stage(names), blocks)
        self._growth = growth
        self.homes: dict[int, list[int]] = {}  # head groups of every request in this copy on each device, [D]
        self.busy_s = [0.0] * len(names)  # seconds of attention on each device, [D]
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

    def most_blocks(self) -> int:
        """Return the most KV blocks per head group of a request that fits when no card has failed and none is used."""
        totals: list[int] = self.total_blocks.tolist()
        if not self.settings.dispatch:
            kept, away = self._split
            of_card = -(-away // max(1, len(totals) - 1))
            parts = [(totals[0], kept), *((total, of_card) for total in totals[1:])]
            return min(total // groups for total, groups in parts if groups)
        stage, head_groups = self.state.stage, self.state.stage.heads.head_groups
        units = [stage.primary_groups if i == 0 else 1 for i in range(len(totals))]

        def is_too_large(blocks: int) -> bool:
            room: int = sum(total // blocks // unit * unit for total, unit in zip(totals, units, strict=True))
            return room < head_groups

        return bisect_left(range(1, max(totals) + 1), True, key=is_too_large)

    # --- requests

    def place(self, load: PoolLoad, request: int, tokens: int) -> bool:
        """Place the head groups of a request with a prompt of ``tokens`` on devices with room; False: there is none."""
        state, heads = self.state, self.state.stage.heads
        free = state.load().free_blocks
        new = Requests(
            ids=(str(request),),
            context_tokens=np.array([tokens]),
            growth_tokens=np.array([self._growth if len(state) else 0]),
        )
        here = DeviceLoad(
            heads=np.array(load.groups) * heads.queries_per_group,
            kv_bytes=np.array(load.tokens) * heads.kv_bytes_per_token,
            free_blocks=free,
        )
        groups = self._dispatch(here, new)
        if groups is None:
            return False
        growth = int(new.growth_tokens[0])
        state.admit_one(str(request), context_tokens=tokens, remaining_tokens=growth, groups=groups)
        self.homes[request] = groups.tolist()
        return True

    def remove(self, request: int) -> None:
        """Remove a finished or evicted request; its moves under way are aborted."""
        if self.homes.pop(request, None) is not None:
            self.state.finish(str(request))
            if self._migration is not None:
                self._migration.forget(str(request))

    def grow(self, cached: Sequence[tuple[int, int]]) -> list[int]:
        """Extend the cached tokens of requests to the given numbers; return those for which no block was free.

        Only requests that need a new block have to be extended: the tokens in between matter only to re-dispatch, and
        `look` adds them.
        """
        grow = self.state.grow_one
        return [request for request, tokens in cached if not grow(str(request), context_tokens=tokens)]

    def _as_planned(self, load: DeviceLoad, new: Requests) -> IntArray | None:
        """Return the plan's split, or None if it does not fit: cards take head groups in turn, across requests."""
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
        """Return the attention time of one iteration of these micro-batches in all layers, including KV sending.

        The rest of the layers takes ``layers_s``.
        """
        groups, tokens = _together(loads)
        timing, busy_s = self.timing, self.busy_s
        parts = [(self.homes[request], num) for batch in batches for request, num, _ in batch.chunk]
        device_s = timing.device_seconds(groups, tokens, beside_chunk=bool(parts))
        for i, seconds in enumerate(device_s):
            busy_s[i] += timing.layers * seconds
        total = timing.attention_s(device_s, groups)
        if parts:
            chunk = [sum(home[i] * num for home, num in parts) for i in range(len(groups))]
            total += timing.late_s(chunk, groups, layers_s / timing.layers + total)
        return timing.layers * total

    def after_others(self, start_s: float, end_s: float, loads: Sequence[PoolLoad]) -> float:
        """Return when an iteration from ``start_s`` to ``end_s`` ends if its cards serve other stages too."""
        assert self._shared is not None
        device_s = self.timing.device_seconds(*_together(loads))
        for card, seconds in zip(self._shared, device_s[1:], strict=True):
            if seconds:
                card.free_s = max(start_s, card.free_s) + self.timing.layers * seconds
                end_s = max(end_s, card.free_s)
        return end_s

    # --- re-dispatch and faults

    def look(self, now_s: float, batch: Decoding, load: PoolLoad) -> None:
        """Have re-dispatch examine the head groups of a micro-batch, every `LOOK_STEPS` steps."""
        if self._migration is None or batch.step - load.looked < LOOK_STEPS or len(batch.decoding) == 0:
            return
        load.looked = batch.step
        if not self._migration.is_under_way:
            context = {one: batch.step + 1 - origin for one, origin in batch.decoding.items()}
            stalled = self.grow([(one, batch.growth.cached(tokens)) for one, tokens in context.items()])
            assert not stalled, "a request needs a block between two blocks"
            self._migration.look(now_s, batch, partial(self._moved, batch, load))

    def _moved(self, batch: Decoding, load: PoolLoad, request: int) -> None:
        """Update the home of a request that has moved."""
        if request not in self.homes:
            return
        before, after = self.homes[request], self.state.groups(str(request)).tolist()
        self.homes[request] = after
        origin = batch.decoding.get(request)
        if origin is not None:
            is_within = origin + batch.growth.window > batch.step
            load.add(list(map(sub, after, before)), batch.growth.attended(batch.step + 1 - origin), grows=is_within)

    def holders(self, card: int) -> set[int]:
        """Return the requests that have head groups on a card."""
        return {request for request, home in self.homes.items() if home[card]}

    def lose(self, card: int) -> None:
        """Mark a card as failed, after the requests on it have left."""
        evicted = self.state.lose_device(card)
        assert not evicted, "holders have left before"

    def restore(self, card: int) -> None:
        """Restore a card, empty."""
        self.state.restore_device(card)


def _together(loads: Sequence[PoolLoad]) -> tuple[list[int], list[float]]:
    """Return the (request, head group) pairs and attended tokens of all loads, per device."""
    groups, tokens = loads[0].groups, loads[0].tokens
    for load in loads[1:]:
        groups, tokens = list(map(add, groups, load.groups)), list(map(add, tokens, load.tokens))
    return groups, tokens


def _dispatcher_of(state: DispatchState) -> Callable[[DeviceLoad, Requests], IntArray | None]:
    from hetis.solver.dispatch.dispatcher import Dispatcher

    dispatcher = Dispatcher(state.stage)

    def place(load: DeviceLoad, new: Requests) -> IntArray | None:
        plan = dispatcher.dispatch(load, new)
        return None if plan.unplaced else plan.groups[0]

    return place
