"""Who runs and where: requests that wait, requests that run, and their heads on every stage.

Requests run in *cohorts*. A cohort takes its steps together, through one copy of every stage: its *path*. Where there
is one cohort, as without a pipeline of processes and without copies, everybody is in it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.engine.absences import Absences, Devices
from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.engine.pipeline import Path
from hetis.runtime.engine.placement import HeadMove
from hetis.runtime.engine.request import Request
from hetis.runtime.kv.errors import DeviceLostError

_NONE: Devices = {}


class PromptSource(Protocol):
    """Has prompts computed by other engines. It puts their KV where the heads live, between two steps."""

    def ask(self, request: Request) -> bool:
        """Has the KV of a request that was just seated computed, but of its last token; False: nobody does it now."""

    def wait(self) -> None:
        """A moment, or until some KV has come; called where there is nothing else to do."""


class Seats:
    """Requests and their heads.

    Attributes:
        stages: all of them; copies of a stage follow one another.
        paths: of each cohort, the stages that its steps go through.
        waiting: requests in the order they will run.
        running: by number, in the order of their admission.
        num_preempted: requests that had to make room for others.
        num_moved_heads: heads that changed their device.
        relieve: by stage, what moves heads away from a device where a request lacks a page; whether it has one then.
        absences: devices that take no heads now.
        aside: numbers of those who wait for such a device, and let others pass.
        elsewhere: what has prompts computed by other engines. None: they are computed here.
    """

    def __init__(
        self,
        stages: Sequence[StageHeads],
        paths: Sequence[Path],
        *,
        most_running: int,
        growth_tokens: int,
        patience_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.stages, self.paths = tuple(stages), tuple(paths)
        self.absences = Absences(self.stages, patience_s=patience_s, clock=clock)
        self.aside: frozenset[int] = frozenset()
        self._most_running, self._growth_tokens = most_running, growth_tokens
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.num_preempted = 0
        self.num_moved_heads = 0
        self.relieve: dict[int, Callable[[int], bool]] = {}
        self.elsewhere: PromptSource | None = None

    def path(self, request: Request) -> Path:
        """Stages that a running request's steps go through."""
        return self.paths[request.cohort]

    def could_hold(self, tokens: int, *, without: Devices = _NONE) -> bool:
        """Whether a request of so many tokens fits when it is alone, on all devices but those ``without``."""
        return any(
            all(part.placement.could_hold(tokens, without=without.get(part.number, ())) for part in path)
            for path in self.paths
        )

    def settle(self, request: Request | None = None) -> bool:
        """Waits until no step of the request, or of anyone, is on its way; False: none was. Requests may end by it.

        What takes KV away from a request, or changes where it is, has to wait for that. Without a ``request`` the
        stages have also done what they were told without an answer.
        """
        return False

    # --- who runs

    def admit(self) -> list[Request]:
        """Seats those who wait until one finds no room; returns those who do not, and never will: devices are gone.

        Who could only run with a device that is away stands aside, and lets others pass, while it is expected back.
        """
        self.absences.look()
        hopeless = self._stand_aside()
        for request in [request for request in self.waiting if request.number not in self.aside]:
            if request in hopeless:
                continue
            if len(self.running) >= self._most_running:
                break
            if self._seat(request):
                self.waiting.remove(request)
                request.prefill_tokens = request.num_tokens
                self.running[request.number] = request
                request.awaits_kv = self.elsewhere is not None and self.elsewhere.ask(request)
            elif self.running:
                break
            else:  # nobody will make room for it
                hopeless.append(request)
        return hopeless

    def _stand_aside(self) -> list[Request]:
        """Finds who waits for devices that are away; returns those whose devices are gone."""
        away, gone = self.absences.away, self.absences.gone
        if not away:
            self.aside = frozenset()
            return []
        lacking = [request for request in self.waiting if not self.could_hold(request.num_tokens, without=away)]
        hopeless = [request for request in lacking if not self.could_hold(request.num_tokens, without=gone)]
        self.aside = frozenset(request.number for request in lacking if request not in hopeless)
        return hopeless

    def _seat(self, request: Request) -> bool:
        """Heads on every stage of one path, that of the smallest cohort with room; or nothing has changed."""
        sizes = Counter(running.cohort for running in self.running.values())
        seats = -(-self._most_running // len(self.paths))
        growth = min(request.max_tokens - len(request.output), self._growth_tokens)
        for cohort in sorted(range(len(self.paths)), key=lambda cohort: sizes[cohort]):
            if sizes[cohort] >= seats:
                break
            for part in self.paths[cohort]:
                if not part.admit(request, growth=growth):
                    break
            else:
                request.cohort = cohort
                return True
            for number in list(request.heads):
                self.stages[number].placement.release(request.number)
            request.heads.clear()
        return False

    def may_prefill(self, request: Request) -> bool:
        """Whether the primaries of its stages have its prompt, or room for it; then they keep it from now on."""
        path = self.path(request)
        if all(part.prompts.holds(request.number) for part in path):
            return True
        for place, part in enumerate(path):
            if not part.prompts.begin(request.number, request.prefill_tokens):
                for earlier in path[:place]:
                    earlier.prompts.end(request.number)
                return False
        return True

    def make_room(self, requests: Iterable[Request]) -> None:
        """A page for the next position of everyone who decodes: heads leave a full device, then the youngest waits."""
        decoding = [request for request in requests if not request.is_prefilling]
        for part in dict.fromkeys(part for request in decoding for part in self.path(request)):
            stuck = part.grow(r for r in decoding if r.number in self.running and part.number in r.heads)
            while stuck:
                number = stuck.pop(0)
                while number in self.running and part.placement.grow([number]):
                    ways = (self._give_way, self._relieve, self._move_away)
                    if any(way(part, number) for way in ways) or self.settle():
                        continue
                    self.preempt(self._youngest_on(part, part.placement.full_devices(number)).number)

    def _give_way(self, part: StageHeads, number: int) -> bool:
        """Takes back moves that hold pages which a request needs to grow: nothing is lost with them."""
        moves = part.in_the_way(number)
        for move in moves:
            self.abort_move(move)
        return bool(moves)

    def _relieve(self, part: StageHeads, number: int) -> bool:
        """Has pages freed for a request by moves, where somebody knows which."""
        relieve = self.relieve.get(part.number)
        return relieve is not None and relieve(number)

    def _move_away(self, part: StageHeads, number: int) -> bool:
        """Moves a head of a request from a full device to one with room for it and its growth; of a primary with ranks
        one of each, together."""
        splits = part.way_out(self.running[number])
        return bool(splits) and self._move(number, [(split.heads, split.target) for split in splits], part.number)

    def _youngest_on(self, part: StageHeads, devices: tuple[int, ...]) -> Request:
        on_stage = (r for r in reversed(self.running.values()) if part.number in r.heads)
        return next(request for request in on_stage if set(devices) & set(request.heads[part.number]))

    def preempt(self, number: int) -> None:
        """A running request gives up its KV, and is prefilled again before anyone who came later."""
        self.settle(self.running[number])
        request = self.running.pop(number, None)
        if request is None:
            return
        self.release(request)
        request.lose_kv()
        request.num_preempted += 1
        self.num_preempted += 1
        self.waiting.appendleft(request)

    def release(self, request: Request) -> None:
        """What a request holds on its stages is free."""
        for part in self.path(request):
            part.release(request)

    # --- heads

    def move(self, number: int, heads: Sequence[int], target: int, *, stage: int = 0) -> bool:
        """Moves heads of a running request, now, between two steps; False: the target has too few pages, or the copy
        did not get there as it was.

        Raises:
            InvalidProblemError: the heads are on several devices, or the target takes none.
        """
        return self._move(number, [(heads, target)], stage)

    def _move(self, number: int, moves: Sequence[tuple[Sequence[int], int]], stage: int) -> bool:
        """All of them, now, or none; as `move`."""
        request = self.running[number]
        if self.settle(request) and number not in self.running:
            return False
        prepared: list[HeadMove] = []
        for heads, target in moves:
            move = self.stages[stage].placement.prepare(number, heads, target)
            if move is None:
                break
            prepared.append(move)
        done = len(prepared) == len(moves) and all(
            self.is_under_way(move) and self.copy(move, 0, request.computed) for move in prepared
        )
        if done and all(self.is_under_way(move) and self.verify(move) for move in prepared):
            self.flip(prepared)
            return True
        for move in prepared:
            self.abort_move(move)
        return False

    def copy(self, move: HeadMove, first: int, last: int) -> bool:
        """Copies positions ``first`` to ``last - 1`` of a prepared move; False: a device was lost meanwhile."""
        if first >= last:
            return True
        part, incarnation = self.stages[move.stage], self.running[move.request].incarnation
        try:
            part.copy(move, incarnation, first, last)
        except DeviceLostError as error:
            self.lose_device(part.device(error), stage=part.number)  # which aborts the move, wherever it was
            return False
        return True

    def verify(self, move: HeadMove) -> bool:
        """Whether both ends hold the same KV, all positions and layers, bit for bit; False also for a device lost."""
        request, part = self.running[move.request], self.stages[move.stage]
        if not request.computed:
            return True  # its prompt has not begun: neither end holds anything
        try:
            return part.is_same(move, request.incarnation, request.computed)
        except DeviceLostError as error:
            self.lose_device(part.device(error), stage=part.number)
            return False

    def flip(self, moves: Sequence[HeadMove]) -> None:
        """The targets, which have all the KV, own the heads from the next step on; the sources free theirs.

        Between two steps only, see `settle`. This is where moves are committed, and the only place.
        """
        for part in self.stages:
            part.placement.commit(*(move for move in moves if move.stage == part.number))
        for move in moves:
            self.stages[move.stage].flip(self.running[move.request], move)
            self.num_moved_heads += len(move.heads)

    def is_under_way(self, move: HeadMove) -> bool:
        """It was neither committed nor aborted, and its request has not left."""
        return self.stages[move.stage].placement.is_under_way(move)

    def abort_move(self, move: HeadMove) -> None:
        """The heads stay where they are, and what was copied is dropped. A move that has ended is no error."""
        if self.is_under_way(move):
            self.stages[move.stage].abort(self.running[move.request], move)

    # --- devices

    def lose_device(self, device: int, *, stage: int = 0) -> None:
        """A device is gone: the requests that had heads there are prefilled again, in their order.

        Raises:
            DeviceLostError: it is a primary, without which there is no replica.
        """
        part = self.stages[stage]
        if device < part.stage.num_ranks:
            name = part.stage.devices[device].name
            raise DeviceLostError(name, "the primary is lost, and the replica with it")
        self.settle()
        part.lost.discard(device)
        for move in [move for move in part.placement.moves if move.target != device]:
            if device in self.running[move.request].heads[stage]:
                self.abort_move(move)
        hit = [self.running.pop(number) for number in part.placement.lose(device)]
        for request in sorted(hit, key=lambda r: r.number, reverse=True):
            part.drop_all(request, but=device)
            for other in self.path(request):
                if other is not part:
                    other.release(request)
            request.lose_kv()
            self.waiting.appendleft(request)

    def restore_device(self, index: int, device: AttentionDevice, *, stage: int = 0) -> None:
        """A device with nothing in it takes the place of one that was lost, with as many pages."""
        self.stages[stage].replace_device(index, device)
        self.take_back(index, stage=stage)

    def take_back(self, index: int, *, stage: int = 0) -> None:
        """A device that was lost is there again, with nothing in it, as its stage says: it takes heads again."""
        self.stages[stage].placement.restore(index)
        self.aside = frozenset()  # the next step finds out who still has to wait

    def lose_failed(self) -> None:
        """Loses the devices that failed where nothing could be done about it."""
        for part in self.stages:
            for device in sorted(part.lost):
                self.lose_device(device, stage=part.number)
