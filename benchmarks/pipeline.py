"""The steady rate of a pipeline by the formula, compared with an event simulation of random pipelines.

    python -m benchmarks.pipeline [--quick] [--json] [alternating | roles]

The formula (docs/cost-model.md, "Rate") assumes that work flows evenly. With mean seconds ``u_s`` of an iteration,
``c_s`` copies and M micro-batches in flight, it gives ``1 / max(max_s u_s / c_s, sum_s u_s / M)`` iterations a second.
Really, iterations with and without a prefill chunk alternate, so that a queue in front of the bottleneck runs dry now
and then. Rows give the simulated rate over the formula's without slack (mean, 10th percentile, least), by how full the
pipeline is (K copies over all stages) and by how chunks come: one every fixed number of iterations of a micro-batch, or
at random. ``assumed`` is what the slack of `Assumptions` leaves of the formula's rate, and ``share_reaching`` the share
of pipelines that reach it.

``roles``: the simulator with pipelines of equal A100s that only prefill or only decode, with M of K, 1.5 K and 2 K.
Prompts of a prefill pipeline have one output token, so that no request waits to decode; a decode pipeline gets its
prompts from a GPU that takes a thousandth of the time; there is room for all KV, and links are fast. ``busy`` is the
share of time in which the busiest stage computes. ``rate`` is the rate over that of the even flow, with the chunks and
contexts that occurred, so that it may exceed 1. ``assumed`` is as above.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NO_LIMITS, fleet, problem
from benchmarks.measuring.saturating import Deck, steady_rate
from hetis.simulator.simulate import simulate
from hetis.simulator.values import Settings
from hetis.solver.check.fleet import Fleet, replica_shape
from hetis.solver.check.rederive import Rederivation
from hetis.solver.plan import KvRoute, ObjectiveKind, Plan, ReplicaPlan, Role, SolveResult, StagePlan, Status
from hetis.solver.problem import Assumptions, PlacementProblem
from hetis.solver.profile import Piece, Profile

GPU, OTHER = "A100-SXM-80GB", "H100-SXM-80GB"
HURRY = 1e-3  # factor of the other role's time
ROOM_BYTES = 1 << 44
LINK_BYTES_PER_S = 1e12
WITHOUT_SLACK = Assumptions(full_slack=0.0, tight_slack=0.0, full_unevenness=0.0, tight_unevenness=0.0)
SAMPLES = 40
MOST_REQUESTS = 60_000
UNCLAIMED = SolveResult(
    status=Status.FEASIBLE, objective=ObjectiveKind.THROUGHPUT, value=1.0, bound=1.0, gap=0.0, unit="", solve_s=0.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRole:
    """``stages`` A100s in a row with equal numbers of layers. b and C are 0 for the other role."""

    model: str
    workload: str
    stages: int  # K
    in_flight: int  # M
    micro_batch: int = 0  # b
    chunk_tokens: int = 0  # C

    @property
    def role(self) -> Role:
        return Role.DECODE if self.micro_batch else Role.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The share of the formula's rate that a pipeline keeps.

    ``rate`` is the simulated rate over that of the even flow, and ``busy`` the share of time in which the busiest stage
    computes. What ``busy`` lacks is slack. ``rate`` also lacks the difference between the formula's work and the true
    work.
    """

    rate: float
    busy: float
    slack: float  # assumed by the cost model


def measure(one: OneRole, *, iterations: int, requests: int) -> Kept:
    """Measure at least this many iterations and requests, with some always waiting."""
    posed = _problem(one)
    plan = _plan(one, posed)
    moments = posed.workload.moments()
    shape = replica_shape(plan.replicas[0], posed, Fleet.of(posed.cluster))
    even_s = Rederivation(replace(posed, assumptions=WITHOUT_SLACK)).of(shape).t_s
    each = moments.mean_output / one.micro_batch if one.micro_batch else moments.mean_prompt / one.chunk_tokens
    held = one.in_flight * max(one.micro_batch, round(1 / each), 1)
    count = int(min(MOST_REQUESTS, max(requests, 6 * held, iterations / each)))
    settings = Settings(dispatch=False, redispatch=False, sample_every_s=count * even_s / SAMPLES)
    run = simulate(plan, posed, Deck(posed.workload, count, 0), settings)
    assert run.series is not None, "it was asked for"
    times_s = run.series.times_s
    steady = (times_s > 0.25 * run.arrival_s.max()) & (times_s < run.arrival_s.max())
    ranks = [run.series.devices.index(name) for name in plan.replicas[0].devices()]
    return Kept(
        rate=steady_rate(run, held) * even_s,
        busy=float(run.series.busy_fraction[steady][:, ranks].mean(axis=0).max()),
        slack=Rederivation(posed).of(shape).t_s / even_s - 1.0,
    )


