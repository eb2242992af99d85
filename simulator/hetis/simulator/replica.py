"""One replica: continuous batching with chunked prefill in micro-batches, on a limited number of KV blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hetis.simulator.kv_memory import KvGrowth
from hetis.simulator.micro_batch import Discipline, MicroBatch, SimulatedStageCopy
from hetis.simulator.values import RequestLog


class Holdings:
    """Takes and frees blocks on all copies that a micro-batch runs on, or on none.

    Copies without a pool count blocks of whole requests (`KvRoom`); those with a pool use dispatch (`PoolCopy`), which
    takes the blocks of a prompt at once, and count them too if the engine's number of blocks is set.
    """

    def __init__(self, log: RequestLog, growth: KvGrowth) -> None:
        self._log, self._growth = log, growth

    def promise(self, batch: MicroBatch, request: int, spare: int) -> bool:
        """Reserve blocks for a prompt; ``spare`` stay free on every copy that holds anything. False: no room."""
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
        """Take promised blocks for ``tokens`` more of a prompt; False: growth of other requests has used them."""
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
        """Take this number of blocks for requests that decode; False: some copy has too few."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """The composition of a replica's iterations."""

    micro_batch: int  # most decoding requests in one micro-batch; 0 for a prefill replica
    in_flight: int  # number of micro-batches
    chunk_tokens: int  # most prompt tokens in an iteration, of one prompt or several; 0 for a decode replica
    # prompts of a micro-batch that may be under way, or done and waiting, beyond its seats. As many as finish while a
    # prompt is prefilled, so that as many requests decode as the plan assumes.
    ahead: int
    # requests of a micro-batch for each of which a block stays free when another one starts; None: as many as it has
    # seats
    growing: int | None = None


class Outside:
    """The interface of the fleet that a replica uses; this base class is for a replica alone."""

    def pull(self, now_s: float) -> int | None:
        """Return the next request of a source that always has one."""
        return None

    def may_start(self, now_s: float, replica: ReplicaRun, request: int) -> bool:
        """Return whether a prompt has a place to decode when it is done."""
        return True

    def take_prompt(self, now_s: float, replica: ReplicaRun, batch: MicroBatch, request: int) -> bool:
        """Take a finished prompt to another replica; False: it decodes on the same replica."""
        return False

    def has_room(self, now_s: float, replica: ReplicaRun) -> None:
        """Note that a replica has free room again."""

    def requeue(self, now_s: float, replica: ReplicaRun, request: int) -> None:
        """Let an evicted request wait again, before the others."""
        replica.outstanding += 1
        replica.queue.appendleft(request)


