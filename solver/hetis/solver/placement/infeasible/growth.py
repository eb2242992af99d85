"""The cheapest GPUs to add: for every offered type the fewest with which a plan exists, the lowest rent first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from hetis.solver.cluster import GpuSlots, GpuType, NodeGroup
from hetis.solver.constraints import AtMost
from hetis.solver.placement.infeasible.relaxations import Relaxation, demand_of
from hetis.solver.placement.infeasible.requirements import Requirement, Subject, keeping
from hetis.solver.placement.infeasible.trials import Trials
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Profile

PER_NODE = 8
COUNTS = (*range(1, PER_NODE + 1), 16, 24, 32, 48, 64)  # GPUs to add: up to one node, then whole nodes
OF_MARKET = 2  # types of the market that are tried for each kind of promise
ADDED = "added"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A GPU type that could be rented, at its own price in ``gpu``."""

    gpu: GpuType
    profile: Profile

    @property
    def usd_per_hour(self) -> float:
        return float("inf") if self.gpu.usd_per_hour is None else self.gpu.usd_per_hour


Market = Callable[[], Sequence[Offer]]


def growths(trials: Trials, kept: Collection[Requirement], market: Market) -> Iterator[Relaxation]:
    """Yield what to add so that all of ``kept`` can be kept, the cheapest first."""
    problem = keeping(trials.problem, kept)
    found: list[tuple[float, Relaxation]] = []
    for offer in () if trials.is_over() else _offers(trials.problem, market):
        if trials.is_over():
            break
        trials.tell(f"no plan exists: trying {offer.gpu.name} to add")
        enough = min((usd for usd, _ in found), default=float("inf"))
        fewest = _fewest(trials, problem, demand_of(kept), offer, enough)
        if fewest is not None:
            usd = fewest * offer.usd_per_hour
            found.append((usd, _relaxation(offer, fewest, usd)))
    yield from (relaxation for _, relaxation in sorted(found, key=lambda one: one[0]))


def _relaxation(offer: Offer, count: int, usd: float) -> Relaxation:
    rent = f", {usd:.4g} USD/h" if usd < float("inf") else ""
    nodes = f"{count // PER_NODE} nodes of {PER_NODE}" if count > PER_NODE else "one node"
    change = f"add {count} {offer.gpu.name}"
    sentence = f"{change} ({nodes}{rent}): a plan exists, with fewer of them none was found"
    return Relaxation(
        about=None, sentence=sentence, change=change, usd_per_hour=usd if usd < float("inf") else None
    )  # fmt: skip


def _offers(problem: PlacementProblem, market: Market) -> list[Offer]:
    """Return the fleet's own types, then the market's with the cheapest memory, cheapest bandwidth, most bandwidth."""
    offers: dict[str, Offer] = {}
    for name in dict.fromkeys(slots.gpu for group in problem.cluster.node_groups for slots in group.gpus):
        offers[name] = Offer(gpu=problem.cluster.gpu_types[name], profile=problem.profiles[name])
    others = [offer for offer in market() if offer.gpu.name not in offers]
    promises: tuple[Callable[[Offer], float], ...] = (
        lambda offer: offer.usd_per_hour / offer.profile.usable_bytes,
        lambda offer: offer.usd_per_hour / offer.gpu.mem_bytes_per_s,
        lambda offer: -offer.gpu.mem_bytes_per_s,
    )
    for promise in promises:
        offers |= {offer.gpu.name: offer for offer in sorted(others, key=promise)[:OF_MARKET]}
    return list(offers.values())


def _fewest(
    trials: Trials, problem: PlacementProblem, demand_rps: float, offer: Offer, enough_usd: float
) -> int | None:  # fmt: skip
    """Return the fewest of `COUNTS` with which a plan exists below a rent, or None if none was found."""
    counts = [n for n in COUNTS if n * offer.usd_per_hour < enough_usd or enough_usd == float("inf")]
    if not counts or trials.is_refuted_at_once(with_added(problem, offer, counts[-1]), demand_rps):
        return None
    last = len(counts) - 1
    low, high, step = -1, -1, 0  # indices in counts: no plan exists at `low`, one does at `high`
    while step < len(counts):
        if trials.of_problem(with_added(problem, offer, counts[step]), demand_rps).exists:
            high = step
            break
        if trials.is_over():
            return None
        low, step = step, len(counts) if step == last else min(2 * step + 1, last)
    if high < 0:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if trials.of_problem(with_added(problem, offer, counts[middle]), demand_rps).exists:
            high = middle
        else:
            low = middle
    fewest: int = counts[high]
    return fewest


def with_added(problem: PlacementProblem, offer: Offer, count: int) -> PlacementProblem:
    """Return the problem with ``count`` more GPUs in new nodes on the fleet's network, in its first zone."""
    cluster = problem.cluster
    per_node = min(count, PER_NODE)
    zones = cluster.zones()
    group = NodeGroup(
        name=ADDED,
        gpus=(GpuSlots(gpu=offer.gpu.name, count=per_node),),
        count=count // per_node,
        numbered=True,
        zone=zones[0] if zones else "default",
    )
    grown = replace(
        cluster,
        node_groups=(*cluster.node_groups, group),
        gpu_types={offer.gpu.name: offer.gpu, **cluster.gpu_types},
    )
    return replace(problem, cluster=grown, profiles={offer.gpu.name: offer.profile, **problem.profiles})


def may_help(members: Collection[Requirement]) -> bool:
    """Return whether more GPUs could resolve this conflict: not if it limits GPUs or consists of constraints alone."""
    if any(isinstance(m.constraint, AtMost) for m in members):
        return False
    return any(m.subject in (Subject.DEMAND, Subject.MEMORY, Subject.TPOT, Subject.TTFT) for m in members)