def _problem(one: OneRole) -> PlacementProblem:
    nodes = fleet("one role", (one.stages, 1, GPU), (1, 1, OTHER))
    posed = problem(nodes, model=one.model, workload=one.workload, objective=NO_LIMITS)
    profiles = {name: replace(profile, usable_bytes=ROOM_BYTES) for name, profile in posed.profiles.items()}
    profiles[OTHER] = _hurried(profiles[OTHER])
    network = posed.cluster.network
    network = replace(network, default=replace(network.default, bytes_per_s=LINK_BYTES_PER_S))
    workload = posed.workload
    if one.role is Role.PREFILL:
        workload = replace(workload, bins=tuple(replace(b, output_tokens=1.0) for b in workload.bins))
    return replace(posed, profiles=profiles, workload=workload, cluster=replace(posed.cluster, network=network))


def _hurried(profile: Profile) -> Profile:
    def sooner(piece: Piece) -> Piece:
        return Piece(**{part.name: HURRY * getattr(piece, part.name) for part in fields(piece)})

    return replace(profile, fits=tuple(replace(fit, pieces=tuple(map(sooner, fit.pieces))) for fit in profile.fits))


def _plan(one: OneRole, posed: PlacementProblem) -> Plan:
    devices = [device.name for device in posed.cluster.devices()]
    layers, zones = posed.model.num_layers, posed.cluster.zones()
    each, spare = divmod(layers, one.stages)
    stages, first = list[StagePlan](), 0
    for number, name in enumerate(devices[:-1]):
        held = each + (number < spare)
        stages.append(_stage(GPU, name, first, held, posed))
        first += held
    other = (_stage(OTHER, devices[-1], 0, layers, posed),)
    if one.role is Role.PREFILL:
        replicas = (
            _replica(Role.PREFILL, tuple(stages), M=one.in_flight, C=one.chunk_tokens, zones=zones),
            _replica(Role.DECODE, other, M=1, b=1),
        )
    else:
        replicas = (
            _replica(Role.DECODE, tuple(stages), M=one.in_flight, b=one.micro_batch),
            _replica(Role.PREFILL, other, M=1, C=2048, zones=zones),
        )
    prefill = 0 if one.role is Role.PREFILL else 1
    route = KvRoute(prefill=prefill, decode=1 - prefill, rate=1.0)
    return Plan(
        strategy="", family="", result=UNCLAIMED, objective=NO_LIMITS, replicas=replicas, kv_routes=(route,)
    )  # fmt: skip


def _stage(gpu: str, device: str, first: int, layers: int, posed: PlacementProblem) -> StagePlan:
    return StagePlan(
        gpu=gpu, tp=1, copies=1, first_layer=first, num_layers=layers, devices=(device,),
        kv_head_groups_kept=posed.model.head_groups,
    )  # fmt: skip


def _replica(
    role: Role, stages: tuple[StagePlan, ...], *, M: int, b: int = 0, C: int = 0, zones: tuple[str, ...] = ()
) -> ReplicaPlan:
    return ReplicaPlan(
        rate=1.0, ttft_s=0.0, tpot_s=0.0, micro_batch=b, in_flight=M, chunk_tokens=C, kv_tokens=0, stages=stages,
        role=role, kv_zones=zones,
    )  # fmt: skip