class ReplicaRun:
    """A replica at work.

    Attributes:
        rate: requests/s that the plan assigns to it; for a prefill replica the rate of its routes, which may be 0.
    """

    def __init__(
        self, number: int, *, rate: float, batching: Batching, growth: KvGrowth, log: RequestLog,
        stages: Sequence[Sequence[SimulatedStageCopy]],
    ) -> None:  # fmt: skip
        self.number, self.rate, self.batching, self.growth, self.log = number, rate, batching, growth, log
        self.stages = tuple(tuple(copies) for copies in stages)  # the copies of every stage
        self.queue: deque[int] = deque()  # requests that wait for their prompt to begin
        self.outstanding = 0  # requests given to it that are not done, including those that wait
        self.is_up = True  # every stage has a copy that is up
        self.discipline: Discipline
        self.outside = Outside()
        self.kv = Holdings(log, growth)
        self._block_tokens = growth.block_tokens
        self._takes_prompts = batching.chunk_tokens > 0
        self._most_seats = batching.micro_batch + batching.ahead  # of a micro-batch, waiting ones included
        # The next block of every request that decodes on the most crowded copy.
        copies = min(len(copies) for copies in self.stages)
        growing = batching.micro_batch if batching.growing is None else batching.growing
        self._spare = -(-batching.in_flight // copies) * growing
        self.batches = [self.new_batch(index) for index in range(batching.in_flight)]  # its micro-batches
        self._idle = set(range(batching.in_flight))

    @property
    def decodes(self) -> bool:
        """Return whether its requests stay to decode; a prefill replica's are handed over."""
        return self.batching.micro_batch > 0

    def waiting_tokens(self) -> int:
        """Return the prompt tokens of the requests given to it that are not prefilled yet."""
        log, under_way = self.log, (request for batch in self.batches for request in batch.prefilling)
        return sum(log.target[request] - log.begun(request) for request in (*self.queue, *under_way))

    def seats_taken(self) -> int:
        """Return the requests that decode here, and those being sent here."""
        return sum(batch.seats_taken() for batch in self.batches)

    def new_batch(self, index: int) -> MicroBatch:
        """Return an empty micro-batch on one copy of every stage, of those that are up: they are distributed evenly."""
        up = [[copy for copy in copies if copy.is_up] or copies for copies in self.stages]
        return MicroBatch(index, tuple(copies[index % len(copies)] for copies in up), self.growth)

    # --- arrivals

    def offer(self, now_s: float, request: int) -> None:
        """Let a request wait here from now on."""
        self._take(request)
        self.queue.append(request)
        self.wake(now_s)

    def wake(self, now_s: float) -> None:
        """Let idle micro-batches check again for work."""
        if self._idle:
            for index in sorted(self._idle):
                if index in self._idle:
                    self.form(now_s, self.batches[index])

    def set_idle(self, batch: MicroBatch) -> None:
        """Mark a micro-batch as without an iteration under way."""
        batch.idle = True
        self._idle.add(batch.index)

    def expect(self, request: int) -> MicroBatch | None:
        """Reserve a seat and blocks for a request that is prefilled elsewhere; None: there is no room."""
        for batch in sorted(self.batches, key=MicroBatch.seats_taken):
            if batch.seats_taken() >= self._most_seats:
                return None
            if self.kv.promise(batch, request, self._spare):
                if self.kv.fill(batch, 0, self.log.target[request]):
                    batch.reserved.add(request)
                    return batch
                self.kv.release(batch, request, 0)
        return None

    def land(self, now_s: float, batch: MicroBatch, request: int) -> None:
        """Receive the KV of an expected request."""
        batch.reserved.discard(request)
        batch.ready.append(request)
        self._take(request)
        if batch.idle:
            self.form(now_s, batch)

    def _take(self, request: int) -> None:
        self.log.replica[request] = self.number
        self.outstanding += 1

    # --- an iteration

    def form(self, now_s: float, batch: MicroBatch) -> None:
        """Fill the next iteration of a micro-batch and start it; without work the micro-batch is idle."""
        if not self.is_up:
            return
        batch.step += 1
        if batch.leaving_window:
            batch.cross_windows()
        decoding, ready, log = batch.decoding, batch.ready, self.log
        while ready and len(decoding) < self.batching.micro_batch:
            request = ready.popleft()
            batch.join(request, log.target[request], log.output[request] - log.produced[request])
        if decoding:
            self._grow(now_s, batch)
        tokens, pairs, read, last = 0, 0.0, 0.0, 0
        if self._takes_prompts and (batch.prefilling or len(decoding) + len(ready) < self._most_seats):
            batch.chunk = self._chunk(now_s, batch)
            for request, part, is_last in batch.chunk:
                attended = self.growth.attended(log.filled[request] - part + (part + 1) / 2)
                tokens += part
                pairs += part * attended
                read += attended + part / 2
                last += is_last
        num = len(decoding)
        if not num and not tokens:
            self.set_idle(batch)
            return
        if batch.idle:
            batch.idle = False
            self._idle.discard(batch.index)
        batch.contents = (num, batch.attended, tokens, pairs, read, num + last)
        log.iterations += 1
        log.prefilled += tokens
        self.discipline.start(now_s, batch)

    def done(self, now_s: float, batch: MicroBatch) -> None:
        """Complete an iteration that has left the last stage: tokens are out, some requests are finished."""
        log, chunk = self.log, batch.chunk
        has_freed = False
        if chunk:
            batch.chunk = []
            for request, _, is_last in chunk:
                if is_last:
                    has_freed |= self._prefilled(now_s, batch, request)
        finishing = batch.finishing.pop(batch.step, None)
        if finishing:
            for request in finishing:
                origin = batch.decoding.get(request)
                context = 0 if origin is None else batch.step + 1 - origin
                # An entry may be from an earlier stay.
                if context == log.prompt[request] + log.output[request] - 1:
                    batch.leave(request, context)
                    log.produced[request] = log.output[request]
                    self._finish(now_s, batch, request, context)
                    has_freed = True
        for pool, load in batch.pools:
            pool.look(now_s, batch, load)
        self.form(now_s, batch)
        if has_freed:
            self.wake(now_s)
            self.outside.has_room(now_s, self)

    def _prefilled(self, now_s: float, batch: MicroBatch, request: int) -> bool:
        """Complete a prompt, which makes one token; return whether that finishes the request."""
        log = self.log
        log.produced[request] += 1
        if log.produced[request] == 1:
            log.first_token_s[request] = now_s
        if log.produced[request] == log.output[request]:
            self._finish(now_s, batch, request, log.target[request])
            return True
        if not self.outside.take_prompt(now_s, self, batch, request):
            batch.ready.append(request)
        return False

    def _finish(self, now_s: float, batch: MicroBatch, request: int, context: int) -> None:
        self.log.finished_s[request] = now_s
        self.outstanding -= 1
        self.kv.release(batch, request, context)

    # --- prompts

    def _chunk(self, now_s: float, batch: MicroBatch) -> list[tuple[int, int, bool]]:
        """Return the prompt tokens of the next iteration: the current prompt, then new ones within tokens and seats."""
        log, budget = self.log, self.batching.chunk_tokens
        chunk = list[tuple[int, int, bool]]()
        seats = self._most_seats - batch.seats_taken()
        while budget:
            if not batch.prefilling:
                request = self._admitted(now_s, batch) if seats > 0 else None
                if request is None:
                    break
                seats -= 1
                batch.prefilling.append(request)
            request = batch.prefilling[0]
            filled, begun = log.filled[request], log.begun(request)
            tokens = min(budget, log.target[request] - begun)
            # Blocks of the prefix cache are taken with the first chunk: they count for every request that shares them.
            if not self.kv.fill(batch, filled, begun - filled + tokens):
                # Growth of others has used its promised blocks. It waits, but is evicted if nothing else can continue.
                if not chunk and not batch.decoding:
                    self._evict(now_s, batch, request)
                break
            log.filled[request] = begun + tokens
            budget -= tokens
            is_last = begun + tokens == log.target[request]
            chunk.append((request, tokens, is_last))
            if is_last:
                batch.prefilling.popleft()
        return chunk

    def _admitted(self, now_s: float, batch: MicroBatch) -> int | None:
        """Return the next request in the queue, if the copies of this micro-batch have room for it."""
        queue, outside = self.queue, self.outside
        while True:
            if not queue:
                pulled = outside.pull(now_s)
                if pulled is None:
                    return None
                self._take(pulled)
                queue.append(pulled)
            request = queue[0]
            if self.kv.promise(batch, request, self._spare):
                if outside.may_start(now_s, self, request):
                    break
                self.kv.release(batch, request, 0)
                return None
            if not self.is_empty() or not self._is_whole():
                return None
            queue.popleft()  # it does not fit even in an empty replica
            self.outstanding -= 1
            self.log.reject(request)
        queue.popleft()
        if self.log.preemptions[request] == 0:
            self.log.admitted_s[request] = now_s
        return request

    def is_empty(self) -> bool:
        """Return whether no request holds a block."""
        copies = [copy for copies in self.stages for copy in copies]
        rooms_are = all(copy.room is None or copy.room.used == copy.room.promised == 0 for copy in copies)
        return rooms_are and all(copy.pool is None or not copy.pool.homes for copy in copies)

    def _is_whole(self) -> bool:
        copies = [copy for copies in self.stages for copy in copies]
        return all(copy.is_up and (copy.pool is None or copy.pool.is_whole) for copy in copies)

    # --- growth and eviction

    def _grow(self, now_s: float, batch: MicroBatch) -> None:
        """Let every decoding request cache one more token; if blocks run out, the latest requests are evicted."""
        while (crossing := batch.crossing()) and not self.kv.grow(batch, crossing):
            self._evict(now_s, batch, batch.requests()[-1])
        if batch.pools:
            self._grow_in_pools(now_s, batch)
        batch.grow()

    def _grow_in_pools(self, now_s: float, batch: MicroBatch) -> None:
        step, growth = batch.step, self.growth
        cached = batch.crossing_in_pools()
        stalled = [request for pool, _ in batch.pools for request in pool.grow(cached)] if cached else []
        for request in dict.fromkeys(stalled):
            # Copies without a pool have counted the block that it would have crossed into.
            context = step - batch.decoding[request]
            crossed = growth.blocks(context + 1) - growth.blocks(context)
            self._evict(now_s, batch, request, extra_blocks=crossed)

    def _evict(self, now_s: float, batch: MicroBatch, request: int, *, extra_blocks: int = 0) -> None:
        """Remove a request between two iterations; it is prefilled again, before those that wait."""
        self._drop(batch, request, written=0, extra_blocks=extra_blocks)
        self.outside.requeue(now_s, self, request)

    def lose(self, now_s: float, batch: MicroBatch, request: int) -> None:
        """Remove a request whose KV is lost; the iteration under way makes no token of it."""
        self._drop(batch, request, written=1)
        self.outside.requeue(now_s, self, request)

    def _drop(self, batch: MicroBatch, request: int, *, written: int, extra_blocks: int = 0) -> None:
        """Remove a request; ``written`` tokens of a decoding one are in KV but have not led to an output token."""
        log = self.log
        origin = batch.decoding.get(request)
        if origin is not None:
            context = batch.step - origin + written
            log.produced[request] += context - written - log.target[request]
            batch.leave(request, context)
        else:
            context = log.filled[request]
            batch.chunk = [part for part in batch.chunk if part[0] != request]
            for line in (batch.prefilling, batch.ready):
                if request in line:
                    line.remove(request)
        self.kv.release(batch, request, context, extra_blocks=extra_blocks)
        self.outstanding -= 1
        log.evict(request)
