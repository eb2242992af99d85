"""Which device each head of each request lives on, and the pages that takes: the engine's book, ahead of the devices.

`hetis.solver.dispatch` decides where the heads of a new request go; this room turns its counts into heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import numpy as np

from hetis.runtime.engine.group import PrimaryGroup
from hetis.solver.dispatch.problem import HeadShape, IntArray, Load, Primary, Requests
from hetis.solver.dispatch.problem import Stage as StageCosts
from hetis.solver.dispatch.snapshot import DeviceStatus, PreparedMove
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError

Heads = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMove:
    """Heads of one request on their way on one stage: the source owns them until `Placement.commit`."""

    stage: int
    request: int
    heads: Heads
    source: int
    target: int
    prepared: PreparedMove


class Dispatched(Protocol):
    """Head groups of request j on device i, shape [J, D], and who has to wait."""

    @property
    def groups(self) -> IntArray: ...

    @property
    def unplaced(self) -> Sequence[object]: ...


class DispatchRule(Protocol):
    """Says where the heads of new requests go; made for one stage's costs, and anew when they change."""

    def dispatch(self, load: Load, requests: Requests) -> Dispatched: ...


class Placement:
    """Heads and pages of one stage.

    Attributes:
        state: the solver's book.
        costs: what attention takes where.
        group: its devices as the solver sees them.
        rule: what decides where new requests go; the solver's `Dispatcher` unless another is put here.
    """

    rule: Callable[[StageCosts], DispatchRule]

    def __init__(
        self, costs: StageCosts, num_pages: Sequence[int], *, stage: int = 0, homes: Heads | None = None
    ) -> None:
        """``homes``: of each head, the device that computes its queries; None: the first, of all. ``stage``: ours."""
        self.costs, self.rule = costs, _solver
        self._stage = stage
        self._homes = homes or (0,) * costs.heads.head_groups
        self.group = PrimaryGroup(self._homes, costs.num_devices)
        self.state = DispatchState(costs, num_pages)
        self._num_pages = tuple(num_pages)
        self._heads: dict[int, Heads] = {}
        self._moves: dict[int, HeadMove] = {}
        self._dispatcher: DispatchRule | None = None
        self._dispatched: StageCosts | None = None  # what the dispatcher was made for

    def __len__(self) -> int:
        return len(self._heads)

    def change_costs(self, costs: StageCosts) -> None:
        """Goes on with the same devices at other speeds; heads stay where they are. Raises InvalidProblemError."""
        self.state.change_costs(costs)
        self.costs = costs

    def heads(self, request: int) -> Heads:
        """Device of each KV head of a running request."""
        return self._heads[request]

    @property
    def requests(self) -> tuple[int, ...]:
        """Running requests in their order of admission."""
        return tuple(self._heads)

    @property
    def moves(self) -> tuple[HeadMove, ...]:
        return tuple(self._moves.values())

    def could_hold(self, tokens: int, *, without: Collection[int] = ()) -> bool:
        """Whether a request of so many tokens fits when it is alone, on all devices but those ``without``.

        Whether a device is there now makes no difference.
        """
        pages = self._pages(tokens)
        totals = [0 if device in without else total for device, total in enumerate(self._num_pages)]
        return sum(self._fitting(totals, pages)) >= self.costs.heads.head_groups

    def away(self) -> tuple[int, ...]:
        """Devices that take no heads now: lost, or drained."""
        return tuple(i for i, device in enumerate(self.state.devices) if device.status is not DeviceStatus.OK)

    def admit(self, request: int, *, tokens: int, growth: int) -> Heads | None:
        """Places a request of ``tokens`` that is expected to grow; None: there is no room for it now.

        The expected growth only keeps others out: where nobody else runs, a request is placed without it.
        """
        counts = self._dispatch(tokens, growth)
        if counts is None and not self._heads:
            counts = self._first_fit(tokens)
        if counts is None:
            return None
        self.state.admit_one(
            str(request), context_tokens=tokens, remaining_tokens=growth, groups=np.array(counts, np.int64)
        )
        heads = at_home_first(counts, self._homes)
        self._heads[request] = heads
        return heads

    def tokens(self, request: int) -> int:
        """Positions that pages are held for."""
        return self.state.context_tokens(str(request))

    def grow(self, requests: Iterable[int]) -> tuple[int, ...]:
        """One more position for each; returns those for which a device has no page left."""
        names = [str(request) for request in requests]
        return tuple(int(name) for name in self.state.grow(names)) if names else ()

    def full_devices(self, request: int) -> tuple[int, ...]:
        """Devices of a request that have too few pages for its next position."""
        name = str(request)
        if (self.state.context_tokens(name)) % self.costs.heads.block_tokens:
            return ()
        groups, free = self.state.groups(name), self.state.free_blocks()
        for move in self._moves.values():
            if move.request == request:
                groups[move.target] += len(move.heads)
        return tuple(int(i) for i in np.flatnonzero(groups > free))

    def release(self, request: int) -> None:
        """Forgets a request, done or preempted; its moves are void."""
        for number in [n for n, move in self._moves.items() if move.request == request]:
            del self._moves[number]
        self.state.finish(str(request))
        del self._heads[request]

    # --- moves

    def prepare(self, request: int, heads: Sequence[int], target: int) -> HeadMove | None:
        """Takes pages at ``target`` for heads that are on one other device; None: it has too few.

        Raises:
            InvalidProblemError: the heads are on several devices, or under way, or the target takes none.
        """
        owners = {self._heads[request][head] for head in heads}
        under_way = {head for move in self._moves.values() if move.request == request for head in move.heads}
        if len(owners) != 1 or under_way & set(heads):
            raise InvalidProblemError(f"request {request}: heads {list(heads)} are not at rest on one device")
        source = owners.pop()
        prepared = self.state.prepare_move(str(request), groups=len(set(heads)), source=source, target=target)
        if prepared is None:
            return None
        move = HeadMove(
            stage=self._stage,
            request=request,
            heads=tuple(sorted(set(heads))),
            source=source,
            target=target,
            prepared=prepared,
        )
        self._moves[prepared.number] = move
        return move

    def is_under_way(self, move: HeadMove) -> bool:
        """It was neither committed nor aborted, and its request has not left."""
        return move.prepared.number in self._moves

    def commit(self, *moves: HeadMove) -> None:
        """The targets own the heads from now on, all at once."""
        self.state.commit_moves(*(move.prepared.number for move in moves))
        for move in moves:
            del self._moves[move.prepared.number]
            owners = list(self._heads[move.request])
            for head in move.heads:
                owners[head] = move.target
            self._heads[move.request] = tuple(owners)

    def abort(self, move: HeadMove) -> None:
        """The heads stay where they are."""
        self.state.abort_move(move.prepared.number)
        del self._moves[move.prepared.number]

    # --- devices

    def lose(self, device: int) -> tuple[int, ...]:
        """Marks a device lost; returns the requests that had heads there, which have left."""
        evicted = [int(gone.id) for gone in self.state.lose_device(device)]
        for request in evicted:
            del self._heads[request]
        running = {move.number for move in self.state.moves}
        self._moves = {number: move for number, move in self._moves.items() if number in running}
        return tuple(evicted)

    def restore(self, device: int) -> None:
        """A lost or drained device takes heads again."""
        self.state.restore_device(device)

    def check_invariants(self) -> None:
        """Heads and counts agree. A failure is a bug of this class."""
        self.state.check_invariants()
        assert {str(request) for request in self._heads} == set(self.state.ids), "requests differ"
        for request, heads in self._heads.items():
            counts = np.bincount(heads, minlength=self.costs.num_devices)
            assert np.array_equal(counts, self.state.groups(str(request))), f"heads of request {request} differ"

    # --- inside

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.costs.heads.block_tokens)

    def _dispatch(self, tokens: int, growth: int) -> list[int] | None:
        """Heads per device by the solver; at home, where there is no other place."""
        load = self.state.load()
        if self.group.num_places == 1:
            counts = [self._homes.count(device) for device in range(self.costs.num_devices)]
            fits = (np.array(counts) * self._pages(tokens + growth) <= load.free_blocks).all()
            return counts if fits else None
        if self._dispatcher is None or self._dispatched is not self.state.stage:
            self._dispatched = self.state.stage
            self._dispatcher = self.rule(self.group.costs(self.state.stage))
        requests = Requests(
            ids=("new",),
            context_tokens=np.array([tokens], np.int64),
            growth_tokens=np.array([growth], np.int64),
        )
        plan = self._dispatcher.dispatch(self.group.load(load), requests)
        return None if plan.unplaced else self.group.counts(plan.groups[0])

    def _first_fit(self, tokens: int) -> list[int] | None:
        takes = [device.status is DeviceStatus.OK for device in self.state.devices]
        free = np.where(takes, self.state.free_blocks(), 0)
        left, counts = self.costs.heads.head_groups, list[int]()
        for fitting in self._fitting(free.tolist(), self._pages(tokens)):
            counts.append(min(fitting, left))
            left -= counts[-1]
        return None if left else self.group.counts(counts)

    def _fitting(self, free: Sequence[int], pages: int) -> list[int]:
        """Heads of so many pages that fit at each of the group's places, where devices have so many ``free``."""
        group = self.group
        places = range(group.num_places)
        return [min(free[device] // pages for device in group.devices(i)) * group.unit(i) for i in places]


def at_home_first(counts: Sequence[int], homes: Heads) -> Heads:
    """Which head goes to which device, given how many each takes: as many as possible stay at home.

    The others go in turns, one of each home, so that every device gets heads of all of them.
    """
    left = list(counts)
    heads: list[int | None] = []
    for home in homes:
        stays = left[home] > 0
        left[home] -= stays
        heads.append(home if stays else None)
    away: dict[int, list[int]] = {}
    for head, (home, owner) in enumerate(zip(homes, heads, strict=True)):
        if owner is None:
            away.setdefault(home, []).append(head)
    others = iter([device for device, count in enumerate(left) for _ in range(count)])
    for turn in zip_longest(*away.values()):
        for head in turn:
            if head is not None:
                heads[head] = next(others)
    return tuple(device for device in heads if device is not None)


def _solver(stage: StageCosts) -> DispatchRule:
    from hetis.solver.dispatch.solve import Dispatcher

    return Dispatcher(stage)


def even_costs(heads: HeadShape, names: Sequence[str], *, primaries: int = 1) -> StageCosts:
    """Devices of one speed, until they are measured: after the primaries, they cost a little to reach."""
    num = len(names)
    away = np.array([*[0.0] * primaries, *[1.0] * (num - primaries)])
    return StageCosts(
        heads=heads,
        devices=tuple(names),
        head_s=np.full((num, 1), 1e-7),
        kv_byte_s=np.full((num, 1), 1e-10),
        call_s=np.full((num, 1), 1e-5),
        transfer_byte_s=1e-10 * away,
        transfer_s=1e-5 * away,
        primary=Primary(device=0),
    )
