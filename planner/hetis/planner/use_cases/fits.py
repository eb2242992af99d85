"""Whether a model fits on GPUs, without a plan: the room for KV as the engine finds it at start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hetis.engines.memory import GIB, Room, Start, default_start, longest_context, memory_of, requests_in, room_of
from hetis.engines.precision import refusal_of
from hetis.engines.versions import VERSIONS, Engine
from hetis.formats import catalogue
from hetis.solver.cluster import GpuType
from hetis.solver.cost import rank_shape
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec

CONTEXTS = (4096, 16384, 32768, 131072)
MOST_RANKS = 8  # of a stage, all in one node
COUNTS = (1, 2, 4, 8)
# GPU types that the answer without any names: one of every size that people rent or own.
COMMON = (
    *("T4", "L4", "RTX-3090", "RTX-4090", "RTX-5090", "RTX-A6000", "L40S", "A100-SXM-40GB", "A100-SXM-80GB"),
    *("RTX-PRO-6000-Server-96GB", "H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB", "MI300X-192GB"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """The engine, and options with which it is started; None: the engine's default."""

    engine: Engine = Engine.VLLM
    version: str | None = None
    tp: int | None = None
    context_tokens: int | None = None
    max_num_seqs: int | None = None
    batched_tokens: int | None = None
    utilisation: float | None = None
    eager: bool = False
    in_use_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One replica on ``num_gpus`` GPUs of a type.

    Attributes:
        starts: the engine starts as given, with a context of at least ``context_tokens``.
        longest_context: tokens of the longest request for which there is room; 0: the engine does not start.
        kv_tokens: tokens of KV, in requests of ``context_tokens``, or of the longest context if that is shorter.
        requests: at how many requests KV is full, by their context.
        why_not: why it does not start; empty: it does.
        helps: settings with which it would, each with its KV tokens.
        options: the engine's options.
    """

    gpu: str
    num_gpus: int
    start: Start
    room: Room
    context_tokens: int
    starts: bool
    longest_context: int
    kv_tokens: int
    requests: dict[int, int]
    why_not: str
    helps: tuple[str, ...]
    options: tuple[str, ...]


def fit(model: ModelSpec, gpu: GpuType, num_gpus: int, choice: EngineChoice) -> Fit:
    """Return whether the model fits on these GPUs as one replica.

    Raises:
        InvalidProblemError: the model cannot be split among so many GPUs, or the engine lacks the GPU's vendor.
    """
    own = model.on(gpu.name)
    if (refused := refusal_of(own, gpu, choice.engine.value)) is not None:
        raise InvalidProblemError(str(refused))
    start = _start(own, gpu, num_gpus, choice)
    return _fit(own, gpu, start, choice, with_help=True)


def least_gpus(model: ModelSpec, choice: EngineChoice) -> list[Fit]:
    """Return, for each GPU type that the engine supports, the fewest of `COUNTS` GPUs on which it starts, if any do."""
    found = list[Fit]()
    for name in COMMON:
        gpu = catalogue.find_gpu(name).gpu
        own = model.on(gpu.name)
        if refusal_of(own, gpu, choice.engine.value) is not None:
            continue
        for count in COUNTS:
            try:
                one = _fit(own, gpu, _start(own, gpu, count, choice), choice, with_help=False)
            except InvalidProblemError:
                continue
            if one.starts or count == COUNTS[-1]:
                found.append(one)
                break
    return found


def _start(model: ModelSpec, gpu: GpuType, num_gpus: int, choice: EngineChoice) -> Start:
    sizes = [n for n in range(1, MOST_RANKS + 1) if num_gpus % n == 0 and rank_shape(model, n) is not None]
    tp = max(sizes) if choice.tp is None else choice.tp
    if tp not in sizes:
        has = ", ".join(map(str, sizes))
        raise InvalidProblemError(f"--tp is {tp}, {model.name} on {num_gpus} GPUs can have {has}")
    stages = num_gpus // tp
    if stages > model.num_layers:
        raise InvalidProblemError(f"{num_gpus} GPUs are {stages} stages, {model.name} has {model.num_layers} layers")
    start = default_start(memory_of(choice.engine, choice.version), gpu, tp=tp, stages=stages)
    return replace(
        start,
        max_num_seqs=choice.max_num_seqs or start.max_num_seqs,
        batched_tokens=choice.batched_tokens or start.batched_tokens,
        utilisation=choice.utilisation,
        eager=choice.eager,
        in_use_bytes=choice.in_use_bytes,
    )


def _fit(model: ModelSpec, gpu: GpuType, start: Start, choice: EngineChoice, *, with_help: bool) -> Fit:
    room = room_of(model, gpu, start)
    longest = longest_context(room, model, gpu, start)
    wanted = min(choice.context_tokens or model.max_position, model.max_position)
    shown = min(wanted, longest)
    contexts = sorted({*(c for c in CONTEXTS if c <= model.max_position), wanted})
    why_not = _why_not(room, start, longest, choice.context_tokens)
    return Fit(
        gpu=gpu.name,
        num_gpus=start.num_gpus,
        start=start,
        room=room,
        context_tokens=wanted,
        starts=not why_not,
        longest_context=longest,
        kv_tokens=int(requests_in(room, model, gpu, start, shown) * shown) if shown else 0,
        requests={c: int(requests_in(room, model, gpu, start, c)) for c in contexts},
        why_not=why_not,
        helps=tuple(_helps(model, gpu, start, choice)) if why_not and with_help else (),
        options=_options(start, choice, min(longest, wanted) if longest < wanted else choice.context_tokens),
    )


def _why_not(room: Room, start: Start, longest: int, context_tokens: int | None) -> str:
    program = start.rules.engine.program
    if room.weight_bytes > room.reported_bytes - room.kept_bytes:
        return (
            f"the weights take {room.weight_bytes / GIB:.1f} GiB of each GPU, {program} may use "
            f"{(room.reported_bytes - room.kept_bytes) / GIB:.1f}"
        )
    if longest == 0:
        return (
            f"{-room.kv_bytes / GIB:.2f} GiB are missing on each GPU before any KV: {program} does not start"
            if room.kv_bytes <= 0
            else f"{room.kv_bytes / GIB:.2f} GiB are left for KV, too little for a request: {program} does not start"
        )
    if context_tokens is not None and longest < context_tokens:
        return f"the longest request has {longest:,} tokens, {context_tokens:,} are wanted"
    return ""


def _helps(model: ModelSpec, gpu: GpuType, start: Start, choice: EngineChoice) -> Iterator[str]:
    """Yield settings with which the engine would start, one at a time, then all of them, then more GPUs."""
    share = start.rules.share(gpu, start.tp, start.stages) if start.utilisation is None else start.utilisation
    changes: list[tuple[str, Start]] = []
    if start.rules.engine is not Engine.SGLANG:
        if start.max_num_seqs > 64:
            changes.append(("--max-num-seqs 64", replace(start, max_num_seqs=64)))
        if start.batched_tokens > 2048:
            changes.append(("--max-num-batched-tokens 2048", replace(start, batched_tokens=2048)))
        if not start.eager:
            changes.append(("--enforce-eager", replace(start, eager=True)))
    if share < 0.95:
        name = "--mem-fraction-static" if start.rules.is_sglang else "--gpu-memory-utilization"
        changes.append((f"{name} 0.95", replace(start, utilisation=0.95)))
    every = replace(
        start,
        max_num_seqs=min(start.max_num_seqs, 64),
        batched_tokens=min(start.batched_tokens, 2048),
        eager=start.eager or start.rules.engine is not Engine.SGLANG,
        utilisation=max(share, 0.95),
    )
    works = [(name, one) for name, one in changes if _starts(model, gpu, one, choice)]
    if not works and len(changes) > 1 and _starts(model, gpu, every, choice):
        works = [(" ".join(name for name, _ in changes), every)]
    for name, one in works:
        yield f"{name}: {_tokens(model, gpu, one, choice):,} KV tokens"
    for count in (start.num_gpus * factor for factor in (2, 4, 8)):
        try:
            more = _start(model, gpu, count, replace(choice, tp=None))
        except InvalidProblemError:
            continue
        if _starts(model, gpu, more, choice):
            yield f"{count} GPUs: {_tokens(model, gpu, more, choice):,} KV tokens"
            return


def _starts(model: ModelSpec, gpu: GpuType, start: Start, choice: EngineChoice) -> bool:
    return not _why_not(
        room := room_of(model, gpu, start), start, longest_context(room, model, gpu, start), choice.context_tokens
    )


def _tokens(model: ModelSpec, gpu: GpuType, start: Start, choice: EngineChoice) -> int:
    room = room_of(model, gpu, start)
    context = min(choice.context_tokens or model.max_position, longest_context(room, model, gpu, start))
    return int(requests_in(room, model, gpu, start, context) * context)


def _options(start: Start, choice: EngineChoice, context_tokens: int | None) -> tuple[str, ...]:
    """Return the engine's options that differ from its defaults, or are needed."""
    is_sglang, found = start.rules.is_sglang, list[str]()
    if start.tp > 1:
        found += ["--tp-size" if is_sglang else "--tensor-parallel-size", str(start.tp)]
    if start.stages > 1:
        found += ["--pp-size" if is_sglang else "--pipeline-parallel-size", str(start.stages)]
    if start.utilisation is not None:
        found += ["--mem-fraction-static" if is_sglang else "--gpu-memory-utilization", f"{start.utilisation:g}"]
    if context_tokens:
        found += ["--context-length" if is_sglang else "--max-model-len", str(context_tokens)]
    if choice.max_num_seqs is not None:
        found += ["--max-running-requests" if is_sglang else "--max-num-seqs", str(choice.max_num_seqs)]
    if choice.batched_tokens is not None:
        found += ["--chunked-prefill-size" if is_sglang else "--max-num-batched-tokens", str(choice.batched_tokens)]
    if start.eager:
        found += ["--disable-cuda-graph" if is_sglang else "--enforce-eager"]
    return tuple(found)


def version_of(choice: EngineChoice) -> str:
    """Return the version of the engine that is meant."""
    return choice.version or VERSIONS[choice.engine]
