"""Time and quality of a dispatch, from 12 devices to 1,024, in thread CPU time with all solvers in one process.

    python -m benchmarks.dispatch [--quick] [--json]

A row covers thousands of instances of one size with different arrivals, running loads and mixes of GPUs. ``p50_ms`` and
``p99_ms`` cover building the problem from arrays, solving the relaxation, rounding and improving. ``path`` is the share
of instances that took each path. The same instances are solved by HiGHS alone (the relaxation from arrays, at the
fastest of several settings).
``mean_gap_to_relaxation`` is the gap to the certified bound; ``p50_``, ``p95_``, ``p99_`` and ``max_`` are quantiles
of the same gap.

Loads: *balanced*, all devices end within what the arrivals will fill; *imbalanced*, the running load decides which
is slowest; *nearly full*, balanced with 1.2 times the KV blocks that the arrivals need, unevenly spread. The GPUs are
those of the catalogue with modelled profiles; with three pieces, cost curves bend around the running load.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt

from benchmarks.measuring import rows
from benchmarks.measuring.instances import fleet
from benchmarks.measuring.rows import Row
from hetis.formats.documents import load_model
from hetis.profiler.roofline import modelled_profile
from hetis.solver.dispatch.dispatch_problem import (
    DeviceLoad,
    DispatchPlan,
    DispatchProblem,
    HeadShape,
    Primary,
    Requests,
    Stage,
)
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.loaded_stage import costs_of, running_load
from hetis.solver.dispatch.lp import LpProblem, RelaxationModel
from hetis.solver.profile import Op

SIZES = ((12, 1), (12, 8), (64, 8), (64, 64), (256, 32), (1024, 16))
LOADS = ("balanced", "imbalanced", "nearly full")
GPUS = ("H100-SXM-80GB", "A100-SXM-80GB", "L40S", "L4", "V100-SXM2-32GB", "T4", "A10G", "P100-PCIe-12GB", "RTX-3090")
MODEL = "Llama-2-70B"
LEVEL_S = (2e-4, 6e-4)  # range of a layer's attention time from which the running level is drawn
FREE_RATIO = 1.2
STAGES = 20  # mixes of GPUs per row
SETTINGS: dict[str, dict[str, Any]] = {
    "primal simplex": {"solver": "simplex", "simplex_strategy": 4, "presolve": "off"},
    "dual simplex": {"solver": "simplex", "simplex_strategy": 1, "presolve": "off"},
    "dual simplex, presolved": {"solver": "simplex", "simplex_strategy": 1, "presolve": "on"},
    "primal simplex, last basis": {"solver": "simplex", "simplex_strategy": 4, "presolve": "off"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The parameters of a row."""

    devices: int
    arrivals: int
    pieces: int
    load: str
    instances: int
    compared: int  # instances that HiGHS solves too

    @property
    def name(self) -> str:
        pieces = "1 piece" if self.pieces == 1 else f"{self.pieces} pieces"
        return f"{self.devices} x {self.arrivals}, {self.load}, {pieces}"


