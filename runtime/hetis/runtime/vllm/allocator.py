"""Where the head groups of requests live, as vLLM's scheduler decides it: placed at admission, moved while they run.

`hetis.solver.dispatch` says how many groups of a new request go to which device, from measured costs and the room of
every device; this room names the groups. What runs is kept in the solver's own state of a stage, so that re-dispatch
sees what dispatch saw. Nothing here knows of vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from hetis.runtime.vllm.steps import LOCAL, Admitted, Move
from hetis.solver.dispatch.problem import HeadShape, IntArray, Load, Requests, Stage
from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.dispatch.solve import Dispatcher
from hetis.solver.dispatch.state import DispatchState

_ENDLESS = 2**39  # blocks of the rank itself in the solver's state: vLLM's pool counts them

Policy = Literal["solver", "local", "remote"]


class DispatchRule(Protocol):
    """Places the head groups of new requests, as `hetis.solver.dispatch.solve.Dispatcher` does."""

    @property
    def stage(self) -> Stage:
        """The devices and what they cost."""

    def dispatch(self, load: Load, requests: Requests) -> DispatchAnswer:
        """Where the groups of one request go."""


class DispatchAnswer(Protocol):
    """What a rule says."""

    @property
    def groups(self) -> IntArray:
        """Head groups of each request on each device, shape [requests, devices]."""

    @property
    def unplaced(self) -> Sequence[object]:
        """Empty where all are placed."""


@dataclass(slots=True, kw_only=True)
class AllocatorStats:
    """What was decided since the start.

    Attributes:
        dispatched: requests placed.
        refused: requests for which no device had room when they were asked for; vLLM asks again.
        dispatch_s: seconds that the decisions took, and the longest of them.
        recomputed: requests that lost KV with a worker.
        moved_groups: head groups that have moved.
        relieved_blocks: blocks that left for workers where a request would have been preempted.
    """

    dispatched: int = 0
    refused: int = 0
    dispatch_s: float = 0.0
    longest_dispatch_s: float = 0.0
    recomputed: int = 0
    moved_groups: int = 0
    relieved_blocks: int = 0


@dataclass(slots=True)
class _Placed:
    """One request: the device of each group, and, once it runs, its anchor and number."""

    devices: tuple[int, ...]
    tokens: int  # that room is kept for
    growth: int
    anchor: int | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A move under way: ``prepared`` is its number in the solver's state."""

    request_id: str
    move: Move
    prepared: int