SEED = 1
MAX_STAGES = 6
MAX_COPIES = 3
IMBALANCE = 0.7  # the fastest stage needs this share of the slowest one's time
CHUNK_SHARES = (0.1, 0.9)  # range of phi, the share of iterations that carry a chunk
CHUNK_RATIOS = (2.0, 20.0)  # seconds of an iteration with a chunk over one without
FILLS = ("M = 1", "K <= M < 2K", "M >= 2K")
ROLE_MODELS = ("Llama-13B", "Llama-3.1-8B")
ROLE_WORKLOADS = (
    "sharegpt_first_turn_lengths", "humaneval_lengths", "azure_conv_2023", "longbench_lengths",
)  # fmt: skip
ROLE_STAGES = (2, 4)
PREFILL_CHUNK = 512
DECODE_SEATS = (4, 64)  # b


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A pipeline whose micro-batches circulate forever. Seconds are those of one iteration on one copy."""

    plain_s: tuple[float, ...]  # per stage, without a chunk
    chunk_ratio: float
    copies: tuple[int, ...]
    in_flight: int  # M
    chunk_share: float  # phi

    def even_rate(self, chunk_share: float) -> float:
        """Return the iterations per second if work flows evenly: the formula without slack."""
        mean_s = [s * (1.0 + chunk_share * (self.chunk_ratio - 1.0)) for s in self.plain_s]
        slowest_s = max(s / c for s, c in zip(mean_s, self.copies, strict=True))
        return 1.0 / max(slowest_s, sum(mean_s) / self.in_flight)


def main() -> None:
    """Print one row per fill and arrangement of chunks."""
    parser = rows.parser("benchmarks.pipeline", __doc__)
    parser.add_argument("what", nargs="?", choices=("alternating", "roles"), default="alternating")
    arguments = parser.parse_args()
    if arguments.what == "roles":
        rows.show(role_rows(quick=arguments.quick, only=arguments.only), arguments, name="pipeline roles")
        return
    pipelines, iterations = (10, 1000) if arguments.quick else (300, 3000)
    rows.show(measured_rows(pipelines, iterations, arguments.only), arguments, name="pipeline")


def measured_rows(num_pipelines: int, iterations: int, only: str = "") -> Iterator[rows.Row]:
    """Yield one row per arrangement of chunks and fill, each over ``num_pipelines`` random pipelines."""
    assumed = Assumptions()
    slacks = dict(zip(FILLS, (0.0, assumed.tight_slack, assumed.full_slack), strict=True))
    for chunks in ("evenly", "at random"):
        for fill in FILLS:
            name = f"{fill}, chunks {chunks}"
            if only not in name:
                continue
            rng = np.random.default_rng(SEED)
            kept = 1.0 / (1.0 + slacks[fill])
            pipelines = [random_pipeline(fill, rng) for _ in range(num_pipelines)]
            at_random = chunks == "at random"
            ratios = [ratio_to_formula(pipeline, iterations, rng, at_random=at_random) for pipeline in pipelines]
            worst = pipelines[int(np.argmin(ratios))]
            yield {
                "name": name,
                "pipelines": num_pipelines,
                "mean": float(np.mean(ratios)),
                "p10": float(np.quantile(ratios, 0.1)),
                "least": min(ratios),
                "slack": slacks[fill],
                "assumed": kept,
                "share_reaching": float(np.mean(np.array(ratios) >= kept * (1 - 1e-3))),
                "note": f"least: copies {'+'.join(map(str, worst.copies))}, M {worst.in_flight}, a chunk in"
                f" {worst.chunk_share:.0%} of iterations, {worst.chunk_ratio:.1f} times as long",
            }


def role_rows(*, quick: bool, only: str = "") -> Iterator[rows.Row]:
    """Yield one row per role, model, workload and size (K, and b of a decode pipeline)."""
    iterations, requests = (300, 100) if quick else (8000, 1500)
    carried = [(0, PREFILL_CHUNK), *((b, 0) for b in DECODE_SEATS)]
    for (b, chunk), model, workload, stages in itertools.product(carried, ROLE_MODELS, ROLE_WORKLOADS, ROLE_STAGES):
        what = f"decode b {b}" if b else f"prefill C {chunk}"
        name = f"{what}, {model}, {workload.partition('_')[0]}, K = {stages}"
        if only not in name:
            continue
        found = [
            measure(
                OneRole(
                    model=model,
                    workload=workload,
                    stages=stages,
                    in_flight=in_flight,
                    micro_batch=b,
                    chunk_tokens=chunk,
                ),
                iterations=iterations,
                requests=requests,
            )
            for in_flight in (stages, stages * 3 // 2, stages * 2)
        ]
        yield {"name": name, **_beside(found)}


def _beside(found: list[Kept]) -> dict[str, float]:
    cells: dict[str, float] = {}
    for fill, kept in zip(("k", "1.5k", "2k"), found, strict=True):
        cells |= {f"busy_{fill}": kept.busy, f"rate_{fill}": kept.rate}
    return cells | {"assumed_tight": 1 / (1 + found[0].slack), "assumed_full": 1 / (1 + found[-1].slack)}


def random_pipeline(fill: str, rng: np.random.Generator) -> Pipeline:
    """Return stages as an optimiser builds them: about equally busy, with different numbers of copies."""
    # One stage with one copy is left out, as there is no fill between one micro-batch and two per copy.
    stages = int(rng.integers(2, MAX_STAGES + 1))
    copies = rng.integers(1, MAX_COPIES + 1, stages)
    in_flight = _in_flight(fill, int(copies.sum()), rng)
    return Pipeline(
        plain_s=tuple(float(s) for s in rng.uniform(IMBALANCE, 1.0, stages) * copies),
        chunk_ratio=float(np.exp(rng.uniform(*np.log(CHUNK_RATIOS)))),
        copies=tuple(int(c) for c in copies),
        in_flight=in_flight,
        chunk_share=float(rng.uniform(*CHUNK_SHARES)),
    )


def ratio_to_formula(pipeline: Pipeline, iterations: int, rng: np.random.Generator, *, at_random: bool) -> float:
    """Return the simulated rate over the formula's, for the chunks that occurred."""
    carries_chunk = _chunks_at_random(pipeline, rng) if at_random else _chunks_evenly(pipeline, rng)
    rate, chunk_share = simulate_pipeline(pipeline, iterations, carries_chunk)
    return rate / pipeline.even_rate(chunk_share)