def main() -> None:
    """Print all rows."""
    arguments = rows.parser("benchmarks.dispatch", __doc__).parse_args()
    chosen = [case for case in cases(quick=arguments.quick) if arguments.only in case.name]
    rows.show(map(measured, chosen), arguments, name="dispatch")


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield every size, load and number of pieces, or three of them for ``quick``."""
    if quick:
        for load in LOADS:
            yield Case(devices=12, arrivals=8, pieces=3, load=load, instances=100, compared=4)
        return
    for load in LOADS:
        for pieces in (1, 3):
            for devices, arrivals in SIZES:
                cells = devices * arrivals
                yield Case(
                    devices=devices,
                    arrivals=arrivals,
                    pieces=pieces,
                    load=load,
                    instances=2000 if cells <= 512 else 500,
                    compared=20 if cells <= 512 else 6 if cells <= 4096 else 3,
                )


# --- instances


def instances(case: Case) -> Iterator[DispatchProblem]:
    """Yield random problems of a case. Every ``STAGES``-th has the same stage."""
    rng = np.random.default_rng([case.devices, case.arrivals, case.pieces, LOADS.index(case.load)])
    heads = HeadShape.of_model(load_model(MODEL))
    levels = rng.uniform(*LEVEL_S, STAGES)
    stages = [random_stage(rng, case, heads, level) for level in levels]
    for index in range(case.instances):
        stage, level = stages[index % STAGES], levels[index % STAGES]
        requests = random_requests(rng, case.arrivals)
        yield DispatchProblem(stage=stage, load=random_load(rng, case, stage, requests, level), requests=requests)


def random_stage(rng: np.random.Generator, case: Case, heads: HeadShape, level_s: float) -> Stage:
    """Return a stage with random GPUs. In half of the stages, device 0 is a primary of four GPUs."""
    cards = np.array([_card(gpu, heads) for gpu in rng.choice(GPUS, case.devices)]).T
    head_s, byte_s, call_s, transfer_byte_s, transfer_s = cards * rng.uniform(0.97, 1.03, cards.shape)
    # Three pieces: cheaper bytes below a knee near the running load, more expensive ones above another.
    running = (level_s - call_s) / byte_s
    slopes = np.array([0.8, 1.0, 1.15])[None, -case.pieces :] if case.pieces > 1 else np.ones((1, 1))
    knees = running[:, None] * rng.uniform(0.85, 1.03, (case.devices, case.pieces))
    pieces_byte_s = byte_s[:, None] * slopes
    pieces_call_s = np.maximum(0.0, call_s[:, None] + (byte_s[:, None] - pieces_byte_s) * knees + 0.2 * level_s)
    primary = None
    if rng.random() < 0.5:
        primary = Primary(device=0, tp=4, nic_byte_s=0.0, nic_s=1e-5)
    return Stage(
        heads=heads,
        devices=tuple(f"d{i}" for i in range(case.devices)),
        head_s=np.repeat(head_s[:, None], case.pieces, axis=1),
        kv_byte_s=pieces_byte_s,
        call_s=pieces_call_s,
        transfer_byte_s=transfer_byte_s,
        transfer_s=transfer_s,
        primary=primary,
    )


_CARDS: dict[str, tuple[float, ...]] = {}


def _card(gpu: str, heads: HeadShape) -> tuple[float, ...]:
    """Return a catalogue GPU's seconds per head, KV byte, call, exchanged byte and exchange, on 100 Gb/s."""
    if gpu not in _CARDS:
        model = load_model(MODEL)
        profile = modelled_profile(fleet("cards", (1, 1, gpu)).gpu_types[gpu])
        attention, transfer = profile.fit(Op.DECODE_ATTENTION, model, 1), profile.fit(Op.TRANSFER, model, 1)
        assert attention is not None
        assert transfer is not None
        piece, hop = attention.pieces[0], transfer.pieces[0]
        flops_per_byte = model.decode_attention_flops(1.0, heads.queries_per_group) / heads.kv_bytes_per_token
        _CARDS[gpu] = (
            piece.head_s,
            piece.byte_s + piece.flop_s * flops_per_byte,
            piece.fixed_s,
            hop.byte_s + hop.wire / 12.5e9,
            hop.fixed_s + 4e-5,
        )
    return _CARDS[gpu]


def random_requests(rng: np.random.Generator, arrivals: int) -> Requests:
    """Return prompts like those of a chat service, with a mean of about 1,500 tokens and a long tail."""
    return Requests(
        ids=tuple(f"r{j}" for j in range(arrivals)),
        context_tokens=np.clip(rng.lognormal(6.7, 1.1, arrivals), 16, 30_000).astype(np.int64),
        growth_tokens=rng.integers(50, 600, arrivals),
    )


def random_load(rng: np.random.Generator, case: Case, stage: Stage, requests: Requests, level_s: float) -> DeviceLoad:
    """Return running heads whose KV bytes make devices finish at the level, less the slack of the case's load."""
    costs = costs_of(stage)
    heads = rng.integers(10, 100, case.devices) * 4 * stage.heads.queries_per_group
    mean_context = float(requests.context_tokens.mean())
    group_s = costs.alpha.max(axis=1) + costs.beta.max(axis=1) * mean_context
    if case.load == "imbalanced":
        target = level_s * rng.uniform(0.4, 1.0, case.devices)
    else:
        arriving = min(1.0, stage.heads.head_groups * case.arrivals / case.devices)
        target = level_s - group_s * rng.uniform(0.0, arriving, case.devices)
    idle = DeviceLoad(heads=heads, kv_bytes=np.zeros(case.devices), free_blocks=np.zeros(case.devices, np.int64))
    without = running_load(costs, idle.heads, idle.kv_bytes).base
    kv_bytes = np.maximum(0.0, ((target[:, None] - without) / costs.byte_s).min(axis=1))
    free_blocks = np.full(case.devices, 10**6, np.int64)
    if case.load == "nearly full":
        needed = stage.heads.head_groups * int(requests.blocks(stage.heads.block_tokens).sum())
        largest = int(requests.blocks(stage.heads.block_tokens).max())
        shares = rng.dirichlet(np.full(case.devices, 3.0))
        free_blocks = np.floor(FREE_RATIO * needed * shares + rng.integers(0, largest + 1, case.devices)).astype(
            np.int64
        )
    return DeviceLoad(heads=heads, kv_bytes=kv_bytes, free_blocks=free_blocks)


