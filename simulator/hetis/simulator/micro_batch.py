"""Micro-batches, the requests that pass through the pipeline together, and the order in which they use copies of
stages.

Decoding requests all grow by one token per iteration, so a micro-batch handles requests individually only when they
join, need a new KV block (it counts, by remainder, how many do so in which iteration), or finish: sums are updated at
no cost per request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hetis.simulator.attention_workers import PoolCopy, PoolLoad
from hetis.simulator.events import Events
from hetis.simulator.kv_memory import KvGrowth, KvRoom
from hetis.simulator.timing import StageTiming
from hetis.simulator.values import RequestLog, TraceEvent


class SimulatedStageCopy:
    """One copy of a stage: its GPUs, the time when they are free, and the KV that they hold.

    Attributes:
        track: its name in a trace.
        ranks: its GPUs; ``cards``: its attention workers.
        devices: all GPUs with which it fails and shares a link: its ranks, and those of copies that share its experts.
        room: KV blocks of whole requests; None if a pool counts them and the engine's number of blocks is not fixed.
        pool: its attention workers; None: there are none.
        is_up: whether all its devices work.
        free_s: time when its assigned work is done.
        busy_s: seconds of work assigned so far.
        waiting, serving: micro-batches that wait or run, unless they are kept apart.
    """

    __slots__ = (
        "busy_s", "cards", "devices", "free_s", "is_up", "pool", "ranks", "room", "serving", "stage", "timing", "track",
        "waiting",
    )  # fmt: skip

    def __init__(
        self, *, track: str, ranks: tuple[str, ...], stage: int, timing: StageTiming, room: KvRoom | None,
        pool: PoolCopy | None, cards: tuple[str, ...] = (), devices: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.track, self.ranks, self.stage, self.timing = track, ranks, stage, timing
        self.devices, self.cards = devices or ranks, cards
        self.room, self.pool = room, pool
        self.is_up = True
        self.free_s = self.busy_s = 0.0
        self.waiting: list[MicroBatch] = []
        self.serving: list[MicroBatch] = []

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
        alive: False once one of its copies has failed: its remaining scheduled events are void.
    """

    __slots__ = (
        "alive", "attended", "by_phase", "chunk", "contents", "copies", "decoding", "finishing", "growing", "growth",
        "idle", "index", "late_phases", "leaving_window", "loads", "phases", "pools", "prefilling", "ready", "reserved",
        "rooms", "seconds", "sending", "step",
    )  # fmt: skip

    def __init__(self, index: int, copies: tuple[SimulatedStageCopy, ...], growth: KvGrowth) -> None:
        self.index, self.copies, self.growth = index, copies, growth
        self.step = 0
        self.idle = self.alive = True
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

    def grow(self) -> None:
        """Extend every decoding request's attention by one token."""
        growth = self.growth
        self.attended += growth.first_slope * self.growing + growth.slope * (len(self.decoding) - self.growing)
        for _, load in self.pools:
            load.grow(growth)


Done = Callable[[float, MicroBatch], None]


class Discipline:
    """The order in which a replica's micro-batches pass through its stages.

    Attributes:
        keeps_order: whether iterations leave every stage in the order in which they were started, so that chunks of a
            prompt may follow each other through the pipeline.
    """

    keeps_order = False

    def __init__(self, events: Events, log: RequestLog, done: Done, *, traced: bool) -> None:
        self._events, self._log, self._done, self._traced = events, log, done, traced

    def start(self, now_s: float, batch: MicroBatch) -> None:
        """Send an iteration, given by the batch's ``contents``, to the first stage."""
        raise NotImplementedError


class Apart(Discipline):
    """The discipline that keeps micro-batches separate; a copy serves them in order of arrival.

    The time when a copy is free is therefore its only state, and a visit to a stage is a single event. Where every
    stage has one copy, iterations arrive everywhere in the order in which they start, so that the whole pass is one
    event, if nothing looks at copies (``passes_at_once``) or shares their cards in the meantime.
    """

    keeps_order = True

    def __init__(
        self, events: Events, log: RequestLog, done: Done, *, traced: bool, passes_at_once: bool = False
    ) -> None:
        super().__init__(events, log, done, traced=traced)
        self._passes_at_once = passes_at_once and not traced

    def start(self, now_s: float, batch: MicroBatch) -> None:
        decoding, attended, tokens, pairs, read, rows = batch.contents
        batch.seconds = seconds = list[float]()
        before: StageTiming | None = None
        for copy in batch.copies:
            if copy.timing is before:  # as equal stages have
                seconds.append(seconds[-1])
            else:
                before = copy.timing
                seconds.append(before.seconds(decoding, attended, tokens, pairs, read, rows))
        if batch.pools:
            for stage, load in batch.loads.items():
                pool = batch.copies[stage].pool
                assert pool is not None
                beside_s = batch.copies[stage].timing.beside_layers_s(decoding + tokens, rows)
                batch.seconds[stage] += pool.seconds([load], [batch], batch.seconds[stage] - beside_s)
        if self._passes_at_once:
            end_s = now_s
            for copy, stage_s in zip(batch.copies, batch.seconds, strict=True):
                end_s = (copy.free_s if copy.free_s > end_s else end_s) + stage_s
                copy.free_s = end_s
                copy.busy_s += stage_s
            self._events.at(end_s, self._done, batch)
        else:
            self._arrive(now_s, batch, 0)

    def _arrive(self, now_s: float, batch: MicroBatch, stage: int) -> None:
        if not batch.alive:
            return
        copies = batch.copies
        if stage == len(copies):
            self._done(now_s, batch)
            return
        copy = copies[stage]
        start_s = copy.free_s if copy.free_s > now_s else now_s
        seconds = batch.seconds[stage]
        end_s = start_s + seconds
        if copy.pool is not None and copy.pool.is_shared:
            end_s = copy.pool.after_others(start_s, end_s, [batch.loads[stage]])
            seconds = end_s - start_s
        copy.free_s = end_s
        copy.busy_s += seconds
        if self._traced:
            self._log.trace_events.append(_bar(copy, [batch], start_s, seconds))
        self._events.at(end_s, self._arrive, batch, stage + 1)


