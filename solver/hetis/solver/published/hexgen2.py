"""`hexgen2-paper`: HexGen-2's own heuristic (ICLR'25, arXiv 2502.07903) under our cost model.

    A  partition   GPUs into K serving groups, K = floor(memory / memory of a replica); groups into prefill and decode
    B  evaluate    the best replica of every group, then the maximum flow through all of them
    C  refine      swaps guided by the flow, until none raises it

What the paper leaves open, and what our model asks for beyond it:

- The memory of a replica is its weights and the KV of a few requests (`memory.py`). A fleet with memory for fewer than
  two groups is still cut in two: nothing can be served with one.
- Prefill and decode replicas lie in one zone each, so the fleet is partitioned zone by zone. KV goes to other zones
  only if all prefill replicas may send there (over slower links): both ways are tried, the better one is kept.
- A group that fits no replica idles. Where no request can be served, it is tried again with one group less.
- It maximises the rate, whatever the objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hetis.solver.budget import Budget, Report, silent
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.solve import replica_plan
from hetis.solver.placement.tables import Atlas
from hetis.solver.placement.tabulation import build_atlas
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.bipartition import coarsened, maximum_cut
from hetis.solver.published.graph import FleetGraph, fleet_graph
from hetis.solver.published.memory import replica_bytes
from hetis.solver.published.naming import named_stages
from hetis.solver.published.parallelism import ReplicaSearch
from hetis.solver.published.partition import Part, refine, spectral_partition
from hetis.solver.published.pipelines import duty_of
from hetis.solver.published.plans import Answer, plan_of
from hetis.solver.published.swaps import Arrangement, Evaluated, Network, improved

MAX_GPUS = 1024  # the partition works on dense matrices over GPUs

NOTES = (
    "a heuristic as published, without a proof of its own: the bound is that of the fleet's dense work",
    "HexGen-2 reconstructed: recursive Fiedler bisection by memory, changes of sides among the guided swaps, groups "
    "inside zones, one TP degree per GPU type of a group (docs/strategies.md)",
)


def solve_hexgen2(problem: PlacementProblem, *, budget: Budget, seed: int, report: Report) -> Plan:
    """The plan that HexGen-2's heuristic finds.

    Raises:
        NoPlanFoundError: it finds none, which proves nothing.
    """
    if problem.cluster.num_gpus() > MAX_GPUS:
        size = problem.cluster.num_gpus()
        raise NoPlanFoundError(f"hexgen2-paper partitions GPU by GPU: {size} GPUs, it is meant for {MAX_GPUS} at most")
    atlas = build_atlas(problem)
    if not atlas.ranks or problem.cluster.num_gpus() < 2:
        raise NoPlanFoundError("hexgen2-paper needs two GPUs at least, one to prefill and one to decode")
    rooms = [problem.profiles[c.gpu].usable_bytes - problem.profiles[c.gpu].reserve_bytes for c in atlas.classes]
    graph = fleet_graph(problem.cluster, atlas.classes, rooms)
    search = ReplicaSearch(atlas)
    networks = [_network(atlas, graph, search, sends_afar) for sends_afar in _reaches(problem)]
    for counts in _group_counts(atlas, graph):
        found = [_solve(atlas, network, counts, budget, seed, report) for network in networks]
        best = max(range(len(found)), key=lambda i: found[i].flow.value)
        if found[best].flow.value > 0.0:
            return _plan(atlas, networks[best], found[best], budget)
        if budget.is_spent():
            break
    raise NoPlanFoundError("hexgen2-paper found no prefill and decode groups that serve a request within the limits")


def _reaches(problem: PlacementProblem) -> tuple[bool, ...]:
    return (False, True) if len(problem.cluster.zones()) > 1 else (False,)


def _group_counts(atlas: Atlas, graph: FleetGraph) -> Iterator[dict[str, int]]:
    """Groups of every zone: as many as memory allows, two in all at least; then ever fewer."""
    needed = replica_bytes(atlas)
    members = {zone: [i for i, z in enumerate(graph.zones) if z == zone] for zone in dict.fromkeys(graph.zones)}
    room = {zone: float(graph.room_bytes[gpus].sum()) for zone, gpus in members.items()}
    counts = {zone: min(len(gpus), int(room[zone] / needed)) for zone, gpus in members.items()}
    while sum(counts.values()) < 2:
        open_zones = [zone for zone in members if counts[zone] < len(members[zone])]
        counts[max(open_zones, key=lambda zone: room[zone] / (counts[zone] + 1))] += 1
    while sum(counts.values()) >= 2:
        yield dict(counts)
        counts[max(counts, key=lambda zone: counts[zone])] -= 1


def _network(atlas: Atlas, graph: FleetGraph, search: ReplicaSearch, sends_afar: bool) -> Network:
    zones = atlas.problem.cluster.zones()
    model, cluster = atlas.problem.model, atlas.problem.cluster
    kv_bytes = atlas.moments.mean_prompt * model.kv_bytes_per_token()
    return Network(
        graph=graph,
        search=search,
        duties={
            (role, zone): duty_of(atlas, role, zone, sends_afar=sends_afar and role is Role.PREFILL)
            for role in (Role.PREFILL, Role.DECODE)
            for zone in zones
        },
        link_rates={
            (a, b): cluster.network.zone_link(a, b).bytes_per_s / kv_bytes for a in zones for b in zones if a != b
        },
        sends_afar=sends_afar,
    )


def _solve(
    atlas: Atlas, network: Network, counts: dict[str, int], budget: Budget, seed: int, report: Report
) -> Evaluated:
    """Steps A to C for given numbers of groups.

    Swaps cannot lead out of an arrangement that serves nothing. If that is so within the latency limits, which HexGen-2
    does not know, the swaps are first made without them.
    """
    groups = tuple(group for zone, count in counts.items() for group in _groups(atlas, network.graph, zone, count))
    prefill, _ = maximum_cut(coarsened(network.graph.bytes_per_s, groups))
    roles = tuple(Role.PREFILL if g in prefill else Role.DECODE for g in range(len(groups)))
    start = Arrangement(groups, roles)
    found = improved(network, network.evaluated(start), budget=budget, seed=seed, report=report)
    if found.flow.value > 0.0:
        return found
    relaxed = replace(network, search=ReplicaSearch(atlas, keeps_limits=False))
    start = improved(relaxed, relaxed.evaluated(start), budget=budget, seed=seed, report=silent).arrangement
    return improved(network, network.evaluated(start), budget=budget, seed=seed, report=report)


def _groups(atlas: Atlas, graph: FleetGraph, zone: str, count: int) -> list[Part]:
    """Serving groups of one zone: spectral, then exchanges that keep room for a replica in each."""
    if count == 0:
        return []
    gpus = [i for i, z in enumerate(graph.zones) if z == zone]
    weights, sizes = graph.bytes_per_s[gpus][:, gpus], graph.room_bytes[gpus]
    parts = refine(weights, sizes, spectral_partition(weights, sizes, count), replica_bytes(atlas))
    return [tuple(gpus[i] for i in part) for part in parts]


def _plan(atlas: Atlas, network: Network, found: Evaluated, budget: Budget) -> Plan:
    """The replicas with their GPUs by name; those that the flow leaves out idle."""
    numbers: dict[Role, list[int]] = {Role.PREFILL: [], Role.DECODE: []}
    replicas: list[ReplicaPlan] = []
    for group, role, template in zip(
        found.arrangement.groups, found.arrangement.roles, found.replicas, strict=True
    ):  # fmt: skip
        if template is None:
            continue
        numbers[role].append(len(replicas))
        replicas.append(replica_plan(atlas, template, named_stages(atlas, network.graph, group, template)))
    routes = [
        KvRoute(prefill=numbers[Role.PREFILL][i], decode=numbers[Role.DECODE][j], rate=rate)
        for (i, j), rate in found.flow.routes.items()
    ]
    used = sorted({number for route in routes for number in (route.prefill, route.decode)})
    place = {number: position for position, number in enumerate(used)}
    answer = Answer(
        replicas=tuple(replicas[number] for number in used),
        kv_routes=tuple(
            KvRoute(prefill=place[route.prefill], decode=place[route.decode], rate=route.rate) for route in routes
        ),
        notes=NOTES,
    )
    return plan_of(atlas, "hexgen2-paper", answer, budget)
