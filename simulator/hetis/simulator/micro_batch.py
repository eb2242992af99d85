"""A micro-batch: the requests that pass through the pipeline together, with sums updated at no cost per request.

Decoding requests all grow by one token per iteration, so that a micro-batch processes single ones only when they join,
need a new KV block (it counts, by remainder, how many do so in which iteration), or finish.
"""

from __future__ import annotations

from collections import deque

from hetis.simulator.attention_workers import PoolCopy
from hetis.simulator.growth import KvGrowth
from hetis.simulator.memory import KvRoom
from hetis.simulator.pool_load import PoolLoad
from hetis.simulator.timing import StageTiming


class SimulatedStageCopy:
    """One copy of a stage: its GPUs, the time when they are free, and the KV that they hold.

    Attributes:
        track: its name in a trace.
        devices: its ranks; ``cards``: its attention workers.
        room: KV blocks of whole requests; None if a pool counts them and the engine has as many as there is memory for.
        pool: its attention workers; None: it has none.
        is_up: no device of it has failed.
        free_s: time when its assigned work is done.
        busy_s: seconds of work assigned so far.
        waiting, serving: micro-batches, if they are not kept apart.
    """

    __slots__ = (
        "busy_s", "cards", "devices", "free_s", "is_up", "pool", "room", "serving", "stage", "timing", "track",
        "waiting",
    )  # fmt: skip

    def __init__(
        self, *, track: str, devices: tuple[str, ...], stage: int, timing: StageTiming, room: KvRoom | None,
        pool: PoolCopy | None, cards: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.track, self.devices, self.stage, self.timing = track, devices, stage, timing
        self.cards = cards
        self.room, self.pool = room, pool
        self.is_up = True
        self.free_s = self.busy_s = 0.0
        self.waiting: list[MicroBatch] = []
        self.serving: list[MicroBatch] = []

    def busy_until(self, now_s: float) -> float:
        """Return the seconds of work done up to now: assigned work is done without a pause."""
        return self.busy_s - max(0.0, self.free_s - now_s)


class MicroBatch:
    """One of the M micro-batches of a replica.

    Attributes:
        copies: the copy of every stage on which it runs and which holds its KV.
        step: iterations so far; one is under way while it is not ``idle``.
        decoding: each decoding request, in order of joining, and the step at which it would have had no context: before
            step k it has ``k - decoding[request]`` tokens of KV.
        attended: tokens to which they attend in the present step.
        growing: how many of them are within the sliding window.
        phases: decoding requests by the step, modulo the tokens of a block, in which they need a new block.
        late_phases: the same of requests beyond a window that frees KV, modulo their tokens for a block.
        finishing: by step, requests that may finish at its end (they may have been evicted meanwhile).
        leaving_window: by step, requests that reach the sliding window.
        prefilling: the request whose prompt is under way; none or one between iterations.
        ready: requests that are prefilled and wait for a seat.
        reserved: requests whose KV is expected from a prefill replica.
        sending: requests that are prefilled and whose KV is being sent to a decode replica.
        chunk: (request, tokens, whether that is its last) of the present iteration.
        seconds: time of the present iteration on every stage.
        contents: the present iteration, as the arguments of `StageTiming.seconds`.
        rooms: KV blocks of the copies that count those of whole requests.
        pools: pools of the others, with this micro-batch's load on their devices; ``loads`` is the same by stage.
        alive: False once a copy of it failed: its remaining scheduled events are void.
    """

    __slots__ = (
        "alive", "attended", "chunk", "contents", "copies", "decoding", "finishing", "growing", "growth", "idle",
        "index", "late_phases", "leaving_window", "loads", "phases", "pools", "prefilling", "ready", "reserved",
        "rooms", "seconds", "sending", "step",
    )  # fmt: skip

    def __init__(self, index: int, copies: tuple[SimulatedStageCopy, ...], growth: KvGrowth) -> None:
        self.index, self.copies, self.growth = index, copies, growth
        self.step = 0
        self.idle = self.alive = True
        self.decoding: dict[int, int] = {}
        self.attended, self.growing = 0.0, 0
        self.phases = [0] * growth.block_tokens
        self.late_phases = [0] * max(1, growth.late_block_tokens)
        self.finishing: dict[int, list[int]] = {}
        self.leaving_window: dict[int, list[int]] = {}
        self.prefilling: deque[int] = deque()
        self.ready: deque[int] = deque()
        self.reserved: set[int] = set()
        self.sending: set[int] = set()
        self.chunk: list[tuple[int, int, bool]] = []
        self.seconds: list[float] = []
        self.contents: tuple[int, float, int, float, float, int] = (0, 0.0, 0, 0.0, 0.0, 0)
        self.rooms: tuple[KvRoom, ...] = tuple(copy.room for copy in copies if copy.room is not None)
        self.loads = {copy.stage: PoolLoad(copy.pool.num_devices) for copy in copies if copy.pool is not None}
        self.pools: tuple[tuple[PoolCopy, PoolLoad], ...] = tuple(
            (copy.pool, self.loads[copy.stage]) for copy in copies if copy.pool is not None
        )

    def seats_taken(self) -> int:
        """Return the requests that decode here or will."""
        return len(self.decoding) + len(self.ready) + len(self.prefilling) + len(self.reserved)

    def requests(self) -> list[int]:
        """Return all its requests, oldest first; not those whose KV moves from one replica to another."""
        prefilled = [request for request, _, is_last in self.chunk if is_last]
        return [*self.decoding, *self.ready, *prefilled, *self.prefilling]

    def join(self, request: int, context: int, remaining: int) -> None:
        """Add a request with ``context`` tokens of KV that decodes ``remaining`` >= 1 steps from the present one on."""
        step, growth = self.step, self.growth
        origin = self.decoding[request] = step - context
        self.finishing.setdefault(step + remaining - 1, []).append(request)
        self.attended += growth.attended(context)
        self._count_blocks(origin, 1, is_within=context < growth.window)
        if context < growth.window:
            self.growing += 1
            if context + remaining > growth.window:
                self.leaving_window.setdefault(origin + growth.window, []).append(request)
        for pool, load in self.pools:
            load.add(pool.homes[request], growth.attended(context), grows=context < growth.window)

    def leave(self, request: int, context: int) -> None:
        """Remove a decoding request, which has ``context`` tokens by now."""
        origin, growth = self.decoding.pop(request), self.growth
        self.attended -= growth.attended(context)
        is_within = origin + growth.window > self.step  # as `cross_windows` has counted it
        self.growing -= is_within
        self._count_blocks(origin, -1, is_within=is_within)
        for pool, load in self.pools:
            if (home := pool.homes.get(request)) is not None:  # None: a device of it was lost, with its share
                load.add(-home, growth.attended(context), grows=is_within)

    def cross_windows(self) -> None:
        """Stop or slow the growth of requests that have reached the sliding window."""
        growth = self.growth
        for request in self.leaving_window.pop(self.step, ()):
            origin = self.decoding.get(request)
            if origin is None or origin + growth.window != self.step:
                continue  # the entry is of an earlier stay
            self.growing -= 1
            for pool, load in self.pools:
                load.growing -= pool.homes[request]
            self._count_blocks(origin, -1, is_within=True)
            self._count_blocks(origin, 1, is_within=False)

    def _count_blocks(self, origin: int, change: int, *, is_within: bool) -> None:
        """Count a request among those that need a new block from time to time, or no longer (-1)."""
        growth = self.growth
        if is_within or not growth.frees:
            self.phases[origin % growth.block_tokens] += change
        elif growth.late_block_tokens:
            self.late_phases[(origin + growth.window) % growth.late_block_tokens] += change

    def crossing(self) -> int:
        """Return the decoding requests that need a new block in the present step."""
        return self.phases[self.step % len(self.phases)] + self.late_phases[self.step % len(self.late_phases)]

    def grow(self) -> None:
        """Let every decoding request attend to one more token."""
        growth = self.growth
        self.attended += growth.first_slope * self.growing + growth.slope * (len(self.decoding) - self.growing)
        for _, load in self.pools:
            load.grow(growth)