class HeadAllocator:
    """Owns the placement of head groups on one engine's devices: 0 the ranks themselves, then the workers.

    Attributes:
        state: the solver's state of all requests that run.
        stats: what was decided.
        rule: decides where the policy is ``solver``; made anew for every new costs.
    """

    def __init__(
        self,
        costs: Stage,
        *,
        free_here: Callable[[], int],
        policy: Policy = "solver",
        output_tokens: int = 256,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``free_here``: free blocks of vLLM's pool; ``output_tokens``: expected of a request that may make more."""
        self.state = DispatchState(costs, [_ENDLESS] + [0] * (costs.num_devices - 1))
        for device in range(1, costs.num_devices):
            self.state.lose_device(device)
        self.stats = AllocatorStats()
        self._free_here, self._policy, self._output_tokens, self._clock = free_here, policy, output_tokens, clock
        self._placed: dict[str, _Placed] = {}
        self.rule: Callable[[Stage], DispatchRule] = Dispatcher
        self._made: tuple[Callable[[Stage], DispatchRule], DispatchRule] | None = None  # by which rule
        self._next_number = 1
        self._moves: dict[int, _Prepared] = {}
        self._next_move = 0

    @property
    def heads(self) -> HeadShape:
        """The attention heads of one layer."""
        return self.state.stage.heads

    @property
    def running(self) -> tuple[str, ...]:
        """Requests that hold blocks."""
        return self.state.ids

    # --- what the block manager asks

    def devices(self, request_id: str) -> Sequence[int]:
        """Device of each head group; all here where nobody placed the request."""
        placed = self._placed.get(request_id)
        return (LOCAL,) * self.heads.head_groups if placed is None else placed.devices

    def has_room(self, request_id: str, tokens: int) -> bool:
        """Whether the groups of a request on workers could grow to so many tokens."""
        placed = self._placed.get(request_id)
        if placed is None or not any(placed.devices):
            return True
        counts = self._counts(placed.devices)
        blocks = -(-tokens // self.heads.block_tokens)
        if placed.anchor is not None:
            blocks -= -(-placed.tokens // self.heads.block_tokens)
        needed = counts[1:] * max(blocks, 0)
        return bool((needed <= self.state.free_blocks()[1:]).all())

    def grow(self, request_id: str, tokens: int) -> None:
        """A request has grown to so many tokens."""
        placed = self._placed[request_id]
        if tokens > placed.tokens:
            stays = self.state.grow([request_id], tokens - placed.tokens)
            assert not stays, f"{request_id} grew to {tokens} tokens without room"
            placed.tokens = tokens

    def admitted(self, request_id: str, anchor: int) -> Admitted:
        """A request begins to run, where it was placed."""
        placed = self._placed.get(request_id)
        if placed is None:
            placed = self._placed[request_id] = _Placed((LOCAL,) * self.heads.head_groups, 1, 0)
        placed.anchor, placed.number = anchor, self._next_number
        self._next_number += 1
        self.state.admit_one(
            request_id,
            context_tokens=placed.tokens,
            remaining_tokens=placed.growth,
            groups=self._counts(placed.devices),
        )
        return Admitted(anchor, placed.number, placed.devices)

    def released(self, request_id: str) -> None:
        """A request ended, or was preempted."""
        placed = self._placed.pop(request_id, None)
        if placed is not None and placed.anchor is not None:
            self._forget_moves({request_id})
            self.state.finish(request_id)

    # --- placement

    def place(self, request_id: str, *, tokens: int, most_output: int, has_hits: bool) -> None:
        """Decides where the groups of a request will live that vLLM is about to admit; the newest decision counts.

        Args:
            request_id: not running.
            tokens: of its prompt, and of what it made before it was preempted.
            most_output: tokens that it may still make.
            has_hits: part of its prompt is in the prefix cache, which only holds groups that are here.
        """
        begun_s = self._clock()
        growth = min(most_output, self._output_tokens)
        here = (LOCAL,) * self.heads.head_groups
        devices = here if has_hits else self._choose(tokens, growth)
        if devices is None:
            self.stats.refused += 1
            devices = here
        self._placed[request_id] = _Placed(devices, tokens, growth)
        taken_s = self._clock() - begun_s
        self.stats.dispatched += 1
        self.stats.dispatch_s += taken_s
        self.stats.longest_dispatch_s = max(self.stats.longest_dispatch_s, taken_s)

    def forget(self, request_id: str) -> None:
        """A request that was placed ended before it ran."""
        placed = self._placed.get(request_id)
        if placed is not None and placed.anchor is None:
            del self._placed[request_id]

    # --- devices

    def change_costs(self, costs: Stage) -> None:
        """The same devices at other speeds."""
        self.state.change_costs(costs)

    def set_blocks(self, device: int, blocks: int) -> None:
        """A worker came, or came back, with room for so many blocks of a head group."""
        if blocks != self.state.devices[device].total_blocks:
            self.state.resize_device(device, blocks)
        if self.state.devices[device].status is DeviceStatus.LOST:
            self.state.restore_device(device)

    def lose(self, device: int) -> tuple[str, ...]:
        """A worker is lost with its KV; returns the requests that had groups there, in new homes: as many of their
        groups as are elsewhere stay where they are."""
        if self.state.devices[device].status is DeviceStatus.LOST:
            return ()
        self._moves = {n: one for n, one in self._moves.items() if device not in (one.move.source, one.move.target)}
        evicted = [gone.id for gone in self.state.lose_device(device)]
        self._forget_moves(set(evicted))
        for request_id in evicted:
            placed = self._placed[request_id]
            placed.devices = self._without(placed, device)
            self.state.admit_one(
                request_id,
                context_tokens=placed.tokens,
                remaining_tokens=placed.growth,
                groups=self._counts(placed.devices),
            )
        self.stats.recomputed += len(evicted)
        return tuple(evicted)

    # --- moves

    def prepare(self, request_id: str, groups: Sequence[int], target: int) -> Move | None:
        """Takes room at ``target`` for groups that live together elsewhere; None: it cannot have them now."""
        placed = self._placed.get(request_id)
        if placed is None or placed.anchor is None or not groups:
            return None
        sources = {placed.devices[group] for group in groups}
        under_way = {group for one in self._moves.values() if one.request_id == request_id for group in one.move.groups}
        takes = self.state.devices[target].status is DeviceStatus.OK
        if len(sources) != 1 or target in sources or under_way & set(groups) or not takes:
            return None
        source = sources.pop()
        prepared = self.state.prepare_move(request_id, groups=len(groups), source=source, target=target)
        if prepared is None:
            return None
        self._next_move += 1
        move = Move(self._next_move, placed.anchor, tuple(sorted(groups)), source, target)
        self._moves[move.number] = _Prepared(request_id, move, prepared.number)
        return move

    def commit(self, number: int) -> tuple[str, Move]:
        """The target owns the groups from now on; returns whose they are."""
        one = self._moves.pop(number)
        self.state.commit_moves(one.prepared)
        placed = self._placed[one.request_id]
        devices = list(placed.devices)
        for group in one.move.groups:
            devices[group] = one.move.target
        placed.devices = tuple(devices)
        self.stats.moved_groups += len(one.move.groups)
        return one.request_id, one.move

    def abort(self, number: int) -> tuple[str, Move] | None:
        """The groups stay where they are; None: the move has ended already."""
        one = self._moves.pop(number, None)
        if one is None:
            return None
        self.state.abort_move(one.prepared)
        return one.request_id, one.move

    @property
    def moves(self) -> tuple[Move, ...]:
        """Moves under way, the oldest first."""
        return tuple(one.move for one in self._moves.values())

    def snapshot(self) -> StateSnapshot:
        """What runs, for re-dispatch; the ranks' room is what vLLM's pool says it is."""
        snapshot = self.state.snapshot()
        used = _ENDLESS - int(self.state.free_blocks()[LOCAL])
        here = replace(snapshot.devices[LOCAL], total_blocks=used + self._free_here())
        return replace(snapshot, devices=(here, *snapshot.devices[1:]))

    def relief(self, blocks: int) -> list[tuple[str, tuple[int, ...], int]]:
        """Moves that would free so many blocks here: requests with most groups here give one at a time.

        Returns what goes where; all that there is room for elsewhere, if that is less.
        """
        free = self.state.free_blocks()
        for device in range(1, len(free)):
            if self.state.devices[device].status is not DeviceStatus.OK:
                free[device] = 0
        under_way = {one.request_id for one in self._moves.values()}
        here: dict[str, list[int]] = {}
        sizes: dict[str, int] = {}
        for name in self.running:
            placed = self._placed[name]
            if name not in under_way:
                here[name] = [group for group, device in enumerate(placed.devices) if device == LOCAL]
                sizes[name] = -(-placed.tokens // self.heads.block_tokens)
        leaving: dict[tuple[str, int], list[int]] = {}
        while blocks > 0 and here:
            name = max(here, key=lambda one: len(here[one]) * sizes[one])
            target = 1 + int(np.argmax(free[1:])) if len(free) > 1 else LOCAL
            if target == LOCAL or not here[name] or free[target] < sizes[name]:
                del here[name]
                continue
            leaving.setdefault((name, target), []).append(here[name].pop())
            free[target] -= sizes[name]
            blocks -= sizes[name]
        return [(name, tuple(sorted(groups)), target) for (name, target), groups in leaving.items()]

    def check_invariants(self) -> None:
        """The placement and the solver's state agree. A failure is a bug."""
        self.state.check_invariants()
        running = {name for name, placed in self._placed.items() if placed.anchor is not None}
        assert running == set(self.state.ids), "running requests differ"
        for name in running:
            placed = self._placed[name]
            assert np.array_equal(self._counts(placed.devices), self.state.groups(name)), f"groups of {name} differ"

    # --- inside

    def _forget_moves(self, requests: set[str]) -> None:
        """The solver's state forgets moves with their requests."""
        self._moves = {n: one for n, one in self._moves.items() if one.request_id not in requests}

    def _choose(self, tokens: int, growth: int) -> tuple[int, ...] | None:
        if not any(device.status is DeviceStatus.OK for device in self.state.devices[1:]):
            return (LOCAL,) * self.heads.head_groups
        match self._policy:
            case "local":
                return (LOCAL,) * self.heads.head_groups
            case "remote":
                return self._most_remote(tokens + growth)
            case "solver":
                return self._solved(tokens, growth)

    def _solved(self, tokens: int, growth: int) -> tuple[int, ...] | None:
        state = self.state
        if self._made is None or self._made[0] is not self.rule or self._made[1].stage is not state.stage:
            self._made = self.rule, self.rule(state.stage)
        load = state.load()
        # The pool knows what is free here; the state knows what the running ones will still take of it.
        load.free_blocks[LOCAL] = self._free_here() - (state.free_blocks()[LOCAL] - load.free_blocks[LOCAL])
        wanted = Requests(
            ids=("new",),
            context_tokens=np.array([tokens], np.int64),
            growth_tokens=np.array([growth], np.int64),
        )
        plan = self._made[1].dispatch(load, wanted)
        return None if plan.unplaced else _named(plan.groups[0].tolist())

    def _most_remote(self, tokens: int) -> tuple[int, ...]:
        blocks = -(-tokens // self.heads.block_tokens)
        free = self.state.load().free_blocks // max(blocks, 1)
        free[LOCAL] = 0
        counts = np.zeros_like(free)
        for _ in range(self.heads.head_groups):
            device = int(np.argmax(np.where(free > counts, free - counts, -1)))
            if free[device] <= counts[device]:
                break
            # In turns: the one with the fewest so far among those with room.
            open_devices = np.flatnonzero(free > counts)
            counts[open_devices[np.argmin(counts[open_devices])]] += 1
        counts[LOCAL] = self.heads.head_groups - counts.sum()
        return _named(counts.tolist())

    def _without(self, placed: _Placed, lost: int) -> tuple[int, ...]:
        """New homes for the groups on a lost device: a worker with room for them while the pool is short, else here."""
        blocks = -(-(placed.tokens + placed.growth) // self.heads.block_tokens)
        free = self.state.load().free_blocks
        free[LOCAL] = self._free_here()
        devices = list(placed.devices)
        for group, device in enumerate(devices):
            if device != lost:
                continue
            others = [i for i in range(1, len(free)) if free[i] >= blocks]
            home = LOCAL if free[LOCAL] >= blocks or not others else max(others, key=lambda i: int(free[i]))
            free[home] -= blocks
            devices[group] = home
        return tuple(devices)

    def _counts(self, devices: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.bincount(devices, minlength=self.state.stage.num_devices).astype(np.int64)


def _named(counts: Sequence[int]) -> tuple[int, ...]:
    """Which group goes where: the first ones stay here, the others go to the workers in turns."""
    devices = [LOCAL] * counts[LOCAL]
    left = list(counts)
    left[LOCAL] = 0
    while any(left):
        for device, count in enumerate(left):
            if count:
                devices.append(device)
                left[device] -= 1
    return tuple(devices)
