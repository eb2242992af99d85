"""Micro-batches, the requests that pass through the pipeline together, and what they hold on copies of stages.

Decoding requests all grow by one token per iteration, so a micro-batch handles requests individually only when they
join, need a new KV block (it counts, by remainder, how many do so in which iteration), or finish: sums are updated at
no cost per request.
"""

from __future__ import annotations

from collections import deque

from hetis.simulator.attention_workers import PoolCopy
from hetis.simulator.kv_memory import KvGrowth, KvRoom
from hetis.simulator.pool_timing import PoolLoad
from hetis.simulator.timing import StageTiming
from hetis.simulator.values import RequestLog


class SimulatedStageCopy:
    """One copy of a stage: its GPUs, the time when they are free, and the KV that they hold.

    Attributes:
        ranks: its GPUs; ``cards``: its attention workers.
        devices: all GPUs with which it fails and shares a link: its ranks, and those of copies that share its experts.
        room: KV blocks of whole requests; None if a pool counts them and the engine's number of blocks is not fixed.
        pool: its attention workers; None: there are none.
        is_up: whether all its devices work.
        free_s: time when its assigned work is done.
        busy_s: seconds of work assigned so far.
    """

    __slots__ = (
        "busy_s", "cards", "devices", "free_s", "is_up", "pool", "ranks", "room", "stage", "timing",
    )  # fmt: skip

    def __init__(
        self, *, ranks: tuple[str, ...], stage: int, timing: StageTiming, room: KvRoom | None,
        pool: PoolCopy | None, cards: tuple[str, ...] = (), devices: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.ranks, self.stage, self.timing = ranks, stage, timing
        self.devices, self.cards = devices or ranks, cards
        self.room, self.pool = room, pool
        self.is_up = True
        self.free_s = self.busy_s = 0.0

    def busy_until(self, now_s: float) -> float:
        """Return the seconds of work done by now; assigned work is done without pauses."""
        return self.busy_s - max(0.0, self.free_s - now_s)


class MicroBatch:
    """One of the M micro-batches of a replica.

    Attributes:
        copies: the copy of each stage on which it runs and which holds its KV.
        step: iterations so far; one is under way unless it is ``idle``.
        decoding: the step at which each decoding request would have had no context, in order of joining: before step k
            it has ``k - decoding[request]`` tokens of KV.
        attended: tokens to which the decoding requests attend in the current step.
        growing: how many of them are within the sliding window.
        phases: number of decoding requests by the step, modulo the tokens of a block, in which they need a new block.
        by_phase: the requests themselves, in order of joining, if there are pools and no window frees KV.
        late_phases: like ``phases``, for requests beyond a window that frees KV, modulo ``late_block_tokens``.
        finishing: by step, requests that may finish at its end (unless they are evicted before).
        leaving_window: by step, requests that reach the sliding window.
        prefilling: requests whose prompt is under way; at most one between iterations.
        ready: requests that are prefilled and wait for a seat.
        reserved: requests whose KV is expected from a prefill replica.
        sending: requests that are prefilled and whose KV is being sent to a decode replica.
        chunk: (request, tokens, whether they are the prompt's last) of the current iteration.
        seconds: time of the current iteration on each stage.
        contents: the current iteration, as arguments of `StageTiming.seconds`.
        rooms: KV blocks of the copies that count blocks of whole requests.
        pools: pools of the other copies, with this micro-batch's load on their devices; ``loads`` is the same by stage.
        only_decodes: whether its next iterations only decode, until something comes from outside the replica.
        alive: False once one of its copies has failed: its remaining scheduled events are void.
    """

    __slots__ = (
        "alive", "attended", "by_phase", "chunk", "contents", "copies", "decoding", "finishing", "growing", "growth",
        "idle", "index", "late_phases", "leaving_window", "loads", "only_decodes", "phases", "pools", "prefilling",
        "ready", "reserved", "rooms", "seconds", "sending", "step",
    )  # fmt: skip

    def __init__(self, index: int, copies: tuple[SimulatedStageCopy, ...], growth: KvGrowth) -> None:
        self.index, self.copies, self.growth = index, copies, growth
        self.step = 0
        self.idle = self.alive = True
        self.only_decodes = False
        self.decoding: dict[int, int] = {}
        self.attended, self.growing = 0.0, 0
        self.phases = [0] * growth.block_tokens
        self.by_phase: list[dict[int, None]] = [{} for _ in self.phases]
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
        """Return how many requests decode here or will."""
        return len(self.decoding) + len(self.ready) + len(self.prefilling) + len(self.reserved)

    def requests(self) -> list[int]:
        """Return all its requests, oldest first, except those whose KV is in transfer between replicas."""
        prefilled = [request for request, _, is_last in self.chunk if is_last]
        return [*self.decoding, *self.ready, *prefilled, *self.prefilling]

    def join(self, request: int, context: int, remaining: int) -> None:
        """Add a request with ``context`` tokens of KV that decodes ``remaining`` >= 1 steps from now on."""
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
        if self.pools and not growth.frees:
            self.by_phase[origin % growth.block_tokens][request] = None

    def leave(self, request: int, context: int) -> None:
        """Remove a decoding request, which now has ``context`` tokens."""
        origin, growth = self.decoding.pop(request), self.growth
        self.attended -= growth.attended(context)
        is_within = origin + growth.window > self.step  # as `cross_windows` has counted it
        self.growing -= is_within
        self._count_blocks(origin, -1, is_within=is_within)
        for pool, load in self.pools:
            if (home := pool.homes.get(request)) is not None:  # None: one of its devices was lost, and the load on it
                load.add([-groups for groups in home], growth.attended(context), grows=is_within)
        if self.pools and not growth.frees:
            del self.by_phase[origin % growth.block_tokens][request]

    def cross_windows(self) -> None:
        """Stop or slow the growth of requests that have reached the sliding window."""
        growth = self.growth
        # A request that left and returned within one step has two entries.
        for request in dict.fromkeys(self.leaving_window.pop(self.step, ())):
            origin = self.decoding.get(request)
            if origin is None or origin + growth.window != self.step:
                continue  # the entry is from an earlier stay
            self.growing -= 1
            for pool, load in self.pools:
                load.stop_growing(pool.homes[request])
            self._count_blocks(origin, -1, is_within=True)
            self._count_blocks(origin, 1, is_within=False)

    def _count_blocks(self, origin: int, change: int, *, is_within: bool) -> None:
        """Add ``change`` (1 or -1) to the count of requests that need a new block at this request's steps."""
        growth = self.growth
        if is_within or not growth.frees:
            self.phases[origin % growth.block_tokens] += change
        elif growth.late_block_tokens:
            self.late_phases[(origin + growth.window) % growth.late_block_tokens] += change

    def crossing(self) -> int:
        """Return how many decoding requests need a new block in the current step."""
        return self.phases[self.step % len(self.phases)] + self.late_phases[self.step % len(self.late_phases)]

    def crossing_in_pools(self) -> list[tuple[int, int]]:
        """Return the decoding requests whose cached tokens need a new block in the current step, and those tokens."""
        step, growth, block = self.step, self.growth, self.growth.block_tokens
        if not growth.frees:
            return [(one, step + 1 - self.decoding[one]) for one in self.by_phase[step % block]]
        contexts = ((one, step - origin) for one, origin in self.decoding.items())
        cached = ((one, growth.cached(context), growth.cached(context + 1)) for one, context in contexts)
        return [(one, after) for one, before, after in cached if after > before and not before % block]

    def growth_of_attended(self) -> float:
        """Return how many more tokens are attended to in every further step."""
        growth = self.growth
        return growth.first_slope * self.growing + growth.slope * (len(self.decoding) - self.growing)

    def grow(self) -> None:
        """Extend every decoding request's attention by one token."""
        growth = self.growth
        self.attended += self.growth_of_attended()
        for _, load in self.pools:
            load.grow(growth)


class Holdings:
    """Takes and frees blocks on all copies on which a micro-batch runs, or on none of them.

    Copies without a pool count blocks of whole requests (`KvRoom`). Copies with a pool use dispatch (`PoolCopy`), which
    takes all blocks of a prompt at once; they also count whole requests if the engine's number of blocks is fixed.
    """

    def __init__(self, log: RequestLog, growth: KvGrowth) -> None:
        self._log, self._growth = log, growth

    def promise(self, batch: MicroBatch, request: int, spare: int) -> bool:
        """Reserve blocks for a prompt, with ``spare`` left free on every copy that holds anything; False: no room."""
        target = self._log.target[request]
        blocks = self._growth.blocks(target)
        for room in batch.rooms:
            if not room.admits(blocks, spare):
                return False
        for number, (pool, load) in enumerate(batch.pools):
            if not pool.place(load, request, self._growth.cached(target)):
                for other, _ in batch.pools[:number]:
                    other.remove(request)
                return False
        for room in batch.rooms:
            room.promised += blocks
        return True

    def fill(self, batch: MicroBatch, filled: int, tokens: int) -> bool:
        """Use promised blocks for ``tokens`` more of a prompt; False if the growth of other requests has used them."""
        blocks = self._growth.blocks(filled + tokens) - self._growth.blocks(filled)
        if not blocks:
            return True
        for room in batch.rooms:
            if room.used + blocks > room.total:
                return False
        for room in batch.rooms:
            room.used += blocks
            room.promised -= blocks
        return True

    def grow(self, batch: MicroBatch, blocks: int) -> bool:
        """Take this number of blocks for decoding requests; False if any copy has too few."""
        for room in batch.rooms:
            if room.used + blocks > room.total:
                return False
        for room in batch.rooms:
            room.used += blocks
        return True

    def release(self, batch: MicroBatch, request: int, context: int, *, extra_blocks: int = 0) -> None:
        """Free the blocks of a request with ``context`` tokens, and those still promised to its prompt."""
        growth, target = self._growth, self._log.target[request]
        blocks = growth.blocks(context) + extra_blocks
        promised = growth.blocks(target) - growth.blocks(context) if context < target else 0
        for room in batch.rooms:
            room.used -= blocks
            room.promised -= promised
        for pool, _ in batch.pools:
            pool.remove(request)
