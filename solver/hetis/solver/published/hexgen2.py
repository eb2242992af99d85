"""`hexgen2-paper`: HexGen-2's own heuristic (ICLR'25, arXiv 2502.07903) under our cost model.

    A  partition   GPUs into K serving groups, K = floor(memory / memory of a replica); groups into prefill and decode
    B  evaluate    the best replica of every group, then the maximum flow through all of them
    C  refine      swaps guided by the flow, until none increases it

Left open by the paper, or required by our model beyond it:

- The memory of a replica is its weights and some headroom for KV, which decides K and much else. How much HexGen-2
  leaves is unknown, so several headrooms are tried (`HEADROOMS`) and the best answer is kept. A fleet with memory for
  fewer than two groups is still cut in two, because one group cannot serve anything.
- Each prefill or decode replica lies in one zone, so the fleet is partitioned zone by zone. KV goes to other zones only
  if all prefill replicas may send there (over slower links). Both ways are tried, and the better one is kept.
- A group that fits no replica is idle. If no request can be served within the latency limits, which HexGen-2 does not
  have, one group changes sides, or the fleet is cut into ever fewer groups. If none serve, swaps are first made without
  the limits.
- It maximises the rate, whatever the objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from hetis.solver.budget import Budget, Report, silent
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.solve import replica_plan
from hetis.solver.placement.tables import Atlas
from hetis.solver.placement.tabulation import build_atlas
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.graph import FleetGraph, FloatArray, graph_of
from hetis.solver.published.parallelism import ReplicaSearch
from hetis.solver.published.partition import Part, refine, spectral_partition
from hetis.solver.published.pipelines import duty_of
from hetis.solver.published.plans import (
    WITHOUT_PROOF,
    HeuristicPlan,
    named_stages,
    no_plan,
    plan_of,
    refuse_larger,
    replica_bytes,
)
from hetis.solver.published.swaps import Arrangement, Evaluated, SwapNetwork, improved, with_other_role

HEADROOMS = (0.1, 0.5, 1.0, 2.0)  # ratios of a replica's KV bytes to its weight bytes in the estimate of its memory
MAX_GPUS = 1024  # the partition works on dense matrices over GPUs

NOTES = (
    WITHOUT_PROOF,
    "HexGen-2 reconstructed: recursive Fiedler bisection by memory, changes of sides among the guided swaps, groups "
    "inside zones, one TP degree per GPU type of a group (docs/strategies.md)",
)


def solve_hexgen2(problem: PlacementProblem, *, budget: Budget, seed: int, report: Report) -> Plan:
    """Return the plan that HexGen-2's heuristic finds.

    Raises:
        NoPlanFoundError: it finds none, which proves nothing.
    """
    refuse_larger(problem, MAX_GPUS, strategy="hexgen2-paper", does="partitions GPU by GPU")
    atlas = build_atlas(problem)
    if not atlas.ranks or problem.cluster.num_gpus() < 2:
        raise NoPlanFoundError("hexgen2-paper needs two GPUs at least, one to prefill and one to decode")
    graph = graph_of(atlas)
    search = ReplicaSearch(atlas)
    networks = [_network(atlas, graph, search, sends_afar) for sends_afar in _reaches(problem)]
    counts = _group_counts(atlas, graph)
    starts = [_arranged(atlas, graph, groups, headroom) for headroom, groups in counts]
    found: list[tuple[SwapNetwork, Evaluated]] = []
    for start in starts:
        if found and budget.is_spent():
            break
        serving = _first_to_serve(networks, [start], budget)
        found += [_refined(network, evaluated, budget, seed, report) for network, evaluated in serving]
    if not found:
        fewer = (_arranged(atlas, graph, groups, counts[0][0]) for groups in _ever_fewer(counts[0][1]))
        serving = _first_to_serve(networks, fewer, budget)
        found = [_refined(network, evaluated, budget, seed, report) for network, evaluated in serving]
    if not found:
        found = [_from_without_limits(network, starts[0], budget, seed, report) for network in networks]
    network, best = max(found, key=lambda pair: pair[1].flow.value)
    if best.flow.value <= 0.0:
        raise no_plan(budget, "hexgen2-paper found no prefill and decode groups that serve a request within the limits")
    return _plan(atlas, network, best, budget)


def _reaches(problem: PlacementProblem) -> tuple[bool, ...]:
    return (False, True) if len(problem.cluster.zones()) > 1 else (False,)


def _group_counts(atlas: Atlas, graph: FleetGraph) -> list[tuple[float, dict[str, int]]]:
    """Return (headroom, groups by zone), the most groups first: as many as memory allows, but at least two in all."""
    members = {zone: [i for i, z in enumerate(graph.zones) if z == zone] for zone in dict.fromkeys(graph.zones)}
    room = {zone: float(graph.room_bytes[gpus].sum()) for zone, gpus in members.items()}
    found: list[tuple[float, dict[str, int]]] = []
    for headroom in HEADROOMS:
        needed = replica_bytes(atlas.problem.model, headroom)
        counts = {zone: min(len(gpus), int(room[zone] / needed)) for zone, gpus in members.items()}
        while sum(counts.values()) < 2:
            open_zones = [zone for zone in members if counts[zone] < len(members[zone])]
            counts[max(open_zones, key=lambda zone: room[zone] / (counts[zone] + 1))] += 1
        if all(counts != before for _, before in found):
            found.append((headroom, counts))
    return found


def _ever_fewer(counts: dict[str, int]) -> Iterator[dict[str, int]]:
    """Yield counts with a tenth fewer groups each time, taken from the zones with most, down to two groups."""
    counts = dict(counts)
    while sum(counts.values()) > 2:
        for _ in range(min(sum(counts.values()) - 2, max(1, sum(counts.values()) // 10))):
            counts[max(counts, key=lambda zone: counts[zone])] -= 1
        yield dict(counts)


def _network(atlas: Atlas, graph: FleetGraph, search: ReplicaSearch, sends_afar: bool) -> SwapNetwork:
    zones = atlas.problem.cluster.zones()
    model, cluster = atlas.problem.model, atlas.problem.cluster
    kv_bytes = model.prompt_kv_bytes(atlas.moments.mean_prompt)
    return SwapNetwork(
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


def _arranged(atlas: Atlas, graph: FleetGraph, counts: dict[str, int], headroom: float) -> Arrangement:
    """Do step A for given numbers of groups."""
    least = replica_bytes(atlas.problem.model, headroom)
    groups = tuple(group for zone, count in counts.items() for group in _groups(graph, zone, count, least))
    prefill, _ = maximum_cut(coarsened(graph.bytes_per_s, groups))
    return Arrangement(groups, tuple(Role.PREFILL if g in prefill else Role.DECODE for g in range(len(groups))))


def _first_to_serve(
    networks: Sequence[SwapNetwork], starts: Iterable[Arrangement], budget: Budget
) -> list[tuple[SwapNetwork, Evaluated]]:  # fmt: skip
    """Evaluate the first arrangement that serves requests on every network, one group on the other side if needed."""
    for arrangement in (changed for start in starts for changed in _changes_of_sides(start)):
        found = [(network, network.evaluated(arrangement)) for network in networks]
        serving = [(network, evaluated) for network, evaluated in found if evaluated.flow.value > 0.0]
        if serving:
            return serving
        if budget.is_spent():
            break
    return []


def _changes_of_sides(start: Arrangement) -> Iterator[Arrangement]:
    """Yield the arrangement itself, then with one group on the other side as long as both keep one."""
    yield start
    for group, role in enumerate(start.roles):
        if start.roles.count(role) > 1:
            yield with_other_role(start, group)


def _refined(
    network: SwapNetwork, start: Evaluated, budget: Budget, seed: int, report: Report
) -> tuple[SwapNetwork, Evaluated]:  # fmt: skip
    return network, improved(network, start, budget=budget, seed=seed, report=report)


def _from_without_limits(
    network: SwapNetwork, start: Arrangement, budget: Budget, seed: int, report: Report
) -> tuple[SwapNetwork, Evaluated]:
    """Improve by swaps without the latency limits, then with them, since no swap leaves an arrangement without flow."""
    relaxed = replace(network, search=ReplicaSearch(network.search.atlas, keeps_limits=False))
    found = improved(relaxed, relaxed.evaluated(start), budget=budget, seed=seed, report=silent)
    return _refined(network, network.evaluated(found.arrangement), budget, seed, report)


def _groups(graph: FleetGraph, zone: str, count: int, least_bytes: float) -> list[Part]:
    """Return the serving groups of one zone: spectral, then exchanges that keep room for a replica in each."""
    if count == 0:
        return []
    gpus = [i for i, z in enumerate(graph.zones) if z == zone]
    weights, sizes = graph.bytes_per_s[gpus][:, gpus], graph.room_bytes[gpus]
    parts = refine(weights, sizes, spectral_partition(weights, sizes, count), least_bytes)
    return [tuple(gpus[i] for i in part) for part in parts]


def _plan(atlas: Atlas, network: SwapNetwork, found: Evaluated, budget: Budget) -> Plan:
    """Return the replicas with named GPUs, without those that the flow does not use."""
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
    answer = HeuristicPlan(
        replicas=tuple(replicas[number] for number in used),
        kv_routes=tuple(
            KvRoute(prefill=place[route.prefill], decode=place[route.decode], rate=route.rate) for route in routes
        ),
        notes=NOTES,
    )
    return plan_of(atlas, "hexgen2-paper", answer, budget)


def coarsened(weights: FloatArray, parts: Sequence[Part]) -> FloatArray:
    """Return the total edge weight between every two parts, shape [K, K], 0 on the diagonal."""
    members = np.zeros((len(parts), len(weights)))
    for number, part in enumerate(parts):
        members[number, list(part)] = 1.0
    coarse: FloatArray = members @ weights @ members.T
    np.fill_diagonal(coarse, 0.0)
    return coarse


def maximum_cut(weights: FloatArray) -> tuple[Part, Part]:
    """Return two non-empty sides with a large cut between them; vertex 0 is on the first.

    Kernighan-Lin exchanges keep the sizes of the sides, so all sizes are tried from the balanced one outwards: the K
    vertices are split at each position along the eigenvector, and the best cut after refinement wins.
    """
    order = _opposing_order(weights)
    best: tuple[Part, Part] | None = None
    best_cut = -1.0
    for size in sorted(range(1, len(order)), key=lambda size: (abs(2 * size - len(order)), size)):
        first, second = refine(weights, np.ones(len(order)), [tuple(order[:size]), tuple(order[size:])], 1.0, sign=-1.0)
        cut = float(weights[np.ix_(first, second)].sum())
        if cut > best_cut * (1 + 1e-12):
            best, best_cut = (first, second), cut
    assert best is not None, "a cut needs two vertices"
    return best


def _opposing_order(weights: FloatArray) -> list[int]:
    """Return vertices along the eigenvector of the Laplacian's largest eigenvalue, its sign fixed, ties by number."""
    laplacian = np.diag(weights.sum(axis=1)) - weights
    scale = float(np.abs(laplacian).max()) or 1.0
    _, vectors = np.linalg.eigh(laplacian / scale)
    last = np.round(vectors[:, -1], 9)
    leading = np.flatnonzero(last)
    if len(leading) and last[leading[0]] > 0:
        last = -last
    return [int(v) for v in np.argsort(last, kind="stable")]
