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
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class IterationTime(Protocol):
    """The signature of `hetis.simulator.timing.StageTiming.seconds`."""

    def __call__(
        self, decoding: int, attended: float, chunk_tokens: int, chunk_pairs: float, chunk_read: float, rows: int, /
    ) -> float: ...


class Attended(Protocol):
    """The number of tokens that a query with a context attends to (`hetis.solver.model.ModelSpec.attended_tokens`)."""

    def __call__(self, context_tokens: float, /) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """``total`` requests, ``in_flight`` at once. Lengths are uniform between ``shortest`` and 1 of the stated ones."""

    in_flight: int
    total: int
    prompt_tokens: int
    output_tokens: int
    shortest: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine's limits on an iteration.

    It carries at most ``chunk_tokens`` tokens and ``seats`` requests with KV. Prompts may join decoding requests or
    not. New requests are looked for after every iteration with prompts, and after ``poll_iterations`` others. While
    requests decode, prompts wait for ``wait_iterations``, or until an iteration has ``wait_tokens`` tokens. These
    iterations are counted from the last iteration with prompts if the engine ``waits_by_turns``, and from the arrival
    otherwise. Before all that, the server reads one prompt after another, each token in ``reading_s`` seconds.

    Every decoding request drafts ``draft_tokens`` with one more layer beside the model's ``layers``. The model then
    computes them with the request's own token; ``tokens_per_iteration`` of all are kept, on average.
    """

    chunk_tokens: int
    seats: int
    mixes: bool
    poll_iterations: int = 1
    wait_iterations: int = 0
    wait_tokens: int = 0
    waits_by_turns: bool = False
    draft_tokens: int = 0
    tokens_per_iteration: float = 1.0
    layers: int = 1
    reading_s: float = 0.0

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
        """Return the iterations in which a request decodes, its first token apart."""
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
    gain = engine.tokens_per_iteration
    waiting, prefilling = deque[_Request](), deque[_Request]()
    unpolled, waited = 0, 0  # iterations since the last look for new requests, and those that prompts have waited
    ttft_s, tpot_s = 0.0, 0.0
    while arrived or waiting or prefilling or finishing:
        if not num or unpolled >= engine.poll_iterations:
            while arrived and arrived[0].read_s <= now_s:
                waiting.append(arrived.popleft())
            unpolled = 0
            if not (num or waiting or prefilling):
                now_s = arrived[0].read_s
                continue
        holds_back = bool(num and waiting) and not prefilling and waited < engine.wait_iterations
        if not engine.waits_by_turns:
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
                looks = max(0, math.ceil((unread + unpolled) / engine.poll_iterations) - 1)
                steps = min(steps, (1 + looks) * engine.poll_iterations - unpolled)
            if holds_back:
                steps = min(steps, engine.wait_iterations - waited)
                waited += steps
            elif engine.waits_by_turns and num:
                waited = (waited + steps) % engine.wait_iterations
            middle = attended(context / num + gain * (steps - 1) / 2)
            now_s += steps * engine.decode_s(seconds, num, num * middle)
            unpolled = (unpolled + steps - 1) % engine.poll_iterations + 1
        else:
            steps, unpolled, waited = 1, engine.poll_iterations, 0
            beside = num if engine.mixes else 0
            drafted = beside * (1 + engine.draft_tokens)
            last = sum(request.filled == request.prompt for request in chunk)
            reading = beside * attended(context / beside) if beside else 0.0
            now_s += seconds(drafted, reading, tokens, pairs, read, drafted + last)
            now_s += engine.drafting_s(seconds, beside, reading)
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


def _chunk(
    waiting: deque[_Request], prefilling: deque[_Request], engine: Engine, decoding: int, attended: Attended
) -> tuple[list[_Request], int, float, float]:
    """Return the requests whose prompts join the next iteration, its tokens, (query, key) pairs and KV read."""
    budget = max(1, engine.chunk_tokens - (decoding if engine.mixes else 0))
    chunk, tokens, pairs, read = list[_Request](), 0, 0.0, 0.0
    while budget:
        if not prefilling:
            if not waiting or decoding + sum(one.filled == one.prompt for one in chunk) >= engine.seats:
                break
            prefilling.append(waiting.popleft())
        request = prefilling[0]
        part = min(budget, request.prompt - request.filled)
        mean = attended(request.filled + (part + 1) / 2)
        tokens, pairs, read = tokens + part, pairs + part * mean, read + mean + part / 2
        request.filled, budget = request.filled + part, budget - part
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
