"""One replica: continuous batching with chunked prefill in micro-batches, with a limited number of KV blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hetis.simulator.disciplines import Discipline
from hetis.simulator.kv_memory import KvGrowth
from hetis.simulator.micro_batch import Holdings, MicroBatch, SimulatedStageCopy
from hetis.simulator.values import RequestLog

NO_LIMIT = 1 << 40  # blocks, or tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """The limits that define a replica's iterations."""

    micro_batch: int  # maximum decoding requests in one micro-batch; 0 for a prefill replica
    in_flight: int  # number of micro-batches
    chunk_tokens: int  # maximum prompt tokens in an iteration, from one prompt or several; 0 for a decode replica
    # Prompts of a micro-batch that may be under way, or prefilled and waiting, beyond its seats: as many as finish
    # while a prompt is prefilled, so that as many requests decode as the plan assumes.
    ahead: int
    # Requests of a micro-batch for each of which a block stays free when another one starts. None: as many as it has
    # seats.
    growing: int | None = None


class Outside:
    """What a replica calls in the fleet; this base class is for a replica on its own."""

    always_has_requests = False  # whether `pull` may return any

    def pull(self, now_s: float) -> int | None:
        """Return the next request of a source that always has one."""
        return None

    def may_start(self, now_s: float, replica: ReplicaRun, request: int) -> bool:
        """Return whether a place to decode is available for a prompt when it is done."""
        return True

    def take_prompt(self, now_s: float, replica: ReplicaRun, batch: MicroBatch, request: int) -> bool:
        """Hand a finished prompt over to another replica; False: it decodes on the same replica."""
        return False

    def is_too_long(self, replica: ReplicaRun, request: int) -> bool:
        """Return whether a request can never start here, because nowhere is room for it to decode."""
        return False

    def refuse(self, now_s: float, replica: ReplicaRun, request: int) -> None:
        """Take back a request that the replica can never hold."""
        replica.log.reject(request)

    def has_room(self, now_s: float, replica: ReplicaRun) -> None:
        """React to a replica that has free room again."""

    def requeue(self, now_s: float, replica: ReplicaRun, request: int) -> None:
        """Return an evicted request to the head of the queue."""
        replica.outstanding += 1
        replica.queue.appendleft(request)


