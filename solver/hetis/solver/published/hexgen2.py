"""`hexgen2-paper`: HexGen-2's own heuristic (ICLR'25, arXiv 2502.07903) under our cost model.

    A  partition   GPUs into K serving groups, K = floor(memory / memory of a replica); groups into prefill and decode
    B  evaluate    the best replica of every group, then the maximum flow through all of them
    C  refine      swaps guided by the flow, until none increases it

`docs/strategies.md` lists what is reconstructed. Besides:

**A.** Recursive bisection by the Fiedler vector, by cuts that divide the memory evenly, then pair exchanges after
Kernighan and Lin. (The exchanges in networkx ignore memory and do not guarantee that no single exchange is better.) A
fleet with memory for fewer than two groups is still cut in two, because one group cannot serve anything.

**B.** KV goes from prefill to decode replicas of the same zone, and over a link between zones if all prefill replicas
may send there; both ways are tried. KV inside a zone needs no capacity of its own, because a replica's rate includes
what it can send or receive (`docs/cost-model.md`, the wire of a layer). The flow is therefore found between zones, and
all replicas of one role in a zone have the same load. If nothing serves, swaps are first made without the latency
limits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from hetis.solver.budget import silent
from hetis.solver.cluster import Cluster, Device
from hetis.solver.cost import intra_link
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.placement.replicas.template import Template
from hetis.solver.plan import KvRoute, Role
from hetis.solver.published.heuristic import Decisions, Search
from hetis.solver.published.replicas import FleetGpus, Part, ReplicaSearch, duty_of

Station = tuple[float, str]  # rate and zone of a replica

HEADROOMS = (0.1, 0.5, 1.0, 2.0)  # ratios of a replica's KV bytes to its weight bytes in the estimate of its memory
MAX_PASSES = 8  # passes of exchanges over all pairs of parts; after two or three there is usually nothing left to find
ROUNDING = 1e-9
SATURATED = 1.0 - 1e-9  # share of a group's capacity
GAIN = 1.0 + 1e-9


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Serving groups and the role of each."""

    groups: tuple[Part, ...]
    roles: tuple[Role, ...]

    def with_other_role(self, group: int) -> Arrangement:
        other = Role.DECODE if self.roles[group] is Role.PREFILL else Role.PREFILL
        return replace(self, roles=(*self.roles[:group], other, *self.roles[group + 1 :]))

    def exchanged(self, giver: int, given: Part, taker: int, taken: Part = ()) -> Arrangement:
        groups = list(self.groups)
        groups[giver] = tuple(sorted({*groups[giver], *taken} - {*given}))
        groups[taker] = tuple(sorted({*groups[taker], *given} - {*taken}))
        return replace(self, groups=tuple(groups))


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An arrangement, the best replica of every group (None if none fits), and the maximum flow through them.

    ``routes`` are in requests/s from prefill to decode groups. ``loads`` are the shares of capacity that they take of a
    group and the others of its role in the zone; 1 for a group without capacity.
    """

    arrangement: Arrangement
    replicas: tuple[Template | None, ...]
    routes: Mapping[tuple[int, int], float]
    loads: tuple[float, ...]

    @property
    def rate(self) -> float:
        return sum(self.routes.values())


def search_hexgen2(search: Search) -> Decisions:
    """Return the plan that HexGen-2's heuristic finds."""
    afar = (False, True) if len(search.zones) > 1 else (False,)
    networks = [FlowNetwork(search, sends_afar) for sends_afar in afar]
    weights = bandwidths(search.costs.problem.cluster)
    counts = _group_counts(search)
    starts = [_arranged(search, weights, groups, headroom) for headroom, groups in counts]
    found: list[Evaluated] = []
    for start in starts:
        if found and search.budget.is_spent():
            break
        found += [network.improved(at) for network, at in _first_to_serve(networks, [start])]
    if not found:
        headroom, most = counts[0]
        fewer = (_arranged(search, weights, groups, headroom) for groups in _ever_fewer(most))
        found = [network.improved(at) for network, at in _first_to_serve(networks, fewer)]
    if not found:
        found = [network.improved_from_without_limits(starts[0]) for network in networks]
    best = max(found, key=lambda evaluated: evaluated.rate)
    used = sorted({group for route in best.routes for group in route})
    replicas = [
        search.on_gpus(template, best.arrangement.groups[group])
        for group in used
        if (template := best.replicas[group]) is not None
    ]
    number = {group: i for i, group in enumerate(used)}
    return Decisions(
        replicas, [KvRoute(prefill=number[i], decode=number[j], rate=rate) for (i, j), rate in best.routes.items()]
    )


