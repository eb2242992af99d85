"""Changes of the head map in two phases, a little between every two steps, so that decoding is not held up.

RESERVE takes pages at the targets. COPY sends positions that are final in chunks, while the sources go on serving.
When only a short tail is left the change is READY. Once it is permitted, the next step boundary copies the tail,
VERIFIES that both ends hold the same bits, and FLIPS all its moves at once: the commit point, which only the engine
has. RELEASE frees the sources. Whatever else happens (a deadline, a device lost, a digest that differs) aborts, and
nothing has changed.

A move whose request ended, lost its KV, or whose pages a request needed to grow, is left out; the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.placement import HeadMove


class Phase(StrEnum):
    """How far a change is; the last two are final."""

    COPYING = "copying"
    READY = "ready"
    FLIPPED = "flipped"
    ABORTED = "aborted"


class WantedMove(NamedTuple):
    """Heads of one request on one stage that are to go to a device of it.

    Those with the same ``together`` move at once or not at all.
    """

    request: int
    heads: tuple[int, ...]
    target: int
    together: int = 0
    stage: int = 0


@dataclass(slots=True, eq=False)
class Carried:
    """A move on its way. Attributes: ``copied``: positions at the target."""

    wanted: WantedMove
    move: HeadMove
    copied: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Change:
    """Moves that flip together.

    Attributes:
        moves: those that are still to be made, or were.
        left_out: those that are not, and why.
        deadline_s: until when it may be prepared, by the hauler's clock.
        permitted_until_s: until when it may be flipped. None: nobody has permitted it yet.
        phase: how far it is.
        why: it was aborted.
        copied_bytes: KV sent so far.
        flipped_at: number of the step that was the first with the new map.
    """

    moves: list[Carried]
    left_out: list[tuple[WantedMove, str]]
    deadline_s: float
    permitted_until_s: float | None
    phase: Phase = Phase.COPYING
    why: str = ""
    copied_bytes: int = 0
    flipped_at: int | None = None

    @property
    def is_open(self) -> bool:
        return self.phase in (Phase.COPYING, Phase.READY)


@dataclass(slots=True)
class HaulerCounts:
    """What became of moves and changes, for metrics."""

    flipped: int = 0
    left_out: int = 0
    begun_changes: int = 0
    flipped_changes: int = 0
    aborted_changes: int = 0
    copied_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Hauler:
    """Carries the changes of one engine; works between its steps once it is made.

    Attributes:
        engine: whose heads move.
        bytes_per_step: KV that the copies between two steps may take together; a page's worth is always sent.
        clock: seconds, never going back.
    """

    engine: Engine
    bytes_per_step: int = 4 << 20
    clock: Callable[[], float] = time.monotonic
    counts: HaulerCounts = field(default_factory=HaulerCounts)
    _open: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine.between_steps.append(self.advance)

    @property
    def open_changes(self) -> tuple[Change, ...]:
        return tuple(self._open)

    def reserve(
        self, wanted: Sequence[WantedMove], *, prepare_s: float = 60.0, permitted_s: float | None = None
    ) -> Change:
        """Takes pages at the targets for the moves that fit; a change of which none fits is aborted at once.

        Args:
            prepare_s: how long it may be prepared.
            permitted_s: how long it may be flipped; None: not before `permit`.
        """
        now_s = self.clock()
        change = Change(
            moves=[],
            left_out=[],
            deadline_s=now_s + prepare_s,
            permitted_until_s=None if permitted_s is None else now_s + permitted_s,
        )
        for one in wanted:
            move = self._prepare(one)
            if isinstance(move, str):
                self._leave_out(change, one, move)
            else:
                change.moves.append(Carried(one, move))
        self._keep_together(change)
        self._open.append(change)
        self.counts.begun_changes += 1
        if not change.moves:
            self._end(change, change.left_out[0][1] if change.left_out else "it has no moves")
        return change

    def permit(self, change: Change, permitted_s: float) -> None:
        """The change may be flipped within so many seconds, never after its own deadline."""
        change.permitted_until_s = self.clock() + permitted_s

    def abort(self, change: Change, why: str) -> None:
        """Gives an open change up; one that has ended stays as it did."""
        if change.is_open:
            self._end(change, why)

    def flip(self, change: Change) -> None:
        """Tail, VERIFY, FLIP, RELEASE of an open change that may be flipped, with no step in between; or it is aborted.

        Between two steps only; none is on its way then.
        """
        self.engine.settle()
        for carried in list(change.moves):
            request = self.engine.running.get(carried.move.request)
            if request is None or not self.engine.is_under_way(carried.move):
                continue
            if self.engine.copy(carried.move, carried.copied, request.computed):
                self._sent(change, carried, request.computed)
                if not self.engine.verify(carried.move) and self.engine.is_under_way(carried.move):
                    self._end(change, f"the copy of request {carried.move.request} differs from its source")
                    return
        self._forget_void(change)
        if not change.is_open:
            return
        self.engine.flip([carried.move for carried in change.moves])
        change.phase, change.flipped_at = Phase.FLIPPED, self.engine.num_steps
        self.counts.flipped += len(change.moves)
        self.counts.flipped_changes += 1
        self._open.remove(change)

    def advance(self) -> None:
        """What is due between two steps."""
        left = self.bytes_per_step
        for change in list(self._open):
            self._forget_void(change)
            if change.is_open and self.clock() >= min(change.deadline_s, _or_never(change.permitted_until_s)):
                self._end(change, "its time passed")
            if change.is_open:
                left -= self._copy(change, left)
            if change.phase is Phase.READY and change.permitted_until_s is not None:
                self.flip(change)

    # --- inside

    def _prepare(self, wanted: WantedMove) -> HeadMove | str:
        request, book = self.engine.running.get(wanted.request), self.engine.stages[wanted.stage].placement
        devices = book.state.devices
        if request is None:
            return f"request {wanted.request} does not run"
        if wanted.stage not in request.heads:
            return f"request {wanted.request} does not run on stage {wanted.stage}"
        owners = {request.heads[wanted.stage][head] for head in wanted.heads}
        busy = {h for m in book.moves if m.request == wanted.request for h in m.heads}
        if len(owners) != 1 or wanted.target in owners or busy & set(wanted.heads):
            return f"heads {list(wanted.heads)} of request {wanted.request} are not at rest on one other device"
        if devices[wanted.target].status != "ok":
            return f"{devices[wanted.target].name} is {devices[wanted.target].status}"
        move = book.prepare(wanted.request, wanted.heads, wanted.target)
        return move or f"{devices[wanted.target].name} has too few free pages for request {wanted.request}"

    def _copy(self, change: Change, left: int) -> int:
        """Sends chunks of what is final at the sources; returns the bytes that took."""
        sent = 0
        for carried in list(change.moves):
            request = self.engine.running.get(carried.move.request)
            if request is None or not self.engine.is_under_way(carried.move):
                continue  # a device was lost in this very loop: the next boundary sees to it
            page_tokens, position_bytes = self._page_tokens(carried), self._position_bytes(carried)
            most = max((left - sent) // position_bytes, page_tokens if not sent else 0)
            last = min(carried.copied + most, request.computed)
            if last > carried.copied and self.engine.copy(carried.move, carried.copied, last):
                sent += self._sent(change, carried, last)
        if all(self._tail(carried) <= self._page_tokens(carried) for carried in change.moves):
            change.phase = Phase.READY
        return sent

    def _page_tokens(self, carried: Carried) -> int:
        return self.engine.stages[carried.move.stage].stage.shape.page_tokens

    def _sent(self, change: Change, carried: Carried, last: int) -> int:
        """Positions before ``last`` are at the target; returns the bytes that were sent for that."""
        sent = (last - carried.copied) * self._position_bytes(carried)
        carried.copied = last
        change.copied_bytes += sent
        self.counts.copied_bytes += sent
        return sent

    def _position_bytes(self, carried: Carried) -> int:
        shape = self.engine.stages[carried.move.stage].stage.shape
        return len(carried.move.heads) * shape.page_bytes // shape.page_tokens

    def _tail(self, carried: Carried) -> int:
        request = self.engine.running.get(carried.move.request)
        return request.computed - carried.copied if request is not None else 0

    def _forget_void(self, change: Change) -> None:
        for carried in list(change.moves):
            if not self.engine.is_under_way(carried.move):
                change.moves.remove(carried)
                self._leave_out(change, carried.wanted, "its request left, or its pages were needed")
        self._keep_together(change)
        if change.is_open and not change.moves:
            self._end(change, change.left_out[-1][1])

    def _keep_together(self, change: Change) -> None:
        out = {(wanted.request, wanted.together): why for wanted, why in change.left_out}
        for carried in list(change.moves):
            why = out.get((carried.wanted.request, carried.wanted.together))
            if why is not None:
                self.engine.abort_move(carried.move)
                change.moves.remove(carried)
                self._leave_out(change, carried.wanted, why)

    def _leave_out(self, change: Change, wanted: WantedMove, why: str) -> None:
        change.left_out.append((wanted, why))
        self.counts.left_out += 1

    def _end(self, change: Change, why: str) -> None:
        for carried in change.moves:
            self.engine.abort_move(carried.move)
        change.moves.clear()
        change.phase, change.why = Phase.ABORTED, why
        self.counts.aborted_changes += 1
        self._open.remove(change)


def _or_never(time_s: float | None) -> float:
    return float("inf") if time_s is None else time_s
