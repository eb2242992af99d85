"""The cost of wrong profiles: plans made with coefficients off by up to 20%, judged with the right ones.

    python -m benchmarks.robustness [--quick] [--json]

Hetis (SC'25) reports that errors of 20% in its coefficients cost at most 6.9% of latency. Here every coefficient of
every operator and GPU type is multiplied by its own factor, uniform between 0.8 and 1.2. A plan made with these
profiles is judged with the right ones, and compared with the plan made with the right ones. GPUs, layers and head
groups stay as planned. The engine (micro-batches, number in flight, chunks) adapts to the right times, which are what
it observes: to the highest rate within the limits (``goodput_loss``), and to the lowest latency that carries 75% of the
right plan's goodput (``latency_loss``, p95 TTFT + mean output x TPOT, relative to the right plan's at the same load;
negative if the wrong plan is faster, as the right one is the best for goodput and not for latency). ``over_limit``
counts the plans that miss a latency limit with the engine as planned, and ``too_slow`` those that cannot carry that
load.

Rows called dispatch place a batch of 64 requests on an idle stage by wrong attention and transfer coefficients, which
is what the paper's models predict. Their ``latency_loss`` is that of one layer's attention on the slowest device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import example, fleet, problem
from benchmarks.measuring.rows import Row
from hetis.formats.catalogue import find_gpu
from hetis.formats.documents import load_model
from hetis.planner.jobs.kernels import compile_kernels
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan, Profiles
from hetis.planner.use_cases.robustness.profile_errors import corners, perturbed
from hetis.profiler.roofline import modelled_profile
from hetis.solver.budget import Budget, silent
from hetis.solver.dispatch.problem import (
    DeviceLoad,
    DispatchProblem,
    HeadShape,
    IntArray,
    Primary,
    Requests,
    Stage,
)
from hetis.solver.dispatch.solve import solve_dispatch
from hetis.solver.dispatch.tables import costs_of, empty_placement, makespan, running_load
from hetis.solver.plan import Objective, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op

MODEL = "Llama-2-70B"
LINK_BYTES_PER_S, LINK_S = 12.5e9, 4e-5  # 100 Gb/s; round trip
PLENTY = 10**7  # number of KV blocks, more than any request needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """A stage: a primary of ``tp`` cards, and attention workers by GPU type."""

    primary: str
    tp: int
    workers: Sequence[str]


def stage_of(cards: Cards) -> Stage:
    """Return an idle stage of catalogue GPUs on a 100 Gb/s network, with modelled costs."""
    model = load_model(MODEL)
    heads = HeadShape.of_model(model)
    names = [cards.primary, *cards.workers]
    flops_per_byte = model.decode_attention_flops(1.0, heads.queries_per_group) / heads.kv_bytes_per_token
    pieces, hops = [], []
    for name in names:
        profile = modelled_profile(find_gpu(name).gpu)
        attention, transfer = profile.fit(Op.DECODE_ATTENTION, model, 1), profile.fit(Op.TRANSFER, model, 1)
        assert attention is not None
        assert transfer is not None
        piece, hop = attention.pieces[0], transfer.pieces[0]
        pieces.append((piece.head_s, piece.byte_s + piece.flop_s * flops_per_byte, piece.fixed_s))
        hops.append((hop.byte_s + hop.wire / LINK_BYTES_PER_S, hop.fixed_s + LINK_S))
    attention_costs, exchange_costs = np.array(pieces), np.array(hops)
    return Stage(
        heads=heads,
        devices=tuple(f"{name} {number}" for number, name in enumerate(names)),
        head_s=attention_costs[:, :1],
        kv_byte_s=attention_costs[:, 1:2],
        call_s=attention_costs[:, 2:],
        transfer_byte_s=exchange_costs[:, 0],
        transfer_s=exchange_costs[:, 1],
        primary=Primary(
            device=0, tp=cards.tp, nic_byte_s=float(exchange_costs[0, 0]), nic_s=float(exchange_costs[0, 1])
        ),
    )


def wrong_stage(stage: Stage, error: float, rng: np.random.Generator) -> Stage:
    """Multiply every coefficient of every GPU type by a separate factor between ``1 - error`` and ``1 + error``."""
    types = [name.split()[0] for name in stage.devices]
    factors = {name: rng.uniform(1.0 - error, 1.0 + error, 5) for name in dict.fromkeys(types)}
    by = np.array([factors[name] for name in types])
    return replace(
        stage,
        head_s=stage.head_s * by[:, :1],
        kv_byte_s=stage.kv_byte_s * by[:, 1:2],
        call_s=stage.call_s * by[:, 2:3],
        transfer_byte_s=stage.transfer_byte_s * by[:, 3],
        transfer_s=stage.transfer_s * by[:, 4],
    )


def batch(rng: np.random.Generator, size: int) -> Requests:
    """Return requests like those of a chat service: about 1,500 tokens on average, with a long tail."""
    return Requests(
        ids=tuple(f"r{j}" for j in range(size)),
        context_tokens=np.clip(rng.lognormal(6.7, 1.1, size), 16, 30_000).astype(np.int64),
        growth_tokens=np.full(size, 200),
    )


def slowdown(right: Stage, wrong: Stage, requests: Requests) -> tuple[float, bool]:
    """Return how much longer a layer's attention takes when placed by ``wrong``, and whether the placement differs."""
    num = right.num_devices
    idle = DeviceLoad(heads=np.zeros(num, np.int64), kv_bytes=np.zeros(num), free_blocks=np.full(num, PLENTY))
    best, taken = (
        solve_dispatch(DispatchProblem(stage=stage, load=idle, requests=requests)).groups for stage in (right, wrong)
    )
    loss = seconds_of(right, taken, requests) / seconds_of(right, best, requests) - 1.0
    return loss, not np.array_equal(best, taken)


