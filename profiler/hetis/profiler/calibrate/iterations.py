"""Observations of the iterations in a vLLM log.

A line states what an iteration computed and how long the engine *waited* for the result. Two things are added.
Scheduling and the handling of the result lie between two waits, so their mean time follows from the clock of the lines
over stretches in which the engine never was without work. And the tokens that requests attend to follow from the share
of the KV cache in use.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from hetis.formats.errors import single_problem
from hetis.formats.vllm_logs import IterationLog, LoggedIteration, LoggedServer
from hetis.profiler.calibrate.observed import Observation, Observed, ObservedWork

FIRST = 10  # first iterations of an engine, in which it still loads and compiles kernels
LEAST = 40
BLOCK_TOKENS = 16  # vLLM's usual block size, if the log does not state it
_LEAST_STRETCH_STEPS = 5.0  # in steps of the clock: a shorter stretch is dominated by rounding
_ROUNDING = 0.29  # standard deviation of what is cut off a time, in steps of the clock
_LEAST_GAP_CERTAINTY = 0.05  # largest standard error of the time between waits, as a share of the mean wait
NO_GAP = (
    "the log's clock is too coarse for the time between two iterations, which elapsed times exclude: log some "
    "minutes of steady load, or let a log collector add times in milliseconds"
)


def observed_in_log(
    label: str, log: IterationLog, *, context_tokens: float | None = None, max_tokens: int | None = None
) -> Observed:
    """Return the observations in a log. Raises DocumentError if it is of a pipeline or of servers that differ in their
    TP degree, or does not state the context of decoding requests.

    ``context_tokens`` is what a decoding request attends to on average. None: derived from the log. ``max_tokens`` is
    the limit of a request where the log states none.
    """
    tp = _degree(label, log.servers)
    gap_s = between_iterations_s(log)
    left_out, found = Counter[str](), list[Observation]()
    for server, state, iteration in _with_states(log, max_tokens):
        reason = _reason(iteration)
        if reason:
            left_out[reason] += 1
            continue
        unknown = server.kv_tokens is None or state.held is None
        if iteration.generation_requests and context_tokens is None and unknown:
            lacks = "KV cache size (a line of the server's start)" if state.held is not None else "KV cache usage"
            raise single_problem(label, f"has no {lacks}: --context gives the mean tokens of a decoding request")
        work = _work(iteration, state, server, context_tokens)
        seconds = iteration.elapsed_s + (gap_s or 0.0)
        if seconds > 0:
            found.append(Observation(kind=work.kind, seconds=seconds, parts=((1.0, work),)))
        else:
            left_out["took no time"] += 1
    notes = [NO_GAP] if gap_s is None else []
    if log.is_cut:
        notes.append(f"only the first {sum(len(server.iterations) for server in log.servers):,} iterations were read")
    versions = dict.fromkeys(server.version for server in log.servers if server.version)
    return Observed(
        what="iterations",
        origin=f"vLLM {' and '.join(versions)}".rstrip(),
        least=LEAST,
        observations=tuple(found),
        left_out=left_out,
        notes=tuple(notes),
        tp=tp,
    )


def _degree(label: str, servers: Sequence[LoggedServer]) -> int | None:
    """Return the TP degree of all servers, or None if none of them states it."""
    stages = max((server.pp or 1 for server in servers), default=1)
    if stages > 1:
        raise single_problem(label, f"is of an engine with {stages} pipeline stages, whose iterations overlap")
    degrees = sorted({server.tp for server in servers if server.tp is not None})
    if len(degrees) > 1:
        several = " and ".join(map(str, degrees))
        raise single_problem(label, f"is of servers with TP degrees {several}, one after the other: split it")
    return degrees[0] if degrees else None


def between_iterations_s(log: IterationLog) -> float | None:
    """Return the mean seconds between the end of one wait and the start of the next, or None if the clock cannot tell.

    An iteration with a request that is past its first token follows at once on the one before, which had it too. In
    such a stretch, the clock less the time waited so far rises equally with every iteration: by the slope of a line
    through all of them, which a clock of whole seconds blurs little.
    """
    every = [one for server in log.servers for one in _stretches(server.iterations)]
    stretches = [one for one in every if one.waited_s >= _LEAST_STRETCH_STEPS * log.clock_step_s]
    count = sum(one.count for one in stretches)
    spread = sum(one.squares - one.numbers**2 / one.count for one in stretches)
    if not spread:
        return None
    waited_s = sum(one.waited_s for one in stretches) / count
    if _ROUNDING * log.clock_step_s / sqrt(spread) > _LEAST_GAP_CERTAINTY * waited_s:
        return None
    return max(0.0, sum(one.products - one.numbers * one.rests_s / one.count for one in stretches) / spread)


@dataclass(slots=True)
class _Stretch:
    """Iterations without a pause between them, and the sums for a line through them; the first has number 0."""

    begin_s: float
    clock_s: float
    waited_s: float = 0.0  # time waited, without the first one
    count: int = 1
    numbers: float = 0.0
    squares: float = 0.0
    rests_s: float = 0.0  # sum of the clock's rises since the beginning, less the waits
    products: float = 0.0

    def add(self, clock_s: float, elapsed_s: float) -> None:
        number, self.count, self.clock_s = self.count, self.count + 1, clock_s
        self.waited_s += elapsed_s
        rest_s = clock_s - self.begin_s - self.waited_s
        self.numbers += number
        self.squares += number * number
        self.rests_s += rest_s
        self.products += number * rest_s


def _stretches(iterations: Sequence[LoggedIteration]) -> Iterator[_Stretch]:
    now: dict[int, tuple[_Stretch, int]] = {}  # keyed by engine, with the index of its last iteration
    for one in iterations:
        known = now.pop(one.engine, None)
        if known is not None and not _goes_on(known, one):
            yield known[0]
            known = None
        if one.clock_s is None or one.is_dummy:
            continue
        if known is None:
            stretch = _Stretch(begin_s=one.clock_s, clock_s=one.clock_s)
        else:
            stretch = known[0]
            stretch.add(one.clock_s, one.elapsed_s)
        now[one.engine] = stretch, one.index
    yield from (stretch for stretch, _ in now.values())


def _goes_on(known: tuple[_Stretch, int], one: LoggedIteration) -> bool:
    stretch, index = known
    return (
        one.clock_s is not None
        and one.clock_s >= stretch.clock_s  # a clock that was set back tells nothing
        and one.index == index + 1
        and one.generation_requests > 0
    )


@dataclass(slots=True)
class _State:
    """An engine before an iteration."""

    held: float | None = None  # share of the KV cache in use
    past_tokens: float = 0.0  # tokens of the continuing prompt that were computed before
    before: LoggedIteration | None = None  # iteration before


def _with_states(log: IterationLog, max_tokens: int | None) -> Iterator[tuple[LoggedServer, _State, LoggedIteration]]:
    """Yield every iteration with its server and the state of its engine before it."""
    for server in log.servers:
        budgets = _budgets(server)
        states = defaultdict[int, _State](_State)
        for one in server.iterations:
            state = states[one.engine]
            if state.held is None or one.index == 0:
                state.held, state.before = one.kv_ratio, None
            state.past_tokens = _past_tokens(state, one, budgets.get(one.engine), server.max_tokens or max_tokens)
            yield server, state, one
            state.held, state.before = one.kv_ratio, one


def _past_tokens(state: _State, one: LoggedIteration, budget: int | None, max_tokens: int | None) -> float:
    """Return the tokens that earlier iterations computed of a prompt that continues in ``one``, after ``state``."""
    before = state.before
    if before is None or _size(before) != budget or not _may_continue(before, one):
        return 0.0
    past = state.past_tokens if before.context_requests == 1 else 0.0
    past += before.context_tokens / before.context_requests
    chunk = one.context_tokens / one.context_requests
    return 0.0 if max_tokens is not None and past + chunk > max_tokens else past


def _budgets(server: LoggedServer) -> dict[int, int]:
    """Return the most tokens of an iteration by engine, which only a prompt that continues in the next one fills.

    If the log does not state it, it may be the largest size that occurs: where most series of such iterations end with
    one that may have the rest of a prompt. Under prompts of equal length, it is the size of whole prompts.
    """
    by_engine = defaultdict[int, list[LoggedIteration]](list)
    for one in server.iterations:
        by_engine[one.engine].append(one)
    if server.budget_tokens is not None:
        return dict.fromkeys(by_engine, server.budget_tokens)
    budgets = {}
    for engine, mine in by_engine.items():
        largest = max(map(_size, mine))
        filled = [(one, following) for one, following in pairwise(mine) if _size(one) == largest]
        rests = [_may_continue(one, following) for one, following in filled if _size(following) < largest]
        if len(filled) > 1 and 2 * sum(rests) > len(rests):
            budgets[engine] = largest
    return budgets


def _may_continue(one: LoggedIteration, following: LoggedIteration) -> bool:
    """Return whether a prompt of ``one`` may go on in the next iteration: if all of them were complete, each would be
    one more request that decodes there.
    """
    return (
        following.index == one.index + 1
        and min(one.context_requests, following.context_requests) > 0
        and following.generation_requests < one.generation_requests + one.context_requests
    )


def _size(one: LoggedIteration) -> int:
    return one.context_tokens + one.generation_tokens


def _reason(one: LoggedIteration) -> str:
    """Return why an iteration is not an observation; empty if it is one."""
    if one.is_dummy:
        return "idle data-parallel rank"
    if one.index < FIRST:
        return f"first {FIRST} of an engine"
    if one.after_compiling:
        return "compiled a kernel"
    if one.has_encoder:
        return "encoded images or sound"
    if one.generation_tokens != one.generation_requests:
        return "several tokens of a sequence (speculative decoding, or preempted and computed again)"
    if bool(one.context_requests) != bool(one.context_tokens) or not one.context_tokens + one.generation_tokens:
        return "computed nothing"
    return ""


def _work(
    one: LoggedIteration, state: _State, server: LoggedServer, context_tokens: float | None
) -> ObservedWork:  # fmt: skip
    decoding = float(one.generation_requests)
    if context_tokens is not None:
        attended = decoding * context_tokens
    else:
        # A request's last block is half empty on average.
        empty = decoding * ((server.block_tokens or BLOCK_TOKENS) - 1) / 2
        held = (state.held or 0.0) * (server.kv_tokens or 0)
        attended = max(decoding, held - state.past_tokens - empty)
    return ObservedWork(
        decoding=decoding,
        attended_tokens=attended if decoding else 0.0,
        prompts=float(one.context_requests),
        chunk_tokens=float(one.context_tokens),
        past_tokens=state.past_tokens,
    )