def _group_counts(search: Search) -> list[tuple[float, dict[str, int]]]:
    """Return (headroom, groups by zone), the most groups first: as many as memory allows, but at least two in total."""
    members = {zone: search.gpus.of_zone(zone) for zone in dict.fromkeys(search.gpus.zones)}
    room = {zone: float(search.gpus.room_bytes[list(gpus)].sum()) for zone, gpus in members.items()}
    found: list[tuple[float, dict[str, int]]] = []
    for headroom in HEADROOMS:
        needed = search.replica_bytes(headroom)
        counts = {zone: min(len(gpus), int(room[zone] / needed)) for zone, gpus in members.items()}
        while sum(counts.values()) < 2:
            open_zones = [zone for zone in members if counts[zone] < len(members[zone])]
            counts[max(open_zones, key=lambda zone: room[zone] / (counts[zone] + 1))] += 1
        if all(counts != before for _, before in found):
            found.append((headroom, counts))
    return found


def _ever_fewer(counts: dict[str, int]) -> Iterator[dict[str, int]]:
    """Yield counts with a tenth fewer groups each time, taken from the zones with the most, down to two groups."""
    counts = dict(counts)
    while sum(counts.values()) > 2:
        for _ in range(min(sum(counts.values()) - 2, max(1, sum(counts.values()) // 10))):
            counts[max(counts, key=lambda zone: counts[zone])] -= 1
        yield dict(counts)


def _first_to_serve(
    networks: Sequence[FlowNetwork], starts: Iterable[Arrangement]
) -> list[tuple[FlowNetwork, Evaluated]]:
    """Return the first arrangement that serves requests on any network, evaluated on every network on which it does.

    Each start is tried as it is, then with one of its groups in the other role.
    """
    for start in starts:
        changed = (g for g, role in enumerate(start.roles) if start.roles.count(role) > 1)
        for arrangement in (start, *map(start.with_other_role, changed)):
            found = [(network, network.evaluated(arrangement)) for network in networks]
            serving = [(network, evaluated) for network, evaluated in found if evaluated.rate > 0.0]
            if serving or networks[0].search.budget.is_spent():
                return serving
    return []


# --- step A: partition


def bandwidths(cluster: Cluster) -> FloatArray:
    """Return the bandwidth of every pair of GPUs, [N, N], 0 on the diagonal; looks up equal pairs of nodes once."""
    devices = tuple(cluster.devices())
    first = {(d.node, d.gpu): d for d in devices}
    index = {place: i for i, place in enumerate(first)}
    between = np.array([[_bandwidth(cluster, a, b) for b in first.values()] for a in first.values()])
    of_device = [index[d.node, d.gpu] for d in devices]
    matrix: FloatArray = between[np.ix_(of_device, of_device)]
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _bandwidth(cluster: Cluster, a: Device, b: Device) -> float:
    """Return the bandwidth of the slower end: from board to board inside a node, from NIC to NIC between nodes."""
    if a.node == b.node:
        return min(intra_link(cluster.gpu_types[d.gpu], d.group.intra_link).bytes_per_s for d in (a, b))
    explicit = cluster.network.node_link(a.node, b.node)
    if explicit is not None:
        return explicit.bytes_per_s
    nics = [d.group.nic or cluster.network.default for d in (a, b)]
    return min(link.bytes_per_s for link in (*nics, cluster.network.zone_link(a.group.zone, b.group.zone)))


def _arranged(search: Search, weights: FloatArray, counts: Mapping[str, int], headroom: float) -> Arrangement:
    """Return serving groups, in given numbers by zone, with their roles; each group keeps room for a replica."""
    least, groups = search.replica_bytes(headroom), list[Part]()
    for zone, count in counts.items():
        if count:
            gpus = search.gpus.of_zone(zone)
            here, sizes = weights[np.ix_(gpus, gpus)], search.gpus.room_bytes[list(gpus)]
            parts = refine(here, sizes, spectral_partition(here, sizes, count), least)
            groups += [tuple(gpus[i] for i in part) for part in parts]
    prefill, _ = maximum_cut(coarsened(weights, groups))
    return Arrangement(tuple(groups), tuple(Role.PREFILL if g in prefill else Role.DECODE for g in range(len(groups))))


def spectral_partition(weights: FloatArray, sizes: FloatArray, num_parts: int) -> list[Part]:
    """Return ``num_parts`` parts of about equal size by recursive Fiedler bisection, each with at least one vertex.

    Args:
        weights: symmetric edge weights, shape [N, N]; heavy edges should stay inside.
        sizes: vertex sizes, shape [N].
        num_parts: between 1 and N.
    """

    def bisected(vertices: IntArray, num_parts: int) -> list[Part]:
        if num_parts == 1:
            return [tuple(sorted(vertices.tolist()))]
        left_parts = num_parts // 2
        order = vertices[_order_along(weights[np.ix_(vertices, vertices)], 1)]
        # The cut whose left side comes closest to its share, while both sides keep a vertex for each of their parts.
        reached = np.cumsum(sizes[order])
        share = reached[-1] * left_parts / num_parts
        cuts = np.arange(left_parts, len(order) - (num_parts - left_parts) + 1)
        cut = int(cuts[np.argmin(np.abs(reached[cuts - 1] - share))])
        return bisected(order[:cut], left_parts) + bisected(order[cut:], num_parts - left_parts)

    return sorted(bisected(np.arange(len(sizes)), num_parts))


def _order_along(weights: FloatArray, number: int) -> IntArray:
    """Return vertices along an eigenvector of the Laplacian, by rising eigenvalue (1: Fiedler's); ties by number.

    The sign of the vector is fixed, so that the order does not depend on the sign that LAPACK chose.
    """
    laplacian = np.diag(weights.sum(axis=1)) - weights
    _, vectors = np.linalg.eigh(laplacian / (float(np.abs(laplacian).max()) or 1.0))
    vector = np.round(vectors[:, number], 9)
    leading = np.flatnonzero(vector)
    order: IntArray = np.argsort(-vector if len(leading) and vector[leading[0]] > 0 else vector, kind="stable")
    return order


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
    vertices are split at each position along the last eigenvector, and the best cut after refinement wins.
    """
    order = _order_along(weights, -1).tolist()
    best: tuple[Part, Part] = (0,), tuple(range(1, len(order)))
    best_cut = -1.0
    for size in sorted(range(1, len(order)), key=lambda size: (abs(2 * size - len(order)), size)):
        first, second = refine(weights, np.ones(len(order)), [order[:size], order[size:]], 1.0, sign=-1.0)
        cut = float(weights[np.ix_(first, second)].sum())
        if cut > best_cut * (1 + 1e-12):
            best, best_cut = (first, second), cut
    return best


def refine(
    weights: FloatArray, sizes: FloatArray, parts: Sequence[Sequence[int]], least_size: float, *, sign: float = 1.0
) -> list[Part]:
    """Make Kernighan-Lin exchanges between every pair of parts until no pass lowers the cut.

    A pass repeatedly exchanges the best pair of unlocked vertices, whether or not that helps, and keeps the prefix of
    exchanges with the lowest cut. It therefore crosses small hills, and no single exchange improves its result. An
    exchange that leaves a part below ``least_size`` (or below its previous size, if that was less) is not made.

    Args:
        sign: -1 raises the cut instead.
    """
    found, pairs = [list(part) for part in parts], list(combinations(range(len(parts)), 2))
    for _ in range(MAX_PASSES):
        fell = [_exchange(sign * weights, sizes, found[i], found[j], least_size) for i, j in pairs]
        if not any(fell):
            break
    return sorted(tuple(sorted(part)) for part in found)


def _exchange(weights: FloatArray, sizes: FloatArray, a: list[int], b: list[int], least_size: float) -> bool:
    """Make one Kernighan-Lin pass over two parts in place; return whether the cut between them fell."""
    vertices = np.array([*a, *b])
    w, s = weights[np.ix_(vertices, vertices)], sizes[vertices]
    side = np.arange(len(vertices)) < len(a)
    room = [float(s[side].sum()), float(s[~side].sum())]
    least = [min(least_size, size) for size in room]
    # how much a vertex's move lowers the cut
    desire = 2 * np.where(side[:, None] != side, w, 0.0).sum(axis=1) - w.sum(axis=1)
    unlocked = np.ones(len(vertices), dtype=bool)
    total, best, steps, kept = 0.0, ROUNDING * (float(np.abs(w).max()) or 1.0), list[tuple[int, int]](), 0
    for _ in range(min(len(a), len(b))):
        mine, theirs = np.flatnonzero(side & unlocked), np.flatnonzero(~side & unlocked)
        gain = desire[mine][:, None] + desire[theirs] - 2 * w[np.ix_(mine, theirs)]
        growth = s[theirs] - s[mine][:, None]  # growth of a's side
        fits = (room[0] + growth >= least[0]) & (room[1] - growth >= least[1])
        if not fits.any():
            break
        i, j = np.unravel_index(int(np.argmax(np.where(fits, gain, -np.inf))), gain.shape)
        u, v = int(mine[i]), int(theirs[j])
        total += float(gain[i, j])
        room = [room[0] + float(growth[i, j]), room[1] - float(growth[i, j])]
        unlocked[[u, v]] = False
        # For u's former companions v is now inside and u outside; for v's it is the reverse.
        desire += np.where(side, 2.0, -2.0) * (w[:, u] - w[:, v])
        steps.append((u, v))
        if total > best:
            best, kept = total, len(steps)
    for u, v in steps[:kept]:
        a[a.index(int(vertices[u]))], b[b.index(int(vertices[v]))] = int(vertices[v]), int(vertices[u])
    return kept > 0


# --- step B: flow


def maximum_flow(
    prefill: Mapping[int, Station], decode: Mapping[int, Station], links: Mapping[tuple[str, str], float]
) -> dict[tuple[int, int], float]:
    """Return the routes of the largest flow through one prefill and one decode station each, by pairs of stations.

    Args:
        prefill, decode: the stations of each role by their numbers.
        links: requests/s whose KV the link from one zone to another carries; pairs that are not listed carry none.
    """
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    left: dict[tuple[str, str], dict[int, float]] = {}  # rates of the stations by role and zone
    for side, stations in (("prefill", prefill), ("decode", decode)):
        for number, (rate, zone) in stations.items():
            left.setdefault((side, zone), {})[number] = rate
    for (side, zone), rates in left.items():
        ends = ("source", (side, zone)) if side == "prefill" else ((side, zone), "sink")
        graph.add_edge(*ends, capacity=sum(rates.values()))
        graph.add_edge(("prefill", zone), ("decode", zone))  # without a limit
    for (here, there), rate in links.items():
        graph.add_edge(("prefill", here), ("decode", there), capacity=rate)
    # networkx keeps nodes in sets. The order of strings in a set, and so the routes, would differ between processes.
    names = list(graph)
    _, flows = nx.maximum_flow(nx.convert_node_labels_to_integers(graph), 0, 1)
    routes: dict[tuple[int, int], float] = {}
    for sender, targets in flows.items():
        source = names[sender]
        for receiver, flow in targets.items() if source in left else ():
            target = names[receiver]
            while flow > 0.0 and left[source] and left.get(target):
                i, j = next(iter(left[source])), next(iter(left[target]))
                moved = min(flow, left[source][i], left[target][j])
                routes[i, j] = routes.get((i, j), 0.0) + moved
                flow -= moved
                for node, station in ((source, i), (target, j)):
                    left[node][station] -= moved
                    if left[node][station] <= 0.0:
                        del left[node][station]
    return dict(sorted(routes.items()))


class FlowNetwork:
    """The evaluation of arrangements, and their improvement; prefill replicas may send to all zones, or not."""

    def __init__(self, search: Search, sends_afar: bool, replicas: ReplicaSearch | None = None) -> None:
        costs, network = search.costs, search.costs.problem.cluster.network
        kv_bytes = costs.problem.model.prompt_kv_bytes(costs.moments.mean_prompt)
        self.search, self._sends_afar, self._replicas = search, sends_afar, replicas or search.replicas
        self._duties = {
            (role, zone): duty_of(costs, role, zone, sends_afar=sends_afar)
            for role in (Role.PREFILL, Role.DECODE)
            for zone in search.zones
        }
        pairs = [(a, b) for a in search.zones for b in search.zones if a != b] if sends_afar else []
        self._links = {pair: network.zone_link(*pair).bytes_per_s / kv_bytes for pair in pairs}

    def evaluated(self, arrangement: Arrangement) -> Evaluated:
        gpus, groups = self.search.gpus, arrangement.groups
        places = [(role, gpus.zones[group[0]]) for group, role in zip(groups, arrangement.roles, strict=True)]
        replicas = tuple(
            self._replicas.best_replica(gpus.composition(group), self._duties[place])
            for group, place in zip(groups, places, strict=True)
        )
        sides: dict[Role, dict[int, Station]] = {Role.PREFILL: {}, Role.DECODE: {}}
        room, used = defaultdict[tuple[Role, str], float](float), defaultdict[tuple[Role, str], float](float)
        for number, (best, (role, zone)) in enumerate(zip(replicas, places, strict=True)):
            if best is not None:
                sides[role][number] = best.rate, zone
                room[role, zone] += best.rate
        routes = maximum_flow(sides[Role.PREFILL], sides[Role.DECODE], self._links)
        for route, rate in routes.items():
            for group in route:
                used[places[group]] += rate
        loads = (1.0 if one is None else used[at] / room[at] for at, one in zip(places, replicas, strict=True))
        return Evaluated(arrangement, replicas, routes, tuple(loads))

    # --- step C: swaps

    def improved(self, best: Evaluated) -> Evaluated:
        """Return an arrangement whose flow no proposal increases, or the best one once the budget is spent."""
        order, budget = np.random.default_rng(self.search.seed), self.search.budget
        while True:
            for proposal in proposals(self.search.gpus, best, order):
                if budget.is_spent():
                    return best
                candidate = self.evaluated(proposal)
                if candidate.rate > best.rate * GAIN:
                    best = candidate
                    self.search.tell("swaps by maximum flow", best.rate)
                    break
            else:
                return best

    def improved_from_without_limits(self, start: Arrangement) -> Evaluated:
        """Improve without the latency limits, then with them, since no swap can improve an arrangement without flow."""
        free = ReplicaSearch(self.search.costs, self.search.budget, keeps_limits=False)
        relaxed = FlowNetwork(replace(self.search, report=silent), self._sends_afar, free)
        return self.improved(self.evaluated(relaxed.improved(relaxed.evaluated(start)).arrangement))


def proposals(gpus: FleetGpus, found: Evaluated, order: np.random.Generator) -> Iterator[Arrangement]:
    """Yield arrangements that give a saturated group more, from groups with the most slack; ties in random order."""
    arrangement, groups, roles = found.arrangement, found.arrangement.groups, found.arrangement.roles
    lots = order.permutation(len(groups)).tolist()
    slack = sorted((g for g in lots if found.loads[g] < SATURATED), key=lambda g: found.loads[g])
    saturated = [g for g in lots if found.loads[g] >= SATURATED]
    yield from (arrangement.with_other_role(giver) for giver in slack if roles.count(roles[giver]) > 1)
    pairs = [(g, t) for g in slack for t in saturated if gpus.zones[groups[g][0]] == gpus.zones[groups[t][0]]]
    different = [list({gpus.kind(gpu): gpu for gpu in group}.values()) for group in groups]  # one GPU of each kind
    for giver, taker in pairs:
        if len(groups[giver]) > 1:
            yield from (arrangement.exchanged(giver, (gpu,), taker) for gpu in different[giver])
    for giver, taker in pairs:
        for gpu in different[giver]:
            for other in different[taker]:
                if gpus.kind(gpu) != gpus.kind(other):
                    yield arrangement.exchanged(giver, (gpu,), taker, (other,))
