"""Observations of the iterations in a vLLM log.

A line states what an iteration computed and how long the engine *waited* for the result. Two things are added.
Scheduling and the handling of the result lie between two waits: `between` has their mean time. And the tokens that
requests attend to follow from the share of the KV cache in use.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hetis.formats.catalogue import known_model
from hetis.formats.errors import single_problem
from hetis.formats.vllm_logs import IterationLog, LoggedIteration, LoggedServer
from hetis.profiler.calibrate.between import between_iterations
from hetis.profiler.calibrate.observed import Observation, Observed, ObservedWork
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec

FIRST = 10  # first iterations of an engine, in which it still loads and compiles kernels
LEAST = 40
BLOCK_TOKENS = 16  # vLLM's usual block size, if the log does not state it
_ALIKE = {
    "tp": "TP degrees",
    "model": "models",
    "quantization": "quantizations",
    "kv_dtype": "types of KV caches",
}
_UNQUANTISED_BYTES = 2.0  # per parameter, and per element of the KV cache
NO_GAP = (
    "the log's clock is too coarse for the time between two iterations, which elapsed times exclude: log some "
    "minutes of steady load, or let a log collector add times in milliseconds"
)


def observed_in_log(
    label: str, log: IterationLog, *, context_tokens: float | None = None, max_tokens: int | None = None
) -> Observed:
    """Return the observations in a log. Raises DocumentError if it is of a pipeline or of servers that differ in what
    is calibrated, or does not state the context of decoding requests.

    ``context_tokens`` is what a decoding request attends to on average. None: derived from the log. ``max_tokens`` is
    the limit of a request where the log states none.
    """
    _require_alike(label, log.servers)
    between = between_iterations(log)
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
        seconds = iteration.elapsed_s + (between.seconds or 0.0)
        if seconds > 0:
            found.append(Observation(kind=work.kind, seconds=seconds, parts=((1.0, work),)))
        else:
            left_out["took no time"] += 1
    notes = [NO_GAP] if between.seconds is None else []
    if between.num_pauses:
        notes.append(
            f"pauses of the host or leaps of the log's clock while requests run: {between.num_pauses:,}, of "
            f"{between.paused_s:,.1f} s in all, which are not counted as time of iterations"
        )
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
        tp=next((server.tp for server in log.servers if server.tp is not None), None),
    )


def _require_alike(label: str, servers: Sequence[LoggedServer]) -> None:
    stages = max((server.pp or 1 for server in servers), default=1)
    if stages > 1:
        raise single_problem(label, f"is of an engine with {stages} pipeline stages, whose iterations overlap")
    for name, words in _ALIKE.items():
        stated = dict.fromkeys(value for server in servers if (value := getattr(server, name)) not in (None, ""))
        if len(stated) > 1:
            several = " and ".join(map(str, stated))
            raise single_problem(label, f"is of servers with {words} {several}, one after the other: split it")


def contradictions(servers: Sequence[LoggedServer], model: ModelSpec) -> list[str]:
    """Return a sentence for everything in which a server seems to differ from ``model``. Raises InvalidProblemError if
    it certainly has another precision, whose kernels would be taken for those of ``model``.
    """
    return list(dict.fromkeys(sentence for server in servers for sentence in _contradictions(server, model)))


def _contradictions(server: LoggedServer, model: ModelSpec) -> Iterator[str]:
    known = known_model(server.model.rstrip("/").rpartition("/")[2])  # of a name or path
    if known is not None and _shape(known) != _shape(model):
        yield f"the log is of a server of {server.model}, --model is {model.name}"
    quantised = model.weight_bytes < _UNQUANTISED_BYTES
    if server.quantization == "None" and quantised:
        name = model.weights or f"{model.weight_bytes:g} bytes each"
        raise InvalidProblemError(
            f"the weights of {model.name} are {name}, the server in the log has quantization=None"
        )
    if server.quantization not in ("", "None") and not quantised:
        yield f"the server in the log has quantization={server.quantization}, {model.name} has none: see --weights"
    if server.kv_dtype.startswith("fp8") and model.kv_bytes >= _UNQUANTISED_BYTES:
        raise InvalidProblemError(f"the server in the log has kv_cache_dtype={server.kv_dtype}: give --kv fp8")
    if server.kv_dtype in ("auto", "bfloat16", "float16") and model.kv_bytes < _UNQUANTISED_BYTES:
        yield f"the server in the log has kv_cache_dtype={server.kv_dtype}, {model.name} has KV of 8 bits: see --kv"


def _shape(model: ModelSpec) -> tuple[int, ...]:
    return model.num_layers, model.hidden, model.q_heads, model.kv_heads, model.head_dim


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