def seconds_of(stage: Stage, groups: IntArray, requests: Requests) -> float:
    """Return the seconds of the slowest device if ``groups`` [J, D] were running there."""
    heads = groups.sum(axis=0) * stage.heads.queries_per_group
    kv_bytes = (requests.context_tokens @ groups).astype(np.float64) * stage.heads.kv_bytes_per_token
    costs = costs_of(stage)
    loaded, nothing = running_load(costs, heads, kv_bytes), np.zeros(0, np.int64)
    return float(makespan(loaded, empty_placement(loaded, np.zeros(stage.num_devices, np.int64), nothing, nothing)))


ERROR = 0.2
SAMPLES, SAMPLES_QUICK = 20, 2
LOAD = 0.75
LIMIT_S = 30.0  # CPU seconds, so that other work on the machine does not cut searches short
DISPATCHES, BATCH = 500, 64
STAGES = {
    "dispatch, paper: A100 TP4, 4 RTX-3090, 4 P100": Cards(
        primary="A100-PCIe-80GB", tp=4, workers=(*["RTX-3090"] * 4, *["P100-PCIe-12GB"] * 4)
    ),
    "dispatch, H100 TP2, 8 P100": Cards(primary="H100-SXM-80GB", tp=2, workers=["P100-PCIe-12GB"] * 8),
    "dispatch, A100 TP4, 8 L4": Cards(primary="A100-SXM-80GB", tp=4, workers=["L4"] * 8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A problem to plan with right and with wrong profiles."""

    name: str
    problem: PlacementProblem
    gap: float = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The cost of one wrong plan, as shares of the right plan's values; ``latency`` is infinite if it is too slow."""

    same_replicas: bool
    goodput: float
    over_limit: bool
    latency: float


def main() -> None:
    """Print all rows."""
    arguments = rows.parser("benchmarks.robustness", __doc__).parse_args()
    rows.exit_if_crashed(rows.show(all_rows(quick=arguments.quick, only=arguments.only), arguments, name="robustness"))


def all_rows(*, quick: bool, only: str = "") -> Iterator[Row]:
    """Yield a row of random errors and one of corner cases for every fleet."""
    for case in cases(quick=quick):
        if only in case.name:
            yield from _rows(case, SAMPLES_QUICK if quick else SAMPLES, with_corners=not quick)
    for name, cards in STAGES.items():
        if only in name:
            yield _dispatch_row(name, cards, 3 if quick else DISPATCHES)


def cases(*, quick: bool) -> list[Case]:
    """Return Llama-2-70B on the paper's cluster and on others."""

    first = [Case(name="paper, 12 GPUs", problem=problem(example("paper"), objective=Objective(ttft_limit_s=5.0)))]
    if quick:
        return first
    three = fleet("24 GPUs", (1, 8, "A100-SXM-80GB"), (4, 2, "RTX-3090"), (2, 4, "L4"))
    return [
        *first,
        Case(name="h100-p100, 10 GPUs", problem=problem(example("h100-p100"))),
        Case(name="h100-l4, 8000/300", problem=problem(example("h100-l4"), workload="8000/300")),
        Case(name="A100, 3090, L4: 24 GPUs", problem=problem(three), gap=0.005),
        Case(name="fleet-160", problem=problem(example("fleet-160")), gap=0.005),
    ]


def _rows(case: Case, samples: int, *, with_corners: bool) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    compile_kernels(case.problem.cluster.num_gpus(), ("hetis",), report=silent)  # longer than the time limit
    right = _solved(case, case.problem.profiles)
    drawn = [perturbed(case.problem.profiles, ERROR, rng) for _ in range(samples)]
    yield _row(case, right, "random", drawn)
    if with_corners:
        edges = corners(case.problem.profiles, ERROR, gpus=list(case.problem.profiles))
        yield _row(case, right, "corners", [corner.profiles for corner in edges])


def _solved(case: Case, profiles: Profiles) -> Plan:
    posed = replace(case.problem, profiles=profiles)
    return solve_placement(posed, gap_target=case.gap, budget=Budget(time_limit_s=LIMIT_S, clock=time.process_time))


def _row(case: Case, right: Plan, errors: str, wrong: Sequence[Profiles]) -> Row:
    judge = Judge(case.problem, right)
    losses = [judge.loss_of(_solved(case, profiles), profiles) for profiles in wrong]
    carried = sorted(loss.latency for loss in losses if loss.latency < math.inf)
    return {
        "name": f"{case.name}, {errors}",
        "status": right.result.status.value,
        "value": right.result.value,
        "gap": right.result.gap,
        "plans": len(losses),
        "other_replicas": sum(not loss.same_replicas for loss in losses),
        "mean_goodput_loss": _mean([loss.goodput for loss in losses]),
        "worst_goodput_loss": max(loss.goodput for loss in losses),
        "over_limit": sum(loss.over_limit for loss in losses),
        "mean_latency_loss": _mean(carried),
        "worst_latency_loss": carried[-1] if carried else None,
        "too_slow": len(losses) - len(carried),
    }


def _dispatch_row(name: str, cards: Cards, count: int) -> Row:
    rng = np.random.default_rng(0)
    right = stage_of(cards)
    losses = [slowdown(right, wrong_stage(right, ERROR, rng), batch(rng, BATCH)) for _ in range(count)]
    return {
        "name": name,
        "status": "feasible",
        "value": None,
        "gap": None,
        "plans": count,
        "other_replicas": sum(differs for _, differs in losses),
        "mean_goodput_loss": None,
        "worst_goodput_loss": None,
        "over_limit": 0,
        "mean_latency_loss": _mean([loss for loss, _ in losses]),
        "worst_latency_loss": max(loss for loss, _ in losses),
        "too_slow": 0,
    }


class Judge:
    """Compares plans with the ``right`` one, using the profiles of ``posed``."""

    def __init__(self, posed: PlacementProblem, right: Plan) -> None:
        self._posed = posed
        self._right = FixedPlan(right, posed)
        self._rate = self._right.within_limits(posed.profiles).rate
        self._latency_s = self._right.latency_s(posed.profiles, LOAD * self._rate)

    def loss_of(self, wrong: Plan, profiles: Profiles) -> Loss:
        """Return the cost of a plan made with wrong ``profiles``."""
        posed, other = self._posed, FixedPlan(wrong, self._posed, made_with=profiles)
        return Loss(
            same_replicas=self._right.structure == other.structure,
            goodput=1.0 - other.within_limits(posed.profiles).rate / self._rate,
            over_limit=other.as_planned(posed.profiles).misses(posed.objective),
            latency=other.latency_s(posed.profiles, LOAD * self._rate) / self._latency_s - 1.0,
        )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    main()
