"""A one-stage replica with a constant number of requests in flight, as load generators keep it, in virtual time.

The cost model gives the seconds of an iteration from what it really carries (`StageTiming`). Between two events (a
prompt arrives, a request ends) iterations differ only in contexts, so they are simulated together. A run of 640
requests of 8,000 tokens thus takes a thousand steps, not a hundred thousand.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class IterationTime(Protocol):
    """The signature of `hetis.simulator.timing.StageTiming.seconds`."""

    def __call__(
        self, decoding: int, attended: float, chunk_tokens: int, chunk_pairs: float, chunk_read: float, rows: int, /
    ) -> float: ...


class CopyTime(Protocol):
    """The same with the tokens of other copies that share experts with this one."""

    def __call__(
        self, decoding: int, attended: float, chunk_tokens: int, chunk_pairs: float, chunk_read: float, rows: int,
        others: int, /,
    ) -> float: ...  # fmt: skip


class Attended(Protocol):
    """The number of tokens that a query with a context attends to (`hetis.solver.model.ModelSpec.attended_tokens`)."""

    def __call__(self, context_tokens: float, /) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """``total`` requests, ``in_flight`` at once. Lengths are uniform from ``shortest`` to 1 times the stated ones."""

    in_flight: int
    total: int
    prompt_tokens: int
    output_tokens: int
    shortest: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine's limits on an iteration.

    It carries at most ``chunk_tokens`` tokens, drafts among them, and ``seats`` requests with KV. Prompts may join
    decoding requests or not. A prompt for which an iteration has too little room left is split, or waits for the next
    one if the engine ``keeps_whole`` prompts. The engine polls for new requests after every iteration with prompts, and
    after ``poll_iterations`` others. While requests decode, prompts wait for ``wait_iterations``, or until an iteration
    has ``wait_tokens`` tokens. Before all that, the server reads one prompt after another, each token in ``reading_s``
    seconds.

    An engine that ``schedules_ahead`` schedules the next iteration as this one starts: what arrives meanwhile joins the
    one after the next.

    ``copies`` that balance their prompts (`balanced_copies`) compute them when all have had some for
    ``gather_iterations``, or in every ``balance_iterations``-th iteration in which some copy has none.

    Every decoding request drafts ``draft_tokens`` with one more layer beside the model's ``layers``. The model then
    computes them with the request's own token; ``tokens_per_iteration`` of all are kept, on average.
    """

    chunk_tokens: int
    seats: int
    mixes: bool
    keeps_whole: bool = False
    poll_iterations: int = 1
    wait_iterations: int = 0
    wait_tokens: int = 0
    copies: int = 1
    balance_iterations: int = 0
    gather_iterations: int = 0
    draft_tokens: int = 0
    tokens_per_iteration: float = 1.0
    layers: int = 1
    reading_s: float = 0.0
    schedules_ahead: bool = False

    def drafting_s(self, seconds: IterationTime, decoding: int, attended: float) -> float:
        """Return the seconds in which ``decoding`` requests draft, by one layer and one token after another."""
        if not self.draft_tokens or not decoding:
            return 0.0
        return self.draft_tokens * seconds(decoding, attended, 0, 0.0, 0.0, decoding) / self.layers

    def decode_s(self, seconds: IterationTime, decoding: int, attended: float) -> float:
        """Return the seconds of an iteration of decoding requests alone, which attend to ``attended`` tokens together.

        Drafts of a request read its KV once; their attention FLOPs are left out.
        """
        tokens = decoding * (1 + self.draft_tokens)
        return seconds(tokens, attended, 0, 0.0, 0.0, tokens) + self.drafting_s(seconds, decoding, attended)

    def iterations(self, output_tokens: int) -> int:
        """Return the iterations in which a request decodes, excluding its first token."""
        return max(1, math.ceil((output_tokens - 1) / self.tokens_per_iteration - 1e-9))


@dataclass(slots=True)
class _Request:
    arrived_s: float
    read_s: float  # when the server has read its prompt
    prompt: int
    output: int
    filled: int = 0
    first_s: float = 0.0


