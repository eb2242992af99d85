"""Where the head groups of requests live, as vLLM's scheduler decides it: placed at admission, moved while they run.

`hetis.solver.dispatch` says how many groups of a new request go to which device, from measured costs and the room of
every device; this room names the groups. What runs is kept in the solver's own state of a stage, so that re-dispatch
sees what dispatch saw. Nothing here knows of vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hetis.runtime.vllm.steps import LOCAL, Admitted
from hetis.solver.dispatch.problem import HeadShape, Requests, Stage
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.dispatch.solve import Dispatcher
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError

_ENDLESS = 2**39  # blocks of the rank itself in the solver's state: vLLM's pool counts them

Policy = Literal["solver", "local", "remote"]


@dataclass(slots=True, kw_only=True)
class AllocatorStats:
    """What was decided since the start.

    Attributes:
        dispatched: requests placed.
        refused: requests for which no device had room when they were asked for; vLLM asks again.
        dispatch_s: seconds that the decisions took, and the longest of them.
        recomputed: requests that lost KV with a worker.
        moved_groups: head groups that have moved.
    """

    dispatched: int = 0
    refused: int = 0
    dispatch_s: float = 0.0
    longest_dispatch_s: float = 0.0
    recomputed: int = 0
    moved_groups: int = 0


@dataclass(slots=True)
class _Placed:
    """One request: the device of each group, and, once it runs, its anchor and number."""

    devices: tuple[int, ...]
    tokens: int  # that room is kept for
    growth: int
    anchor: int | None = None
    number: int = 0


class HeadAllocator:
    """Owns the placement of head groups on one engine's devices: 0 the ranks themselves, then the workers.

    Attributes:
        state: the solver's state of all requests that run.
        stats: what was decided.
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
        self._dispatcher: Dispatcher | None = None
        self._next_number = 1

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
        evicted = [gone.id for gone in self.state.lose_device(device)]
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

    def moved(self, request_id: str, groups: Sequence[int], target: int) -> None:
        """Groups live elsewhere from now on; the solver's state has been told already."""
        placed = self._placed[request_id]
        devices = list(placed.devices)
        for group in groups:
            devices[group] = target
        placed.devices = tuple(devices)
        self.stats.moved_groups += len(groups)

    def check_invariants(self) -> None:
        """The placement and the solver's state agree. A failure is a bug."""
        self.state.check_invariants()
        running = {name for name, placed in self._placed.items() if placed.anchor is not None}
        assert running == set(self.state.ids), "running requests differ"
        for name in running:
            placed = self._placed[name]
            assert np.array_equal(self._counts(placed.devices), self.state.groups(name)), f"groups of {name} differ"

    # --- inside

    def _choose(self, tokens: int, growth: int) -> tuple[int, ...] | None:
        match self._policy:
            case "local":
                return (LOCAL,) * self.heads.head_groups
            case "remote":
                return self._most_remote(tokens + growth)
            case "solver":
                return self._solved(tokens, growth)

    def _solved(self, tokens: int, growth: int) -> tuple[int, ...] | None:
        state = self.state
        if self._dispatcher is None or self._dispatcher.stage is not state.stage:
            self._dispatcher = Dispatcher(state.stage)
        load = state.load()
        # The pool knows what is free here; the state knows what the running ones will still take of it.
        load.free_blocks[LOCAL] = self._free_here() - (state.free_blocks()[LOCAL] - load.free_blocks[LOCAL])
        wanted = Requests(
            ids=("new",),
            context_tokens=np.array([tokens], np.int64),
            growth_tokens=np.array([growth], np.int64),
        )
        plan = self._dispatcher.dispatch(load, wanted)
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