class Greedy(Discipline):
    """The discipline in which a copy takes all waiting micro-batches at once; they leave and stay together."""

    def start(self, now_s: float, batch: MicroBatch) -> None:
        self._arrive(now_s, batch, 0)

    def _arrive(self, now_s: float, batch: MicroBatch, stage: int) -> None:
        copy = batch.copies[stage]
        copy.waiting.append(batch)
        if not copy.serving:
            # Serve in a separate event, to include others that arrive at the same time.
            copy.serving = copy.waiting
            self._events.at(now_s, self._serve, copy)

    def _serve(self, now_s: float, copy: SimulatedStageCopy) -> None:
        copy.serving, copy.waiting = [batch for batch in copy.waiting if batch.alive], []
        if not copy.serving:
            return
        parts = [batch.contents for batch in copy.serving]
        together = parts[0] if len(parts) == 1 else tuple(map(sum, zip(*parts, strict=True)))
        seconds = copy.timing.seconds(*together)
        if copy.pool is not None:
            decoding, _, tokens, _, _, rows = together
            layers_s = seconds - copy.timing.beside_layers_s(decoding + tokens, rows)
            loads = [batch.loads[copy.stage] for batch in copy.serving]
            seconds += copy.pool.seconds(loads, copy.serving, layers_s)
            if copy.pool.is_shared:
                seconds = copy.pool.after_others(now_s, now_s + seconds, loads) - now_s
        copy.free_s = now_s + seconds
        copy.busy_s += seconds
        if self._traced:
            self._log.trace_events.append(_bar(copy, copy.serving, now_s, seconds))
        self._events.at(copy.free_s, self._leave, copy)

    def _leave(self, now_s: float, copy: SimulatedStageCopy) -> None:
        served, copy.serving = copy.serving, []
        if copy.waiting:
            copy.serving = copy.waiting
            self._events.at(now_s, self._serve, copy)
        for batch in served:
            if not batch.alive:
                continue
            if copy.stage + 1 < len(batch.copies):
                self._arrive(now_s, batch, copy.stage + 1)
            else:
                self._done(now_s, batch)


class Lockstep(Discipline):
    """The discipline of copies that share experts: those with work iterate together, all as long as the slowest."""

    def __init__(self, events: Events, log: RequestLog, done: Done, *, traced: bool) -> None:
        super().__init__(events, log, done, traced=traced)
        self._waiting, self._serving = list[MicroBatch](), list[MicroBatch]()

    def start(self, now_s: float, batch: MicroBatch) -> None:
        self._waiting.append(batch)
        self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        if self._waiting and not self._serving:
            self._serving = self._waiting
            self._events.at(now_s, self._serve)  # in a separate event, to include others that start at the same time

    def _serve(self, now_s: float) -> None:
        self._serving, self._waiting = [batch for batch in self._waiting if batch.alive], []
        if not self._serving:
            return
        timings = [batch.copies[0].timing for batch in self._serving]
        tokens = [timing.tokens(batch.contents) for timing, batch in zip(timings, self._serving, strict=True)]
        together = sum(tokens)
        seconds = max(
            timing.seconds(*batch.contents, together - own)
            for timing, batch, own in zip(timings, self._serving, tokens, strict=True)
        )
        for batch in self._serving:
            copy = batch.copies[0]
            copy.free_s = now_s + seconds
            copy.busy_s += seconds
            if self._traced:
                self._log.trace_events.append(_bar(copy, [batch], now_s, seconds))
        self._events.at(now_s + seconds, self._leave)

    def _leave(self, now_s: float) -> None:
        served, self._serving = self._serving, []
        for batch in served:
            if batch.alive:
                self._done(now_s, batch)
        self._begin(now_s)  # for micro-batches that have arrived meanwhile, if none of the served ones goes on


def _bar(copy: SimulatedStageCopy, batches: list[MicroBatch], start_s: float, seconds: float) -> TraceEvent:
    decoding = sum(batch.contents[0] for batch in batches)
    chunk = sum(batch.contents[2] for batch in batches)
    names = "+".join(str(batch.index) for batch in batches)
    arguments = (("decoding", float(decoding)), ("chunk_tokens", float(chunk)))
    return TraceEvent(copy.track, f"micro-batch {names}", start_s, seconds, arguments)