# --- measuring


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A dispatch with its thread CPU seconds."""

    problem: DispatchProblem
    plan: DispatchPlan
    seconds: float


def measured(case: Case) -> Row:
    """Return one row."""
    dispatched = dispatch_all(case)
    # All instances share a stage, so solvers may reuse what does not change.
    compared = [timed.problem for timed in dispatched[::STAGES]][: case.compared]
    setting, highs_s = best_of({name: highs_seconds(compared, name, options) for name, options in SETTINGS.items()})
    seconds = [timed.seconds for timed in dispatched]
    to_relaxation = [timed.plan.gap for timed in dispatched]
    p50 = float(np.median(seconds))
    return {
        "name": case.name,
        "devices": case.devices,
        "arrivals": case.arrivals,
        "pieces": case.pieces,
        "load": case.load,
        "path": shares(timed.plan.path.value for timed in dispatched),
        "p50_ms": 1e3 * p50,
        "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
        "highs_p50_ms": 1e3 * highs_s,
        "mean_gap_to_relaxation": float(np.mean(to_relaxation)),
        **quantiles(to_relaxation, "gap_to_relaxation"),
        "unplaced": sum(len(timed.plan.unplaced) for timed in dispatched),
        "instances": case.instances,
        "note": f"HiGHS: {setting}",
    }


def dispatch_all(case: Case) -> list[Timed]:
    """Dispatch every instance; the time includes building the problem from arrays. The stages are warm."""
    dispatchers: dict[int, Dispatcher] = {}
    result = []
    for problem in list(instances(case)):  # built in advance, so that no dispatch is timed with cold caches
        key = id(problem.stage)
        if key not in dispatchers:
            dispatchers[key] = Dispatcher(problem.stage)
            dispatchers[key].dispatch(problem.load, problem.requests)
        given, new = problem.load, problem.requests
        started = time.thread_time()
        load = DeviceLoad(heads=given.heads, kv_bytes=given.kv_bytes, free_blocks=given.free_blocks)
        requests = Requests(ids=new.ids, context_tokens=new.context_tokens, growth_tokens=new.growth_tokens)
        plan = dispatchers[key].dispatch(load, requests)
        result.append(Timed(problem=problem, plan=plan, seconds=time.thread_time() - started))
    return result


def quantiles(values: Sequence[float], name: str) -> dict[str, float]:
    """Return ``p50_NAME``, ``p95_NAME``, ``p99_NAME`` and ``max_NAME`` of the values."""
    found = {f"p{percent}_{name}": float(np.percentile(values, percent)) for percent in (50, 95, 99)}
    return found | {f"max_{name}": float(np.max(values))}


def best_of(seconds: dict[str, float]) -> tuple[str, float]:
    """Return the fastest name and its time."""
    name = min(seconds, key=lambda name: seconds[name])
    return name, seconds[name]


def shares(names: Iterator[str]) -> str:
    """Return the share of each name, such as ``chain 98%, lp 2%``."""
    counted = Counter(names)
    return ", ".join(f"{name} {count / counted.total():.1%}" for name, count in counted.most_common())


# --- other solvers


def highs_seconds(problems: Sequence[DispatchProblem], name: str, options: dict[str, Any]) -> float:
    """Return the median thread CPU seconds of the whole linear program, built from arrays. The solver is reused."""
    highs: Any = highspy.Highs()
    highs.silent()
    highs.setOptionValue("threads", 1)
    for option, value in options.items():
        highs.setOptionValue(option, value)
    seconds, basis = [], None
    for problem in problems:
        costs = costs_of(problem.stage)
        load, requests = problem.load, problem.requests
        started = time.thread_time()
        lp = LpProblem(
            stage=running_load(costs, load.heads, load.kv_bytes),
            free_blocks=load.free_blocks,
            contexts=requests.context_tokens,
            blocks=requests.blocks(problem.stage.heads.block_tokens),
        )
        is_open: npt.NDArray[np.bool_] = np.ones(problem.stage.num_devices, np.bool_)
        everything = np.indices((len(requests.ids), problem.stage.num_devices)).reshape(2, -1)
        highs.passModel(RelaxationModel(lp, is_open, 1e4).program(everything[0], everything[1]))
        if basis is not None and name.endswith("last basis"):
            highs.setBasis(basis)
        highs.run()
        seconds.append(time.thread_time() - started)
        basis = highs.getBasis()
    return float(np.median(seconds))


if __name__ == "__main__":
    main()
