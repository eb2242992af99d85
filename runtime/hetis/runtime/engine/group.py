"""The ranks of a tensor-parallel primary as one device: how the solver and the planner see a stage.

In the engine every rank is a device with pages of its own. To the solver they are one device of n cards, which takes
head groups n at a time, so that its cards stay even; the other devices come after it. A head that goes to the group
goes home: to the rank that computes its queries. With one rank both are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray, Load, Primary, Stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot

Numbers = TypeVar("Numbers", IntArray, FloatArray)
GROUP = 0  # the solver's number of the primary


class Split(NamedTuple):
    """Heads that go from one device of the engine to another."""

    heads: tuple[int, ...]
    source: int
    target: int


class PrimaryGroup:
    """The devices of one stage. Below, a *place* is a device as the solver counts them.

    Attributes:
        homes: of each head, the rank that computes its queries.
        size: n, ranks.
        num_places: devices to the solver.
    """

    def __init__(self, homes: Sequence[int], num_devices: int) -> None:
        """The first of the ``num_devices`` are the ranks."""
        self.homes = tuple(homes)
        self.size = max(homes) + 1
        self.num_places = num_devices - self.size + 1

    def place(self, device: int) -> int:
        """Of a device of the engine."""
        return max(device - self.size + 1, GROUP)

    def devices(self, place: int) -> range:
        """The engine's devices at a place."""
        return range(self.size) if place == GROUP else range(place + self.size - 1, place + self.size)

    def device(self, head: int, place: int) -> int:
        """Where a head goes that goes to a place."""
        return self.homes[head] if place == GROUP else self.devices(place)[0]

    def unit(self, *places: int) -> int:
        """Heads that go between places at a time."""
        return self.size if GROUP in places else 1

    def status(self, devices: Sequence[DeviceSnapshot], place: int) -> DeviceStatus:
        """Of the engine's ``devices`` at a place: the first that is not ok."""
        found = [devices[device].status for device in self.devices(place)]
        return next((status for status in found if status is not DeviceStatus.OK), DeviceStatus.OK)

    # --- as the solver sees it

    def costs(self, stage: Stage) -> Stage:
        """Of ``stage``, whose devices are the engine's; the slowest rank's are those of a card of the group."""
        if self.size == 1:
            return stage
        n, primary = self.size, stage.primary or Primary(device=GROUP)
        return replace(
            stage,
            devices=(stage.devices[0], *stage.devices[n:]),
            head_s=_first_most(stage.head_s, n),
            kv_byte_s=_first_most(stage.kv_byte_s, n),
            call_s=_first_most(stage.call_s, n),
            transfer_byte_s=_first_most(stage.transfer_byte_s, n),
            transfer_s=_first_most(stage.transfer_s, n),
            primary=replace(primary, device=GROUP, tp=n),
        )

    def load(self, load: Load) -> Load:
        """Ranks work side by side, and take as many heads each: the fullest one counts for all."""
        if self.size == 1:
            return load
        n = self.size
        cards = np.array([n, *[1] * (self.num_places - 1)])
        return Load(
            heads=cards * _first_most(load.heads, n),
            kv_bytes=cards * _first_most(load.kv_bytes, n),
            free_blocks=-cards * _first_most(-load.free_blocks, n),
        )

    def links(self, byte_s: FloatArray) -> FloatArray:
        """Seconds per byte into or out of each place, from those of the engine's devices."""
        return _first_most(byte_s, self.size)

    def snapshot(self, snapshot: StateSnapshot) -> StateSnapshot:
        """Of a ``snapshot`` of the engine's book. Without requests that the ranks do not have evenly: their heads stay
        where they are, and their blocks are no room for others."""
        if self.size == 1:
            return snapshot
        on_ranks = snapshot.groups[:, : self.size]
        is_even = (on_ranks == on_ranks[:, :1]).all(axis=1)
        even = {name for name, one in zip(snapshot.ids, is_even, strict=True) if one}
        row = {name: i for i, name in enumerate(snapshot.ids)}
        blocks = snapshot.context_blocks()
        taken, moves = blocks[~is_even] @ snapshot.groups[~is_even], list[PreparedMove]()
        for move in snapshot.moves:
            ends = self.place(move.source), self.place(move.target)
            if move.request in even and ends[0] != ends[1]:
                moves.append(replace(move, source=ends[0], target=ends[1]))
            else:
                taken[move.target] += move.groups * blocks[row[move.request]]
        return StateSnapshot(
            stage=self.costs(snapshot.stage),
            devices=tuple(self._devices(snapshot.devices, taken)),
            ids=tuple(name for name in snapshot.ids if name in even),
            context_tokens=snapshot.context_tokens[is_even],
            remaining_tokens=snapshot.remaining_tokens[is_even],
            groups=self._sums(snapshot.groups)[is_even],
            moves=tuple(moves),
        )

    # --- back to the engine

    def counts(self, groups: Sequence[int]) -> list[int]:
        """Heads on each device of the engine, from those at each place: the ranks have as many each."""
        return [*[int(groups[GROUP]) // self.size] * self.size, *map(int, groups[1:])]

    def leaving(
        self, owners: Sequence[int], after: Sequence[int], source: int, target: int, num: int
    ) -> tuple[int, ...]:
        """Which ``num`` heads go from one place to another; fewer where fewer are left there.

        Moves chosen before lead from ``owners`` to ``after``: what they move stays. Of every rank as many leave the
        group, or come home: a multiple of n. Between other devices those go first whose home has fewest heads there and
        most here, so that each device has heads of all ranks, which may come home together.
        """
        held = [h for h, owner in enumerate(owners) if self.place(owner) == source and after[h] == owner]
        if GROUP in (source, target):
            ranks = owners if source == GROUP else self.homes
            of_rank = [[h for h in held if ranks[h] == rank] for rank in range(self.size)]
            each = min(num // self.size, *map(len, of_rank))
            return tuple(sorted(head for heads in of_rank for head in heads[:each]))
        there = Counter(self.homes[h] for h, owner in enumerate(after) if self.place(owner) == target)
        here, chosen = Counter(self.homes[h] for h in held), list[int]()
        while held and len(chosen) < num:
            head = min(held, key=lambda h: (there[self.homes[h]], -here[self.homes[h]], h))
            held.remove(head)
            chosen.append(head)
            there[self.homes[head]] += 1
            here[self.homes[head]] -= 1
        return tuple(sorted(chosen))

    def split(self, owners: Sequence[int], heads: Sequence[int], target: int) -> list[Split]:
        """A move of heads to a place as moves between devices of the engine."""
        by_ends: dict[tuple[int, int], list[int]] = {}
        for head in heads:
            by_ends.setdefault((owners[head], self.device(head, target)), []).append(head)
        return [Split(tuple(some), source, to) for (source, to), some in by_ends.items()]

    # --- inside

    def _sums(self, groups: IntArray) -> IntArray:
        return np.concatenate([groups[:, : self.size].sum(axis=1, keepdims=True), groups[:, self.size :]], axis=1)

    def _devices(self, devices: Sequence[DeviceSnapshot], taken: IntArray) -> list[DeviceSnapshot]:
        """With what is left beside the blocks ``taken`` [devices]: n times that of the rank that has least."""
        left = [device.total_blocks - int(less) for device, less in zip(devices, taken, strict=True)]
        ranks = devices[: self.size]
        group = replace(
            ranks[0],
            total_blocks=self.size * min(left[: self.size]),
            status=self.status(devices, GROUP),
            changed=any(rank.changed for rank in ranks),
        )
        others = [replace(d, total_blocks=num) for d, num in zip(devices, left, strict=True)][self.size :]
        return [group, *others]


def _first_most(values: Numbers, num: int) -> Numbers:
    """The largest of the first ``num`` along the first axis, then the others."""
    most: Numbers = np.concatenate([values[:num].max(axis=0, keepdims=True), values[num:]])
    return most
