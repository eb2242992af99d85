"""The head map of one replica stage and its KV blocks, updated incrementally.

A request has G head groups, each on one device. In every layer a group takes one block per ``block_tokens`` tokens of
context; blocks are counted per layer. During a move of groups (`prepare_move` to `commit_moves`), the source owns them
and both ends hold blocks for them.

Every method costs what changes, times the number of devices; nothing is summed over all requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hetis.solver.dispatch.dispatch_problem import MOST_TOKENS, DeviceLoad, DispatchPlan, IntArray, Requests, Stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot, check_groups
from hetis.solver.errors import InvalidProblemError

if TYPE_CHECKING:
    from hetis.solver.dispatch.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted:
    """A request that lost KV and left the state, to be prefilled again with ``context_tokens``."""

    id: str
    context_tokens: int  # prompt and output so far
    remaining_tokens: int  # output tokens still expected at that time


class DispatchState:
    """The head placement and block accounting of one stage; not to be shared between threads."""

    def __init__(self, stage: Stage, total_blocks: Sequence[int] | IntArray, *, high_water: float = 0.9) -> None:
        """Create an empty stage with ``total_blocks`` KV blocks per layer on each device, shape [D]."""
        if len(total_blocks) != stage.num_devices:
            raise InvalidProblemError(
                f"{len(total_blocks)} totals of KV blocks, the stage has {stage.num_devices} devices"
            )
        self.stage = stage
        self._devices = [
            DeviceSnapshot(name=name, total_blocks=int(total), high_water=high_water)
            for name, total in zip(stage.devices, total_blocks, strict=True)
        ]
        self._total = np.array([device.total_blocks for device in self._devices], np.int64)
        # Imported with the first state, since its kernel needs numba: simulations of plain replicas have no state.
        from hetis.solver.dispatch.ledger import Ledger

        self._ledger: Ledger = Ledger(stage.num_devices, stage.heads.block_tokens)
        self._moves: dict[int, PreparedMove] = {}
        self._next_move = 0

    @classmethod
    def of(cls, snapshot: StateSnapshot) -> DispatchState:
        """Return the state from which a snapshot was taken."""
        state = cls(snapshot.stage, snapshot.total_blocks())
        for name, context, remaining, groups in zip(
            snapshot.ids, snapshot.context_tokens, snapshot.remaining_tokens, snapshot.groups, strict=True
        ):
            state._ledger.add(name, int(context), int(remaining), groups)
        for move in snapshot.moves:
            state._send(move)
        state._devices = list(snapshot.devices)
        state._next_move = max((move.number + 1 for move in snapshot.moves), default=0)
        return state

    # --- contents

    def __len__(self) -> int:
        """Return the number of running requests."""
        return len(self._ledger.slots)

    def __contains__(self, request: str) -> bool:
        return request in self._ledger.slots

    @property
    def devices(self) -> tuple[DeviceSnapshot, ...]:
        return tuple(self._devices)

    @property
    def ids(self) -> tuple[str, ...]:
        """Return the running requests in order of admission."""
        return tuple(self._ledger.slots)

    @property
    def moves(self) -> tuple[PreparedMove, ...]:
        """Return the moves of head groups under way."""
        return tuple(self._moves.values())

    def context_tokens(self, request: str) -> int:
        return int(self._ledger.context[self._slot(request)])

    def remaining_tokens(self, request: str) -> int:
        """Return the output tokens still expected."""
        return int(self._ledger.remaining[self._slot(request)])

    def groups(self, request: str) -> IntArray:
        """Return the head groups of a request on each device, shape [D]."""
        groups: IntArray = self._ledger.groups[self._slot(request)].copy()
        return groups

    def free_blocks(self) -> IntArray:
        """Return the unused blocks, shape [D]; `load` gives those not set aside for expected growth."""
        free: IntArray = self._total - self._ledger.used
        return free

    def load(self) -> DeviceLoad:
        """Return the load that new requests join: free blocks minus expected growth, 0 if no groups are accepted."""
        heads = self.stage.heads
        takes = np.array([device.status is DeviceStatus.OK for device in self._devices])
        return DeviceLoad(
            heads=self._ledger.held * heads.queries_per_group,
            kv_bytes=self._ledger.tokens.astype(np.float64) * heads.kv_bytes_per_token,
            free_blocks=np.where(takes, self._total - self._ledger.expected, 0),
        )

    def snapshot(self) -> StateSnapshot:
        """Return all of the state as a value that later changes do not affect."""
        ledger = self._ledger
        slots = np.fromiter(ledger.slots.values(), np.int64, len(ledger.slots))
        return StateSnapshot(
            stage=self.stage,
            devices=self.devices,
            ids=self.ids,
            context_tokens=ledger.context[slots],
            remaining_tokens=ledger.remaining[slots],
            groups=ledger.groups[slots],
            moves=self.moves,
        )

    # --- requests

    def admit(self, requests: Requests, plan: DispatchPlan) -> tuple[str, ...]:
        """Add the requests that ``plan`` placed and return their names.

        Raises:
            InvalidProblemError: the plan does not fit this state: a device has too few blocks or takes no groups.
                Requests before the offending one stay admitted.
        """
        left_out = {unplaced.request for unplaced in plan.unplaced}
        placed = [j for j in range(len(requests.ids)) if j not in left_out]
        for j in placed:
            self.admit_one(
                requests.ids[j],
                context_tokens=int(requests.context_tokens[j]),
                remaining_tokens=int(requests.growth_tokens[j]),
                groups=plan.groups[j],
            )
        return tuple(requests.ids[j] for j in placed)

    def admit_one(self, request: str, *, context_tokens: int, remaining_tokens: int, groups: IntArray) -> None:
        """Add one request with its head groups on each device, shape [D]; raise as `admit` does."""
        if request in self._ledger.slots:
            raise InvalidProblemError(f"request {request} is running already")
        if not 1 <= context_tokens <= MOST_TOKENS or not 0 <= remaining_tokens <= MOST_TOKENS:
            raise InvalidProblemError(
                f"request {request} has {context_tokens} context and {remaining_tokens} remaining tokens, "
                f"must be >= 1 and >= 0, and <= {MOST_TOKENS}"
            )
        groups = np.asarray(groups, np.int64)
        check_groups(self.stage, request, groups)
        free = self.free_blocks()
        needed = groups * -(-context_tokens // self.stage.heads.block_tokens)
        for i in np.flatnonzero(groups):
            device = self._devices[i]
            if device.status is not DeviceStatus.OK:
                raise InvalidProblemError(
                    f"request {request}: {device.name} is {device.status} and takes no head groups"
                )
            if needed[i] > free[i]:
                raise InvalidProblemError(
                    f"request {request} needs {needed[i]} KV blocks on {device.name}, {free[i]} are free"
                )
        self._ledger.add(request, context_tokens, remaining_tokens, groups)

    def grow(self, requests: Iterable[str], tokens: int = 1) -> tuple[str, ...]:
        """Lengthen the context of each request by ``tokens``, which count towards its expected output.

        Return the requests that did not grow because one of their devices had no block left; earlier ones have
        priority.
        """
        names = tuple(requests)
        slots = np.array([self._slot(name) for name in names], np.int64)
        if len(set(names)) < len(names) or tokens < 1:
            raise InvalidProblemError(
                f"growth by {tokens} tokens of {len(names)} requests, {len(set(names))} different"
            )
        ledger = self._ledger
        more = ledger.blocks(ledger.context[slots] + tokens) - ledger.blocks(ledger.context[slots])
        crossing = np.flatnonzero(more)
        needed = ledger.taken(slots[crossing]) * more[crossing, None]
        room = self.free_blocks()
        if np.all(needed.sum(axis=0) <= room):
            ledger.lengthen(slots, tokens)
            return ()
        stays = np.zeros(len(names), np.bool_)
        for position, blocks in zip(crossing, needed, strict=True):
            if np.any(blocks > room):
                stays[position] = True
            else:
                room -= blocks
        ledger.lengthen(slots[~stays], tokens)
        return tuple(names[position] for position in np.flatnonzero(stays))

    def grow_one(self, request: str, *, context_tokens: int) -> bool:
        """Lengthen one context to ``context_tokens`` if it is shorter; False: one of its devices has too few blocks."""
        ledger, slot = self._ledger, self._slot(request)
        return ledger.lengthen_one(slot, context_tokens, self._total)

    def expect(self, request: str, remaining_tokens: int) -> None:
        """Set the output tokens still expected to a better estimate."""
        slot = self._slot(request)
        if not 0 <= remaining_tokens <= MOST_TOKENS:
            raise InvalidProblemError(
                f"request {request}: remaining_tokens is {remaining_tokens}, must be >= 0 and <= {MOST_TOKENS}"
            )
        self._ledger.expect(slot, remaining_tokens)

    def finish(self, request: str) -> None:
        """Remove a finished or evicted request, free its blocks, and abort its moves."""
        self._slot(request)
        for move in [move for move in self._moves.values() if move.request == request]:
            self.abort_move(move.number)
        self._ledger.remove(request)

    # --- moves

    def prepare_move(self, request: str, *, groups: int, source: int, target: int) -> PreparedMove | None:
        """Reserve blocks at ``target`` for head groups on ``source``, which owns them until `commit_moves`.

        Return None if the target has too few free blocks: another move has to free some first.

        Raises:
            InvalidProblemError: too few groups on the source are free to move, or the target accepts none.
        """
        slot = self._slot(request)
        held = int(self._ledger.groups[slot, source] - self._ledger.outgoing[slot, source])
        if not 1 <= groups <= held or source == target:
            raise InvalidProblemError(
                f"request {request}: {groups} head groups of {held} on {self.stage.devices[source]} cannot move "
                f"to {self.stage.devices[target]}"
            )
        if self._devices[target].status is not DeviceStatus.OK:
            raise InvalidProblemError(
                f"{self.stage.devices[target]} is {self._devices[target].status} and takes no head groups"
            )
        needed = groups * int(self._ledger.blocks(self._ledger.context[slot]))
        if needed > self.free_blocks()[target]:
            return None
        move = PreparedMove(number=self._next_move, request=request, groups=groups, source=source, target=target)
        self._next_move += 1
        self._send(move)
        return move

    def commit_moves(self, *numbers: int) -> None:
        """Assign the groups of all these moves to their targets at once, and free the sources' blocks.

        The primary takes several groups at once, so moves that only keep it even together are committed together.

        Raises:
            InvalidProblemError: no move of a number is under way, or the primary would be uneven. Nothing is committed.
        """
        changes: dict[int, IntArray] = {}
        for number in numbers:
            move = self._move(number)
            change = changes.setdefault(self._slot(move.request), np.zeros(self.stage.num_devices, np.int64))
            change[move.source] -= move.groups
            change[move.target] += move.groups
        if len(set(numbers)) < len(numbers):
            raise InvalidProblemError("a move is committed twice")
        for slot, change in changes.items():
            request = self._moves[next(n for n in numbers if self._slot(self._moves[n].request) == slot)].request
            check_groups(self.stage, request, self._ledger.groups[slot] + change)
        for number in numbers:
            self._release(number)
        for slot, change in changes.items():
            self._ledger.own(slot, change)

    def abort_move(self, number: int) -> None:
        """Leave the groups where they are and free the target's blocks."""
        self._release(number)

    # --- devices

    def lose_device(self, device: int) -> tuple[Evicted, ...]:
        """Mark a device lost, and remove and return the requests with KV there, which must be prefilled again.

        A request whose groups were only moving there continues where it is.
        """
        for move in [move for move in self._moves.values() if device in (move.source, move.target)]:
            self.abort_move(move.number)
        ledger = self._ledger
        hit = [(name, slot) for name, slot in ledger.slots.items() if ledger.groups[slot, device]]
        evicted = tuple(
            Evicted(
                id=name,
                context_tokens=int(ledger.context[slot]),
                remaining_tokens=int(ledger.remaining[slot]),
            )
            for name, slot in hit
        )
        for name, _ in hit:
            self.finish(name)
        self._set_status(device, DeviceStatus.LOST)
        return evicted

    def drain_device(self, device: int) -> None:
        """Stop a device from taking groups and abort moves to it; re-dispatch empties it."""
        if self._devices[device].status is DeviceStatus.LOST:
            raise InvalidProblemError(f"{self.stage.devices[device]} is lost and cannot be drained")
        for move in [move for move in self._moves.values() if move.target == device]:
            self.abort_move(move.number)
        self._set_status(device, DeviceStatus.DRAINING)

    def restore_device(self, device: int) -> None:
        """Allow a drained or lost device to take groups again."""
        self._set_status(device, DeviceStatus.OK)

    def resize_device(self, device: int, total_blocks: int) -> None:
        """Set an empty device that came back with other memory to ``total_blocks`` KV blocks per layer.

        Raises:
            InvalidProblemError: it holds head groups, or some are moving to it.
        """
        if self._ledger.used[device]:
            raise InvalidProblemError(
                f"{self.stage.devices[device]} holds {self._ledger.used[device]} KV blocks and cannot be resized"
            )
        self._devices[device] = replace(self._devices[device], total_blocks=total_blocks, changed=True)
        self._total[device] = total_blocks

    def change_costs(self, stage: Stage) -> None:
        """Switch to the same devices at other speeds."""
        if len(stage.devices) != len(self.stage.devices):
            raise InvalidProblemError(f"the stage has {len(stage.devices)} devices, must have {len(self._devices)}")
        if stage.devices != self.stage.devices or stage.heads != self.stage.heads:
            raise InvalidProblemError("the new stage must have the devices and heads of the old one")
        where = (None if s.primary is None else (s.primary.device, s.primary_groups) for s in (stage, self.stage))
        if len(set(where)) > 1:
            raise InvalidProblemError("the new stage must have the same primary")
        for i in range(len(self._devices)):
            same = all(np.array_equal(getattr(stage, a)[i], getattr(self.stage, a)[i]) for a in _COSTS)
            if not same:
                self._devices[i] = replace(self._devices[i], changed=True)
        self.stage = stage

    def mark_seen(self) -> None:
        """Record that re-dispatch has checked every changed device."""
        self._devices = [replace(device, changed=False) for device in self._devices]

    # --- internals

    def check_invariants(self) -> None:
        """Recount everything, for tests and debugging; an AssertionError is a bug of this class."""
        ledger = self._ledger
        ledger.check(self.stage.heads.head_groups)
        for name, slot in ledger.slots.items():
            check_groups(self.stage, name, ledger.groups[slot])
        coming, leaving = np.zeros_like(ledger.incoming), np.zeros_like(ledger.outgoing)
        for move in self._moves.values():
            coming[ledger.slots[move.request], move.target] += move.groups
            leaving[ledger.slots[move.request], move.source] += move.groups
        assert np.array_equal(coming, ledger.incoming), "moves and incoming groups differ"
        assert np.array_equal(leaving, ledger.outgoing), "moves and outgoing groups differ"
        assert np.all((ledger.used >= 0) & (ledger.used <= self._total)), "blocks are negative"
        lost = [device.status is DeviceStatus.LOST for device in self._devices]
        assert not np.any(ledger.used[lost]), "a lost device holds blocks"

    def _slot(self, request: str) -> int:
        slot = self._ledger.slots.get(request)
        if slot is None:
            raise InvalidProblemError(f"request {request} is not running")
        return slot

    def _move(self, number: int) -> PreparedMove:
        move = self._moves.get(number)
        if move is None:
            raise InvalidProblemError(f"no move {number} is under way")
        return move

    def _send(self, move: PreparedMove) -> None:
        self._ledger.send(self._slot(move.request), move.groups, move.source, move.target)
        self._moves[move.number] = move

    def _release(self, number: int) -> PreparedMove:
        """Undo `_send`."""
        move = self._move(number)
        del self._moves[number]
        self._ledger.send(self._slot(move.request), -move.groups, move.source, move.target)
        return move

    def _set_status(self, device: int, status: DeviceStatus) -> None:
        if self._devices[device].status is not status:
            self._devices[device] = replace(self._devices[device], status=status, changed=True)


_COSTS = ("head_s", "kv_byte_s", "call_s", "transfer_byte_s", "transfer_s")