def closed_loop(load: Load, engine: Engine, seconds: IterationTime, attended: Attended) -> tuple[float, float]:
    """Return mean TTFT and mean TPOT over all requests, including the first ones, which arrive together."""
    arrived, coming = deque[_Request](), iter(_lengths(load))
    read_s = 0.0
    for prompt, output in itertools.islice(coming, load.in_flight):
        read_s += engine.reading_s * prompt
        arrived.append(_Request(0.0, read_s, prompt, output))
    finishing: list[tuple[int, int, _Request]] = []  # step after which the request has all of its tokens
    num, context, step, now_s, order = 0, 0.0, 0, 0.0, 0
    scheduled_s = 0.0  # when the next iteration is, or was, scheduled
    gain = engine.tokens_per_iteration
    waiting, prefilling = deque[_Request](), deque[_Request]()
    unpolled, waited = 0, 0  # iterations since the last poll for new requests, and those that prompts have waited
    ttft_s, tpot_s = 0.0, 0.0
    while arrived or waiting or prefilling or finishing:
        if not num or unpolled >= engine.poll_iterations:
            while arrived and arrived[0].read_s <= scheduled_s:
                waiting.append(arrived.popleft())
            unpolled = 0
            if not (num or waiting or prefilling):
                now_s = scheduled_s = max(now_s, arrived[0].read_s)
                continue
        holds_back = bool(num and waiting) and not prefilling and waited < engine.wait_iterations
        holds_back = holds_back and num + sum(request.prompt for request in waiting) < engine.wait_tokens
        waited = waited if holds_back else 0
        if holds_back:
            chunk, tokens, pairs, read = list[_Request](), 0, 0.0, 0.0
        else:
            chunk, tokens, pairs, read = _chunk(waiting, prefilling, engine, num, attended)
        if not chunk:
            steps = finishing[0][0] - step
            if arrived:
                unread = math.ceil((arrived[0].read_s - now_s) / engine.decode_s(seconds, num, context))
                unread = max(0, unread) + engine.schedules_ahead
                looks = max(0, math.ceil((unread + unpolled) / engine.poll_iterations) - 1)
                steps = min(steps, (1 + looks) * engine.poll_iterations - unpolled)
            if holds_back:
                steps = min(steps, engine.wait_iterations - waited)
                waited += steps
            middle = attended(context / num + gain * (steps - 1) / 2)
            one_s = engine.decode_s(seconds, num, num * middle)
            now_s += steps * one_s
            unpolled = (unpolled + steps - 1) % engine.poll_iterations + 1
        else:
            steps, unpolled, waited = 1, engine.poll_iterations, 0
            beside = num if engine.mixes else 0
            drafted = beside * (1 + engine.draft_tokens)
            last = sum(request.filled == request.prompt for request in chunk)
            reading = beside * attended(context / beside) if beside else 0.0
            one_s = seconds(drafted, reading, tokens, pairs, read, drafted + last)
            one_s += engine.drafting_s(seconds, beside, reading)
            now_s += one_s
        scheduled_s = now_s - one_s if engine.schedules_ahead else now_s
        if not chunk or engine.mixes:
            step, context = step + steps, context + gain * steps * num
        for request in chunk:
            if request.filled < request.prompt:
                continue
            request.first_s = now_s
            ttft_s += now_s - request.arrived_s
            order += 1
            heapq.heappush(finishing, (step + engine.iterations(request.output), order, request))
            num, context = num + 1, context + request.prompt
        while finishing and finishing[0][0] == step:
            request = heapq.heappop(finishing)[2]
            num, context = num - 1, context - request.prompt - gain * engine.iterations(request.output)
            tpot_s += (now_s - request.first_s) / max(1, request.output - 1)
            if (lengths := next(coming, None)) is not None:
                read_s = max(now_s, read_s) + engine.reading_s * lengths[0]
                arrived.append(_Request(now_s, read_s, *lengths))
    return ttft_s / load.total, tpot_s / load.total


@dataclass(slots=True)
class _Copy:
    """The requests of one of several copies."""

    waiting: deque[_Request]
    decoding: int = 0
    context: float = 0.0


_Chunk = tuple[list[_Request], int, float, float]  # see `_chunk`
_NO_CHUNK: _Chunk = [], 0, 0.0, 0.0