class ReplicaRun:
    """A running replica.

    Attributes:
        rate: requests/s that the plan assigns to it, as if its pool served all; for a prefill replica the rate of its
            routes, which may be 0.
        most_tokens: the most tokens of KV that a request may have here, alone and with no device lost.
    """

    def __init__(
        self, number: int, *, rate: float, batching: Batching, growth: KvGrowth, log: RequestLog,
        stages: Sequence[Sequence[SimulatedStageCopy]],
    ) -> None:  # fmt: skip
        self.number, self.rate, self.batching, self.growth, self.log = number, rate, batching, growth, log
        self.stages = tuple(tuple(copies) for copies in stages)  # copies of each stage
        self.queue: deque[int] = deque()  # requests whose prompt has not begun
        self.outstanding = 0  # unfinished requests assigned to it, including waiting ones
        self.is_up = True  # whether every stage has a copy that is up
        self.discipline: Discipline
        self.outside = Outside()
        self.kv = Holdings(log, growth)
        self._block_tokens = growth.block_tokens
        self._takes_prompts = batching.chunk_tokens > 0
        self._most_seats = batching.micro_batch + batching.ahead  # per micro-batch, including waiting requests
        # One block for every request that decodes on the most crowded copy.
        copies = min(len(copies) for copies in self.stages)
        growing = batching.micro_batch if batching.growing is None else batching.growing
        self._spare = -(-batching.in_flight // copies) * growing
        self.batches = [self.new_batch(index) for index in range(batching.in_flight)]
        self._idle = set(range(batching.in_flight))
        self.most_tokens = self._most_tokens()

    def _most_tokens(self) -> int:
        growth, copies = self.growth, {batch.copies: batch for batch in self.batches}
        limits = [
            (min((room.total for room in batch.rooms), default=NO_LIMIT),
             min((pool.most_blocks() for pool, _ in batch.pools), default=NO_LIMIT))
            for batch in copies.values()
        ]  # fmt: skip

        def is_too_long(tokens: int) -> bool:
            blocks, in_pools = growth.blocks(tokens), -(-growth.cached(tokens) // growth.block_tokens)
            return all(blocks > of_rooms or in_pools > of_pools for of_rooms, of_pools in limits)

        return bisect_left(range(1, NO_LIMIT), True, key=is_too_long)

    @property
    def decodes(self) -> bool:
        """Return whether its requests stay to decode; those of a prefill replica are handed over."""
        return self.batching.micro_batch > 0

    @property
    def seats(self) -> int:
        """Return how many requests it holds at once when all its micro-batches are full, those being prefilled too."""
        return self._most_seats * self.batching.in_flight

    def waiting_tokens(self) -> int:
        """Return how many prompt tokens of its requests are not prefilled yet."""
        log, under_way = self.log, (request for batch in self.batches for request in batch.prefilling)
        return sum(log.target[request] - log.begun(request) for request in (*self.queue, *under_way))

    def prompt_tokens_under_way(self) -> int:
        """Return the prompt tokens of its requests that have no token yet, as routers count them."""
        under_way = (request for batch in self.batches for request in batch.prefilling)
        return sum(self.log.target[request] for request in (*self.queue, *under_way))

    def unanswered(self) -> int:
        """Return how many of its requests have no answer from it: a prompt has one before its KV is sent."""
        return self.outstanding - sum(len(batch.sending) for batch in self.batches)

    def seats_taken(self) -> int:
        """Return how many requests decode here or are being sent here."""
        return sum(batch.seats_taken() for batch in self.batches)

    def new_batch(self, index: int) -> MicroBatch:
        """Return an empty micro-batch on one copy of each stage, distributed evenly over the copies that are up."""
        up = [[copy for copy in copies if copy.is_up] or copies for copies in self.stages]
        return MicroBatch(index, tuple(copies[index % len(copies)] for copies in up), self.growth)

    # --- arrivals

    def offer(self, now_s: float, request: int) -> None:
        """Queue a request here."""
        self.discipline.interrupt()
        self._take(request)
        self.queue.append(request)
        self.wake(now_s)

    def wake(self, now_s: float) -> None:
        """Have idle micro-batches check for work again, if there is any that they could start."""
        for index in sorted(self._idle):
            if index in self._idle and self._has_work():
                self.form(now_s, self.batches[index])

    def _has_work(self) -> bool:
        """Return whether a prompt waits or is under way; what else an idle micro-batch gets, it starts at once."""
        if self.queue or self.outside.always_has_requests:
            return True
        for one in self.batches:  # noqa: SIM110  # a generator takes twice as long, and this is asked very often
            if one.prefilling:
                return True
        return False

    def set_idle(self, batch: MicroBatch) -> None:
        """Mark a micro-batch as having no iteration under way."""
        batch.idle = True
        self._idle.add(batch.index)

    def expect(self, request: int) -> MicroBatch | None:
        """Reserve a seat and blocks for a request that is prefilled elsewhere; None if there is no room."""
        self.discipline.interrupt()
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
        """Receive the KV of an expected request; the user gets the token that its prompt has produced."""
        self.discipline.interrupt()
        self.log.show_first_token(request, now_s)
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
        """Fill and start the next iteration of a micro-batch; without work it becomes idle."""
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
        if self._takes_prompts and not batch.prefilling and batch.seats_taken() < self._most_seats:
            self._continue_prompt(batch)
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
        # No prompt may start with its next iterations either, unless something comes from outside.
        batch.only_decodes = not (tokens or batch.prefilling or self.outside.always_has_requests) and (
            not self.queue or batch.seats_taken() >= self._most_seats
        )
        log.iterations += 1
        log.prefilled += tokens
        self.discipline.start(now_s, batch)

    def done(self, now_s: float, batch: MicroBatch) -> None:
        """Complete an iteration that has left the last stage: tokens are produced, and some requests finish."""
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
                # The entry may be from an earlier stay.
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
        """Complete a prompt, which produces one token; return whether that finishes the request."""
        log = self.log
        log.produced[request] += 1
        is_finished = log.produced[request] == log.output[request]
        if not is_finished and self.outside.take_prompt(now_s, self, batch, request):
            return False  # the user gets the token from the decode replica, see `land`
        log.show_first_token(request, now_s)
        if is_finished:
            self._finish(now_s, batch, request, log.target[request])
        else:
            batch.ready.append(request)
        return is_finished

    def _finish(self, now_s: float, batch: MicroBatch, request: int, context: int) -> None:
        self.log.finished_s[request] = now_s
        self.outstanding -= 1
        self.kv.release(batch, request, context)

    # --- prompts

    def _continue_prompt(self, batch: MicroBatch) -> None:
        """Move a prompt that is under way in another micro-batch on the same copies to this one, if there is any.

        Engines schedule the next chunk of a prompt with the next iteration that starts, before the chunk ahead of it
        has left the pipeline: stages compute them in order, so the KV is there when the next chunk needs it
        (vLLM 0.32: `Scheduler.schedule` counts a chunk as computed once it is scheduled).
        """
        if not self.discipline.keeps_order:
            return
        for other in self.batches:
            if other.prefilling and other.copies == batch.copies:
                batch.prefilling.append(other.prefilling.popleft())
                return

    def _chunk(self, now_s: float, batch: MicroBatch) -> list[tuple[int, int, bool]]:
        """Return the next iteration's prompt tokens: the current prompt, then new ones within tokens and seats."""
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
            # Blocks of the prefix cache are taken with the first chunk, counted for every request that shares them.
            if not self.kv.fill(batch, filled, begun - filled + tokens):
                # Growth of others has used its promised blocks: it waits, but is evicted if nothing else can continue.
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
        """Return the next request of the queue, if the copies of this micro-batch have room for it."""
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
                if not outside.is_too_long(self, request):
                    return None
            elif self.log.target[request] <= self.most_tokens and not (self.is_empty() and self._is_whole()):
                return None
            queue.popleft()  # it would not fit even in an empty replica
            self.outstanding -= 1
            outside.refuse(now_s, self, request)
        queue.popleft()
        if self.log.preemptions[request] == 0:
            self.log.admitted_s[request] = now_s
        return request

    def is_empty(self) -> bool:
        """Return whether no request holds any block."""
        copies = [copy for copies in self.stages for copy in copies]
        rooms_are = all(copy.room is None or copy.room.used == copy.room.promised == 0 for copy in copies)
        return rooms_are and all(copy.pool is None or not copy.pool.homes for copy in copies)

    def _is_whole(self) -> bool:
        copies = [copy for copies in self.stages for copy in copies]
        return all(copy.is_up and (copy.pool is None or copy.pool.is_whole) for copy in copies)

    # --- growth and eviction

    def _grow(self, now_s: float, batch: MicroBatch) -> None:
        """Extend every decoding request by one cached token; if blocks run out, the latest requests are evicted."""
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
            # Copies without a pool have already counted the block that it would have needed.
            context = step - batch.decoding[request]
            crossed = growth.blocks(context + 1) - growth.blocks(context)
            self._evict(now_s, batch, request, extra_blocks=crossed)

    def _evict(self, now_s: float, batch: MicroBatch, request: int, *, extra_blocks: int = 0) -> None:
        """Remove a request between two iterations; it is prefilled again, ahead of the waiting ones."""
        self._drop(batch, request, written=0, extra_blocks=extra_blocks)
        self.outside.requeue(now_s, self, request)

    def lose(self, now_s: float, batch: MicroBatch, request: int) -> None:
        """Remove a request whose KV is lost; the iteration under way produces no token for it."""
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
