"""Allocation of requests' head groups in vLLM's scheduler: placed at admission, moved while they run.

`hetis.solver.dispatch` decides how many groups of a new request go to which device, from measured costs and the room
on every device; this module decides which groups. Running requests are kept in the solver's own state of a stage, so
that re-dispatch sees what dispatch saw. Nothing here knows of vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hetis.runtime.vllm.counts import AllocatorStats
from hetis.runtime.vllm.steps import LOCAL, Admitted, GroupMove
from hetis.solver.dispatch.dispatch_problem import DeviceLoad, HeadShape, IntArray, Requests, Stage
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.dispatch.state import DispatchState

_ENDLESS = 2**39  # blocks of the rank itself in the solver's state: vLLM's pool counts the real ones
_MOST_RECENT = 256  # decision times that are kept until they are taken

Policy = Literal["solver", "local", "remote"]


@dataclass(slots=True)
class _Placed:
    """One request: the device of each group and, once it runs, its anchor and number."""

    devices: tuple[int, ...]
    tokens: int  # tokens for which room is kept
    growth: int
    anchor: int | None = None
    number: int = 0


class HeadAllocator:
    """Owns the placement of head groups on one engine's devices: 0 is the ranks themselves, the workers follow."""

    def __init__(
        self,
        costs: Stage,
        *,
        free_here: Callable[[], int],
        policy: Policy = "solver",
        output_tokens: int = 256,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``free_here``: returns the free blocks of vLLM's pool; ``output_tokens``: expected of a request, or fewer."""
        # The solver's state of all running requests
        self.state = DispatchState(costs, [_ENDLESS] + [0] * (costs.num_devices - 1))
        for device in range(1, costs.num_devices):
            self.state.lose_device(device)
        self.stats = AllocatorStats()
        self._free_here, self._policy, self._output_tokens, self._clock = free_here, policy, output_tokens, clock
        self._placed: dict[str, _Placed] = {}
        self._dispatcher: Dispatcher | None = None  # made anew whenever costs change
        self._next_number = 1
        self._by_number: dict[str, str] = {}  # ids of running requests, by number
        # Requests and their moves in flight, by the number that the solver's state gave them
        self._moves: dict[int, tuple[str, GroupMove]] = {}
        self._limits: dict[int, int] = {}
        self._drained: frozenset[int] = frozenset()

    @property
    def heads(self) -> HeadShape:
        """The attention heads of one layer."""
        return self.state.stage.heads

    @property
    def running(self) -> tuple[str, ...]:
        """The requests that hold blocks."""
        return self.state.ids

    @property
    def is_idle(self) -> bool:
        """Return whether nothing runs and nothing has been placed."""
        return not self._placed

    def number(self, request_id: str) -> int:
        """Return the number of a running request, as the ranks know it."""
        return self._placed[request_id].number

    def numbered(self, number: str) -> str | None:
        """Return the running request that ranks and planners know by a number."""
        return self._by_number.get(number)

    # --- for the block manager

    def devices(self, request_id: str) -> Sequence[int]:
        """Return the device of each head group; all are here if the request was not placed."""
        placed = self._placed.get(request_id)
        return (LOCAL,) * self.heads.head_groups if placed is None else placed.devices

    def has_room(self, request_id: str, tokens: int) -> bool:
        """Return whether the groups of a request on workers, or on their way there, could grow to this many tokens."""
        return bool((self._growth(request_id, tokens)[1:] <= self.state.free_blocks()[1:]).all())

    def grow(self, request_id: str, tokens: int) -> None:
        """Grow a request to this many tokens."""
        placed = self._placed[request_id]
        if tokens > placed.tokens:
            stays = self.state.grow([request_id], tokens - placed.tokens)
            assert not stays, f"{request_id} grew to {tokens} tokens without room"
            placed.tokens = tokens

    def admitted(self, request_id: str, anchor: int) -> Admitted:
        """Start a request where it was placed."""
        placed = self._placed.setdefault(request_id, _Placed((LOCAL,) * self.heads.head_groups, 1, 0))
        placed.anchor, placed.number = anchor, self._next_number
        self._next_number += 1
        self._by_number[str(placed.number)] = request_id
        self._admit(request_id, placed)
        return Admitted(anchor, placed.number, placed.devices)

    def released(self, request_id: str) -> None:
        """Release a request that ended or was preempted."""
        placed = self._placed.pop(request_id, None)
        if placed is not None and placed.anchor is not None:
            self.stats.released += 1
            del self._by_number[str(placed.number)]
            self.state.finish(request_id)
            self._forget_moves()

    # --- placement

    def place(self, request_id: str, *, tokens: int, most_output: int, has_hits: bool) -> None:
        """Decide where the groups of a request that vLLM is about to admit will live. The latest decision counts.

        Args:
            request_id: a request that is not running.
            tokens: those of its prompt, and those generated before it was preempted.
            most_output: tokens that it may still generate.
            has_hits: part of its prompt is in the prefix cache, which only holds groups that are here.
        """
        begun_s, stats = self._clock(), self.stats
        growth = min(most_output, self._output_tokens)
        here = (LOCAL,) * self.heads.head_groups
        devices, reason = (here, "prefix_hit") if has_hits else self._choose(tokens, growth)
        self._placed[request_id] = _Placed(here if devices is None else devices, tokens, growth)
        taken_s = self._clock() - begun_s
        stats.decisions[reason] += 1
        stats.dispatch_s += taken_s
        stats.longest_dispatch_s = max(stats.longest_dispatch_s, taken_s)
        if len(stats.recent_s) < _MOST_RECENT:
            stats.recent_s.append(taken_s)

    def forget(self, request_id: str) -> None:
        """Forget a request that was placed but ended before it ran."""
        placed = self._placed.get(request_id)
        if placed is not None and placed.anchor is None:
            del self._placed[request_id]

    # --- devices

    def change_costs(self, costs: Stage) -> None:
        """Use new costs for the same devices."""
        self.state.change_costs(costs)

    def set_blocks(self, device: int, blocks: int) -> None:
        """Add, or restore, a worker with room for this many blocks of a head group."""
        if blocks != self.state.devices[device].total_blocks:
            self.state.resize_device(device, blocks)
        if self.state.devices[device].status is DeviceStatus.LOST:
            self.state.restore_device(device)
            if device in self._drained:
                self.state.drain_device(device)

    def bound(self, limits: Mapping[int, int]) -> None:
        """Limit workers to this many blocks of a head group, whatever room they have. Others are not limited."""
        self._limits = dict(limits)

    def drain(self, devices: frozenset[int]) -> None:
        """Stop these workers, and no others, from taking groups; moves to them end."""
        assert LOCAL not in devices, "the ranks hold what nobody else can"
        self._drained = devices
        for device in range(1, len(self.state.devices)):
            status = self.state.devices[device].status
            if status is DeviceStatus.OK and device in devices:
                self.state.drain_device(device)
            elif status is DeviceStatus.DRAINING and device not in devices:
                self.state.restore_device(device)
        self._forget_moves()

    def lose(self, device: int) -> tuple[str, ...]:
        """Remove a worker that is lost with its KV, and return the requests that had groups there, with new homes.

        Groups that live elsewhere stay where they are if possible.
        """
        if self.state.devices[device].status is DeviceStatus.LOST:
            return ()
        evicted = [gone.id for gone in self.state.lose_device(device)]
        self._forget_moves()
        kept = {request_id: self._kept_blocks(self._placed[request_id], device) for request_id in evicted}
        for request_id in evicted:
            placed = self._placed[request_id]
            del kept[request_id]
            others = sum(kept.values(), np.zeros(self.state.stage.num_devices, np.int64))
            placed.devices = self._without(placed, device, others)
            self._admit(request_id, placed)
        self.stats.recomputed += len(evicted)
        return tuple(evicted)

    def _admit(self, request_id: str, placed: _Placed) -> None:
        tokens, growth, groups = placed.tokens, placed.growth, self._counts(placed.devices)
        self.state.admit_one(request_id, context_tokens=tokens, remaining_tokens=growth, groups=groups)

    # --- moves

    def prepare(self, request_id: str, groups: Sequence[int], target: int) -> GroupMove | None:
        """Reserve room at ``target`` for groups that share another device. Return None if that is not possible now."""
        placed = self._placed.get(request_id)
        if placed is None or placed.anchor is None or not groups:
            return None
        if min(groups) < 0 or max(groups) >= len(placed.devices):
            return None
        sources = {placed.devices[group] for group in groups}
        takes = self.state.devices[target].status is DeviceStatus.OK
        if len(sources) != 1 or target in sources or self.moving(request_id) & set(groups) or not takes:
            return None
        source = sources.pop()
        if target != LOCAL and len(groups) * self.blocks(request_id) > self.room(target):
            return None
        prepared = self.state.prepare_move(request_id, groups=len(groups), source=source, target=target)
        if prepared is None:
            return None
        move = GroupMove(prepared.number, placed.anchor, tuple(sorted(groups)), source, target)
        self._moves[move.number] = request_id, move
        return move

    def commit(self, number: int) -> tuple[str, GroupMove]:
        """Make the target the owner of a move's groups, and return the request and the move."""
        request_id, move = self._moves.pop(number)
        self.state.commit_moves(number)
        placed = self._placed[request_id]
        placed.devices = tuple(move.target if i in move.groups else device for i, device in enumerate(placed.devices))
        self.stats.moved_groups += len(move.groups)
        return request_id, move

    def abort(self, number: int) -> tuple[str, GroupMove] | None:
        """Leave the groups of a move where they are. Return None if the move has ended already."""
        if (found := self._moves.pop(number, None)) is not None:
            self.state.abort_move(number)
        return found

    @property
    def moves(self) -> tuple[GroupMove, ...]:
        """The moves in flight, oldest first."""
        return tuple(move for _, move in self._moves.values())

    def is_under_way(self, number: int) -> bool:
        """Return whether a move has been neither committed nor aborted."""
        return number in self._moves

    def moving(self, request_id: str) -> set[int]:
        """Return the groups of a request that are in flight."""
        return {group for name, move in self._moves.values() if name == request_id for group in move.groups}

    # --- room

    def blocks(self, request_id: str) -> int:
        """Return the number of blocks of each group of a running request."""
        return self._blocks(self._placed[request_id].tokens)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.heads.block_tokens)

    def _growth(self, request_id: str, tokens: int) -> IntArray:
        """Return the blocks, shape [D], that a request takes more of where its groups are, and where they are going."""
        placed = self._placed.get(request_id)
        if placed is None:
            return np.zeros(self.state.stage.num_devices, np.int64)
        more = self._blocks(tokens) - (0 if placed.anchor is None else self._blocks(placed.tokens))
        taken = self._counts(placed.devices)
        for name, move in self._moves.values():
            taken[move.target] += len(move.groups) if name == request_id else 0
        return taken * max(more, 0)

    def room(self, device: int) -> int:
        """Return the number of blocks that a move may take on a device."""
        return self._free_here() if device == LOCAL else int(self._free_blocks()[device])

    def totals(self, device: int) -> tuple[int, int]:
        """Return a device's usable blocks and its used blocks."""
        free = int(self.state.free_blocks()[device])
        if device == LOCAL:
            return _ENDLESS - free + self._free_here(), _ENDLESS - free
        total = self.state.devices[device].total_blocks
        return max(min(total, self._limits.get(device, total)), total - free), total - free

    def snapshot(self) -> StateSnapshot:
        """Return the running requests for re-dispatch. The ranks' room is what vLLM's pool reports."""
        snapshot = self.state.snapshot()
        used = _ENDLESS - int(self.state.free_blocks()[LOCAL])
        here = replace(snapshot.devices[LOCAL], total_blocks=used + self._free_here())
        return replace(snapshot, devices=(here, *snapshot.devices[1:]))

    def relief(self, blocks: int, request_id: str, tokens: int) -> list[tuple[str, tuple[int, ...], int]]:
        """Return moves that free this many blocks here, fewer if workers lack room, from requests with most here.

        Workers keep the room for a running request to grow to ``tokens``, wherever its groups then are.
        """
        free = self._free_blocks() - self._growth(request_id, tokens)
        more = self._blocks(tokens) - self.blocks(request_id)
        under_way = {name for name, _ in self._moves.values()}
        here: dict[str, list[int]] = {}
        sizes: dict[str, int] = {}
        for name in self.running:
            placed = self._placed[name]
            if name not in under_way:
                here[name] = [group for group, device in enumerate(placed.devices) if device == LOCAL]
                sizes[name] = self._blocks(placed.tokens)
        leaving: dict[tuple[str, int], list[int]] = {}
        while blocks > 0 and here:
            name = max(here, key=lambda one: len(here[one]) * sizes[one])
            target = 1 + int(np.argmax(free[1:])) if len(free) > 1 else LOCAL
            size = sizes[name] + (more if name == request_id else 0)
            if target == LOCAL or not here[name] or free[target] < size:
                del here[name]
                continue
            leaving.setdefault((name, target), []).append(here[name].pop())
            free[target] -= size
            blocks -= size
        return [(name, tuple(sorted(groups)), target) for (name, target), groups in leaving.items()]

    def check_invariants(self) -> None:
        """Check that the placement and the solver's state agree. A failure is a bug."""
        self.state.check_invariants()
        running = {name for name, placed in self._placed.items() if placed.anchor is not None}
        assert running == set(self.state.ids), "running requests differ"
        for name in running:
            placed = self._placed[name]
            assert np.array_equal(self._counts(placed.devices), self.state.groups(name)), f"groups of {name} differ"

    def _forget_moves(self) -> None:
        """Forget the moves that the solver's state has ended."""
        self._moves = {move.number: self._moves[move.number] for move in self.state.moves}

    def _choose(self, tokens: int, growth: int) -> tuple[tuple[int, ...] | None, str]:
        """Return the device of each group, or None if there is no room, with the reason."""
        if not any(device.status is DeviceStatus.OK for device in self.state.devices[1:]):
            return (LOCAL,) * self.heads.head_groups, "no_worker"
        match self._policy:
            case "local":
                return (LOCAL,) * self.heads.head_groups, "policy"
            case "remote":
                return self._most_remote(tokens + growth), "policy"
            case "solver":
                devices = self._solved(tokens, growth)
                return devices, "no_room" if devices is None else "costs"

    def _free_blocks(self) -> IntArray:
        """Return the blocks that moves may take on each device, shape [D]: none if it takes none or is at its limit."""
        free = self.state.free_blocks()
        free[[i for i, one in enumerate(self.state.devices) if i != LOCAL and one.status is not DeviceStatus.OK]] = 0
        return self._within_limits(free)

    def _within_limits(self, free: IntArray) -> IntArray:
        for device, limit in self._limits.items():
            free[device] = max(free[device] - max(self.state.devices[device].total_blocks - limit, 0), 0)
        return free

    def _load(self) -> DeviceLoad:
        """Return the load that a new request joins. For the ranks: the pool's free blocks less those to be taken."""
        load, free = self.state.load(), self.state.free_blocks()
        load.free_blocks[LOCAL] = self._free_here() - (free[LOCAL] - load.free_blocks[LOCAL])
        self._within_limits(load.free_blocks)
        return load

    def _solved(self, tokens: int, growth: int) -> tuple[int, ...] | None:
        if self._dispatcher is None or self._dispatcher.stage is not self.state.stage:
            self._dispatcher = Dispatcher(self.state.stage)
        context, growing = np.array([tokens], np.int64), np.array([growth], np.int64)
        wanted = Requests(ids=("new",), context_tokens=context, growth_tokens=growing)
        plan = self._dispatcher.dispatch(self._load(), wanted)
        return None if plan.unplaced else _named(plan.groups[0].tolist())

    def _most_remote(self, tokens: int) -> tuple[int, ...]:
        free = self._load().free_blocks // max(self._blocks(tokens), 1)
        free[LOCAL] = 0
        counts = np.zeros_like(free)
        for _ in range(self.heads.head_groups):
            device = int(np.argmax(np.where(free > counts, free - counts, -1)))
            if free[device] <= counts[device]:
                break
            # Take turns: the device with the fewest so far among those with room.
            open_devices = np.flatnonzero(free > counts)
            counts[open_devices[np.argmin(counts[open_devices])]] += 1
        counts[LOCAL] = self.heads.head_groups - counts.sum()
        return _named(counts.tolist())

    def _kept_blocks(self, placed: _Placed, lost: int) -> IntArray:
        """Return the blocks, shape [D], that a recomputed request takes where its groups stay."""
        blocks = self._counts(placed.devices) * self._blocks(placed.tokens + placed.growth)
        blocks[[LOCAL, lost]] = 0
        return blocks

    def _without(self, placed: _Placed, lost: int, taken: IntArray) -> tuple[int, ...]:
        """Return new homes for the groups on a lost device, or on one that takes none.

        They go to a worker with room if the pool is short, otherwise here. ``taken`` are the blocks that others will
        take, shape [D].
        """
        blocks = -(-(placed.tokens + placed.growth) // self.heads.block_tokens)
        free = self._load().free_blocks - taken - self._kept_blocks(placed, lost)
        free[LOCAL] = self._free_here()
        devices = list(placed.devices)
        for group, device in enumerate(devices):
            if device != lost and self.state.devices[device].status is DeviceStatus.OK:
                continue
            others = [i for i in range(1, len(free)) if free[i] >= blocks]
            home = LOCAL if free[LOCAL] >= blocks or not others else max(others, key=lambda i: int(free[i]))
            free[home] -= blocks
            devices[group] = home
        return tuple(devices)

    def _counts(self, devices: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.bincount(devices, minlength=self.state.stage.num_devices).astype(np.int64)


def _named(counts: Sequence[int]) -> tuple[int, ...]:
    """Return the device of each group: the first groups stay here, the others go to the workers in turn."""
    devices = [LOCAL] * counts[LOCAL]
    left = list(counts)
    left[LOCAL] = 0
    while any(left):
        for device, count in enumerate(left):
            if count:
                devices.append(device)
                left[device] -= 1
    return tuple(devices)
