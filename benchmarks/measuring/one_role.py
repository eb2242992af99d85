"""Pipelines that only prefill or only decode, without interference.

A prefill pipeline gets prompts with one output token, so that no request waits to decode. A decode pipeline gets its
prompts from a GPU that takes a thousandth of the time. There is room for all KV, and links are fast.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

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