def simulate_pipeline(pipeline: Pipeline, iterations: int, carries_chunk: Callable[[int], bool]) -> tuple[float, float]:
    """Return the iterations per second once the pipeline has filled up, and the share of them with a chunk.

    Every stage serves first come, first served, on the copy that is free first. ``carries_chunk`` is called once for
    each iteration of a micro-batch, in order.
    """
    warm_up = iterations // 5
    free_s = [[0.0] * copies for copies in pipeline.copies]  # heaps
    stretch = [1.0] * pipeline.in_flight
    # (arrival, order, micro-batch, stage); the order keeps simultaneous arrivals first come, first served.
    events = [(0.0, m, m, 0) for m in range(pipeline.in_flight)]
    order, done, chunks, started_s, now_s = len(events), 0, 0, 0.0, 0.0
    while done < iterations:
        arrived_s, _, m, s = heapq.heappop(events)
        if s == 0:
            stretch[m] = pipeline.chunk_ratio if carries_chunk(m) else 1.0
        end_s = max(arrived_s, free_s[s][0]) + pipeline.plain_s[s] * stretch[m]
        heapq.heapreplace(free_s[s], end_s)
        order += 1
        if s + 1 < len(free_s):
            heapq.heappush(events, (end_s, order, m, s + 1))
            continue
        heapq.heappush(events, (end_s, order, m, 0))
        done += 1
        now_s = max(now_s, end_s)
        chunks += done > warm_up and stretch[m] > 1.0
        if done == warm_up:
            started_s = now_s
    counted = iterations - warm_up
    return counted / (now_s - started_s), chunks / counted


def _in_flight(fill: str, copies: int, rng: np.random.Generator) -> int:
    """Return a random M for a fill, up to three times the copies."""
    if fill == "M = 1":
        return 1
    if fill == "M >= 2K":
        return int(rng.integers(2 * copies, 3 * copies + 1))
    return int(rng.integers(copies, 2 * copies))


def _chunks_at_random(pipeline: Pipeline, rng: np.random.Generator) -> Callable[[int], bool]:
    return lambda _: bool(rng.random() < pipeline.chunk_share)


def _chunks_evenly(pipeline: Pipeline, rng: np.random.Generator) -> Callable[[int], bool]:
    """Let each micro-batch count up by the share and carry a chunk whenever it passes a whole number."""
    counted = [float(start) for start in rng.random(pipeline.in_flight)]

    def carries_chunk(m: int) -> bool:
        before = counted[m]
        counted[m] += pipeline.chunk_share
        return math.floor(counted[m]) > math.floor(before)

    return carries_chunk


if __name__ == "__main__":
    main()