def balanced_copies(load: Load, engine: Engine, seconds: CopyTime, attended: Attended) -> tuple[float, float]:
    """Return what `closed_loop` does, for copies that iterate together and balance their prompts.

    ``load`` is that of all copies. A new request goes to the copy with the fewest, and prompts are kept whole. Copies
    that decode nothing do not wait. These are the rules of TensorRT-LLM's `_balance_adp_requests`.
    """
    gain = engine.tokens_per_iteration
    copies = [_Copy(deque()) for _ in range(engine.copies)]
    arrived, coming = deque[_Request](), iter(_lengths(load))
    read_s = 0.0
    for prompt, output in itertools.islice(coming, load.in_flight):
        read_s += engine.reading_s * prompt
        arrived.append(_Request(0.0, read_s, prompt, output))
    finishing: list[tuple[int, int, _Copy, _Request]] = []
    step, now_s, scheduled_s, order = 0, 0.0, 0.0, 0
    waited, gathered = 0, 0  # iterations in which some copy had no prompt, and in which all had one
    ttft_s, tpot_s = 0.0, 0.0
    while arrived or finishing or any(copy.waiting for copy in copies):
        while arrived and arrived[0].read_s <= scheduled_s:
            min(copies, key=lambda copy: len(copy.waiting) + copy.decoding).waiting.append(arrived.popleft())
        if not any(copy.waiting or copy.decoding for copy in copies):
            now_s = scheduled_s = max(now_s, arrived[0].read_s)
            continue
        all_decode = all(copy.decoding for copy in copies)
        all_ready = all(copy.waiting and copy.decoding < engine.seats for copy in copies)
        if all_ready:
            waited, computes = 0, not all_decode or gathered == engine.gather_iterations
            gathered = 0 if computes else gathered + 1
        else:
            computes = not all_decode or waited + 1 >= engine.balance_iterations
            waited = 0 if computes else waited + 1
        chunks = [_NO_CHUNK] * len(copies)
        if computes:
            chunks = [_chunk(copy.waiting, deque(), engine, copy.decoding, attended) for copy in copies]
        steps = 1
        if not any(chunk[0] for chunk in chunks) and not all_ready:
            steps = finishing[0][0] - step
            if arrived:
                one_s = _slowest_s(copies, chunks, engine, seconds, attended, 0.0)
                unread = max(0, math.ceil((arrived[0].read_s - now_s) / one_s))
                steps = min(steps, max(1, unread + engine.schedules_ahead))
            if any(copy.waiting for copy in copies):
                steps = min(steps, engine.balance_iterations - waited)
            waited = (waited + steps - 1) % engine.balance_iterations
        one_s = _slowest_s(copies, chunks, engine, seconds, attended, gain * (steps - 1) / 2)
        now_s += steps * one_s
        scheduled_s = now_s - one_s if engine.schedules_ahead else now_s
        step += steps
        for copy, chunk in zip(copies, chunks, strict=True):
            copy.context += gain * steps * copy.decoding
            for request in chunk[0]:
                request.first_s = now_s
                ttft_s += now_s - request.arrived_s
                order += 1
                heapq.heappush(finishing, (step + engine.iterations(request.output), order, copy, request))
                copy.decoding, copy.context = copy.decoding + 1, copy.context + request.prompt
        while finishing and finishing[0][0] == step:
            _, _, copy, request = heapq.heappop(finishing)
            copy.decoding -= 1
            copy.context -= request.prompt + gain * engine.iterations(request.output)
            tpot_s += (now_s - request.first_s) / max(1, request.output - 1)
            if (lengths := next(coming, None)) is not None:
                read_s = max(now_s, read_s) + engine.reading_s * lengths[0]
                arrived.append(_Request(now_s, read_s, *lengths))
    return ttft_s / load.total, tpot_s / load.total


def _slowest_s(
    copies: Sequence[_Copy], chunks: Sequence[_Chunk], engine: Engine, seconds: CopyTime, attended: Attended,
    more_context: float,
) -> float:  # fmt: skip
    """Return the seconds of an iteration: those of the copy that has the most tokens.

    ``more_context`` is the growth of each request's context until the middle one of several iterations.
    """
    tokens = [
        copy.decoding * (1 + engine.draft_tokens) + chunk[1] for copy, chunk in zip(copies, chunks, strict=True)
    ]  # fmt: skip
    place = max(range(len(copies)), key=lambda n: (tokens[n], copies[n].context))
    num, (requests, chunk_tokens, pairs, read) = copies[place].decoding, chunks[place]
    reading = num * attended(copies[place].context / num + more_context) if num else 0.0
    drafted, others = num * (1 + engine.draft_tokens), sum(tokens) - tokens[place]
    drafting_s = 0.0
    if engine.draft_tokens and num:
        beside = sum(copy.decoding for copy in copies) - num
        drafting_s = engine.draft_tokens * seconds(num, reading, 0, 0.0, 0.0, num, beside) / engine.layers
    return seconds(drafted, reading, chunk_tokens, pairs, read, drafted + len(requests), others) + drafting_s


def _chunk(
    waiting: deque[_Request], prefilling: deque[_Request], engine: Engine, decoding: int, attended: Attended
) -> _Chunk:
    """Return the requests whose prompts join the next iteration, its tokens, (query, key) pairs and KV read."""
    beside = decoding * (1 + engine.draft_tokens) if engine.mixes else 0
    budget = max(1, engine.chunk_tokens - beside)
    chunk, tokens, pairs, read = list[_Request](), 0, 0.0, 0.0
    while budget:
        if not prefilling:
            if not waiting or decoding + sum(one.filled == one.prompt for one in chunk) >= engine.seats:
                break
            if engine.keeps_whole and chunk and waiting[0].prompt > budget:
                break
            prefilling.append(waiting.popleft())
        request = prefilling[0]
        part = request.prompt - request.filled
        if not engine.keeps_whole:
            part = min(budget, part)
        mean = attended(request.filled + (part + 1) / 2)
        tokens, pairs, read = tokens + part, pairs + part * mean, read + mean + part / 2
        request.filled, budget = request.filled + part, max(0, budget - part)
        chunk.append(request)
        if request.filled == request.prompt:
            prefilling.popleft()
    return chunk, tokens, pairs, read


def _lengths(load: Load) -> list[tuple[int, int]]:
    rng = np.random.default_rng(load.seed)
    prompts, outputs = (
        rng.integers(max(1, round(load.shortest * tokens)), tokens, size=load.total, endpoint=True).tolist()
        for tokens in (load.prompt_tokens, load.output_tokens)
    )
    return list(zip(prompts, outputs, strict=True))
