"""The assignment of replica shapes to named GPUs.

If all GPUs of a node are of one class, an integer program puts every replica on as few nodes as possible
(`nodes.py`). Otherwise, or if it found nothing in time, TP groups go into nodes largest first. Sizes are powers of
two, so everything that the master's packing rows admit fits (first fit decreasing is exact for sizes that divide one
another), and a replica's parts go where the replica already is, if there is room. On small fleets HiGHS then starts
from that assignment and looks for one that spreads replicas over the fewest nodes of several classes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import highspy
import numpy as np

from hetis.solver.backends.highs import linear_program, quiet_highs
from hetis.solver.budget import Budget
from hetis.solver.cluster import NodeGroup
from hetis.solver.errors import UnboundPlanError
from hetis.solver.placement.fleet import DeviceClass, IntArray
from hetis.solver.placement.losses.spreading import ClassNode, Piece, Rates, spread_out
from hetis.solver.placement.nodes import pack, pack_within
from hetis.solver.placement.replicas.kinds import Layout, kind_of, shared_places
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.template import Template
from hetis.solver.plan import Role

# Time limits only guard: nodes of the search trees end these programs, so that equal parts are bound alike everywhere.
PACKING_S, PACKING_SHARE = 20.0, 0.1  # minimum seconds for a class, and its share of the time left
MOST_WITHIN_S = 60.0  # for placing replicas on few nodes each; the search has found such a placement before
MOST_PAIRS = 4000  # (TP group, node) pairs: with more, first fit decides
MOST_SEARCHED = 50  # nodes of the search tree; fixed, so that the same parts are bound alike on every machine


@dataclass(frozen=True, slots=True)
class BoundPart:
    """GPUs that must sit in one node: a TP group, or one attention worker."""

    replica: int
    stage: int
    is_worker: bool
    device_class: int
    size: int


@dataclass(slots=True)
class BoundStage:
    """Device names of a stage and its pool, ordered by copy."""

    devices: list[str] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)


def bind(
    costs: CostTables, templates: Sequence[Template], *, seed: int = 0, budget: Budget | None = None,
    spreads: bool = False, layouts: Sequence[Layout] = (), roles: Sequence[Role] = (),
) -> list[list[BoundStage]]:  # fmt: skip
    """Return named GPUs for every stage of every template, in order; first fit if the budget leaves no time.

    With the ``roles`` of the templates, replicas are exchanged between nodes such that the worst loss of one takes
    less; no replica has more nodes than before. If it ``spreads``, replicas may have more of them: those of their
    ``layouts``, if any, and any other goes, of the nodes with room, to the one whose replicas have the least rate.

    Raises:
        UnboundPlanError: the templates do not fit in the fleet's nodes.
    """
    parts = [part for i, template in enumerate(templates) for part in _parts_of(costs, i, template)]
    budget, engine = budget if budget is not None else Budget(), costs.problem.family.engine
    most_nodes = None if engine is None else engine.max_nodes
    names = [costs.problem.ranges()[costs.scopes[template.scope].number] for template in templates]
    shares = costs.problem.workload.shares
    rates = [
        template.rate / sum(shares[name] for name in own) if own else template.rate
        for template, own in zip(templates, names, strict=True)
    ]
    spread = _spread(costs, parts, rates, layouts) if spreads else None
    if spread is not None and (most_nodes is None or _most_nodes(costs, parts, spread) <= most_nodes):
        nodes = spread
    elif most_nodes is not None:
        nodes = _within(costs, templates, parts, most_nodes, seed)
    else:
        nodes = _on_few_nodes(costs, parts, seed, budget)
    if roles and nodes is not spread:
        nodes = _exchanged(costs, parts, nodes, Rates(rates, roles, names, tuple(shares) or ("",)))
    free = _Names(costs)
    bound = [[BoundStage() for _ in template.stages] for template in templates]
    for part, node in zip(parts, nodes, strict=True):
        stage = bound[part.replica][part.stage]
        (stage.workers if part.is_worker else stage.devices).extend(free.take(part.device_class, node, part.size))
    return bound


def _exchanged(costs: CostTables, parts: Sequence[BoundPart], nodes: Sequence[int], rates: Rates) -> list[int]:
    """Return a node for every part after exchanges in classes that have their nodes to themselves."""
    found = list(nodes)
    for device_class in _alone(costs):
        c = costs.classes[device_class]
        members = defaultdict[tuple[int, int], list[int]](list)  # the parts of a replica in a node
        for i, part in enumerate(parts):
            if part.device_class == device_class:
                members[nodes[i], part.replica].append(i)
        held = [ClassNode(c.gpus_per_node) for _ in range(c.num_nodes)]
        for (node, replica), own in members.items():
            size = sum(parts[i].size for i in own)
            held[node].free -= size
            held[node].pieces[replica] = Piece(size, tuple(own))
        for node, after in enumerate(spread_out(held, rates)):
            for i in (i for piece in after.pieces.values() for i in piece.parts):
                found[i] = node
    return found


def _most_nodes(costs: CostTables, parts: Sequence[BoundPart], nodes: Sequence[int]) -> int:
    """Return the most nodes of a replica."""
    used = defaultdict[int, set[str]](set)
    for part, node in zip(parts, nodes, strict=True):
        group, number = _nodes_of(costs.classes[part.device_class])[node]
        used[part.replica].add(group.node_name(number))
    return max(map(len, used.values()), default=0)


def _spread(
    costs: CostTables, parts: Sequence[BoundPart], rates: Sequence[float], layouts: Sequence[Layout]
) -> list[int]:  # fmt: skip
    """Return a node for every part by layouts, or if others do not fit beside these, where the least is lost."""
    try:
        return _first_fit(costs, parts, rates, _laid_out(costs, parts, layouts))
    except UnboundPlanError:
        return _first_fit(costs, parts, rates)


def _laid_out(costs: CostTables, parts: Sequence[BoundPart], layouts: Sequence[Layout]) -> dict[int, int]:
    """Return the nodes of the parts of replicas that have a layout; none if a node lacks a class of its place."""
    places, names = shared_places(costs.classes), defaultdict[int, dict[str, None]](dict)
    numbers = list[dict[str, int]]()
    for place, c in zip(places, costs.classes, strict=True):
        own = [group.node_name(i) for group, i in _nodes_of(c)]
        names[place] |= dict.fromkeys(own)
        numbers.append({name: i for i, name in enumerate(own)})
    listed = {place: list(found) for place, found in names.items()}
    left = [[(listed[place][node], Counter(dict(piece))) for place, node, piece in layout] for layout in layouts]
    found = dict[int, int]()
    for i in sorted(range(len(parts)), key=lambda i: -parts[i].size):  # sizes divide one another, so the largest fit
        part, pieces = parts[i], left[parts[i].replica] if layouts else []
        for name, room in pieces:
            if room[part.device_class] >= part.size:
                if name not in numbers[part.device_class]:
                    return {}
                room[part.device_class] -= part.size
                found[i] = numbers[part.device_class][name]
                break
    return found


def _within(
    costs: CostTables, templates: Sequence[Template], parts: Sequence[BoundPart], most_nodes: int, seed: int
) -> list[int]:  # fmt: skip
    """Return a node for every part, such that each replica is on at most ``most_nodes``."""
    kinds = [kind_of(costs, template) for template in templates]
    packed = pack_within(costs.classes, kinds, most_nodes, time_limit_s=MOST_WITHIN_S, seed=seed)
    if packed is None:
        raise UnboundPlanError(f"{len(templates)} replicas were not put on at most {most_nodes} nodes each")
    nodes = [-1] * len(parts)
    for i in sorted(range(len(parts)), key=lambda i: -parts[i].size):
        nodes[i] = packed[parts[i].replica][parts[i].device_class].pop(0)
    return nodes


def _on_few_nodes(costs: CostTables, parts: Sequence[BoundPart], seed: int, budget: Budget) -> list[int]:
    """Return a node for every part, with each replica on as few nodes as the time allows to find."""
    nodes = _first_fit(costs, parts)
    alone = _packed(costs, parts, nodes, seed, budget)
    rest = [i for i, part in enumerate(parts) if part.device_class not in alone]
    num_pairs = sum(costs.classes[parts[i].device_class].num_nodes for i in rest)
    if rest and num_pairs <= MOST_PAIRS and not budget.is_spent():
        found = _fewest_nodes(costs, [parts[i] for i in rest], [nodes[i] for i in rest], seed, budget)
        for i, node in zip(rest, found, strict=True):
            nodes[i] = node
    return nodes


def _parts_of(costs: CostTables, replica: int, template: Template) -> Iterable[BoundPart]:
    for index, stage in enumerate(template.stages):
        device_class, tp = costs.ranks[stage.rank]
        yield BoundPart(replica, index, False, device_class, tp)
        for _ in range(stage.pool_cards if stage.pool_class >= 0 else 0):
            yield BoundPart(replica, index, True, stage.pool_class, 1)


def _alone(costs: CostTables) -> list[int]:
    """Return the classes whose nodes have no GPUs of another class."""
    classes_of = Counter(group.name for c in costs.classes for group in c.groups)
    return [k for k, c in enumerate(costs.classes) if all(classes_of[group.name] == 1 for group in c.groups)]


def _packed(costs: CostTables, parts: Sequence[BoundPart], nodes: list[int], seed: int, budget: Budget) -> set[int]:
    """Move parts to the fewest nodes, for classes that have their nodes to themselves; return those that succeeded."""
    done = set[int]()
    for device_class in _alone(costs):
        c = costs.classes[device_class]
        members = defaultdict[int, list[int]](list)
        for i, part in enumerate(parts):
            if part.device_class == device_class:
                members[part.replica].append(i)
        if not members or budget.is_spent():
            continue
        packing = pack(
            [[parts[i].size for i in mine] for mine in members.values()],
            node_size=c.gpus_per_node,
            num_nodes=c.num_nodes,
            time_limit_s=max(PACKING_S, PACKING_SHARE * budget.remaining_s()),
            seed=seed,
        )
        if packing is None or packing.num_pieces > sum(len({nodes[i] for i in mine}) for mine in members.values()):
            continue
        done.add(device_class)
        for mine, places in zip(members.values(), packing.nodes, strict=True):
            for i, node in zip(mine, places, strict=True):
                nodes[i] = node
    return done


def _first_fit(
    costs: CostTables, parts: Sequence[BoundPart], rates: Sequence[float] | None = None,
    given: Mapping[int, int] | None = None,
) -> list[int]:  # fmt: skip
    """Return a node (its number within the class) for every part, placed in order of size, then of replica.

    Some may be ``given``. With the ``rates`` of the replicas, the node with the least rate so far is chosen, otherwise
    the tightest.
    """
    given = given or {}
    node_of = [-1] * len(parts)
    by_class: dict[int, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        by_class[part.device_class].append(i)
    for device_class, members in by_class.items():
        c = costs.classes[device_class]
        free = [c.gpus_per_node] * c.num_nodes
        waiting: dict[int, list[int]] = defaultdict(list)  # free GPUs -> nodes, used from the end
        waiting[c.gpus_per_node] = list(range(c.num_nodes - 1, -1, -1))
        home: dict[int, int] = {}  # replica -> its latest node
        lost = [0.0] * c.num_nodes  # the rate of the replicas on each node
        for i in (i for i in members if i in given):
            node_of[i] = node = given[i]
            free[node] -= parts[i].size
            if home.get(parts[i].replica) != node and rates is not None:
                lost[node] += rates[parts[i].replica]
            home[parts[i].replica] = node
        members = [i for i in members if i not in given]
        for i in sorted(members, key=lambda i: (-parts[i].size, parts[i].replica, i)):
            part = parts[i]
            node = home.get(part.replica, -1)
            if node < 0 or free[node] < part.size:
                node = _tightest(waiting, free, part.size) if rates is None else _safest(lost, free, part.size)
                if rates is not None and node >= 0:
                    lost[node] += rates[part.replica]
            if node < 0:
                raise UnboundPlanError(f"no node has {part.size} free {c.gpu} for replica {part.replica}")
            free[node] -= part.size
            waiting[free[node]].append(node)
            node_of[i] = home[part.replica] = node
    return node_of


def _safest(lost: Sequence[float], free: Sequence[int], size: int) -> int:
    """Return the node with the least lost rate that still holds ``size`` GPUs, or -1."""
    fitting = (node for node in range(len(free)) if free[node] >= size)
    return min(fitting, key=lambda node: (lost[node], node), default=-1)


def _tightest(waiting: dict[int, list[int]], free: list[int], size: int) -> int:
    """Return the node with the least room that still holds ``size`` GPUs, or -1; drops stale entries on the way."""
    for room in sorted(waiting):
        if room < size:
            continue
        stack = waiting[room]
        while stack:
            node = stack.pop()
            if free[node] == room:
                return node
    return -1


def _fewest_nodes(
    costs: CostTables, parts: Sequence[BoundPart], start: Sequence[int], seed: int, budget: Budget
) -> list[int]:  # fmt: skip
    """Return the assignment that spreads replicas over the fewest nodes, found by HiGHS from ``start``.

    Sets       a kinds of parts: replica, class and size, n_a of them; v nodes of a's class; r replicas
    Variables  x_av whole: parts of kind a in node v;  y_rv = 1 if replica r has a part in node v
    Minimise   sum_rv y_rv
    Such that  sum_v x_av = n_a every a;  sum_a size_a x_av <= size of v;  x_av <= min(n_a, size of v // size_a) y_rv
    """
    kinds = Counter((part.replica, part.device_class, part.size) for part in parts)
    # A node with several GPU types has one name in all of them.
    node_ids = [[group.node_name(i) for group, i in _nodes_of(c)] for c in costs.classes]
    pairs = [(*kind, v) for kind in kinds for v in range(costs.classes[kind[1]].num_nodes)]
    place = {pair: number for number, pair in enumerate(pairs)}
    of_kind = _numbered(pair[:3] for pair in pairs)
    hosts = _numbered((replica, node_ids[c][v]) for replica, c, _, v in pairs)
    rooms = _numbered((c, v) for _, c, _, v in pairs)
    size = np.array([size for _, _, size, _ in pairs])
    room = np.array([costs.classes[c].gpus_per_node for _, c, _, _ in pairs])
    wanted = np.array(list(kinds.values()))
    most = np.minimum(wanted[of_kind], room // size)
    room_of = np.zeros(int(rooms.max()) + 1)
    room_of[rooms] = room
    num_pairs, num_hosts, each = len(pairs), int(hosts.max()) + 1, np.arange(len(pairs))
    in_room, is_host = len(wanted) + rooms, len(wanted) + len(room_of) + each  # their rows
    program = linear_program(
        np.repeat([0.0, 1.0], [num_pairs, num_hosts]),
        (np.zeros(num_pairs + num_hosts), np.concatenate([most, np.ones(num_hosts)])),
        (
            np.concatenate([wanted, np.full(len(room_of) + num_pairs, -np.inf)]),
            np.concatenate([wanted, room_of, np.zeros(num_pairs)]),
        ),
        [(of_kind, each, 1.0), (in_room, each, size), (is_host, each, 1.0), (is_host, num_pairs + hosts, -most)],
        whole=np.ones(num_pairs + num_hosts, np.bool_),
    )
    options = {"mip_max_nodes": MOST_SEARCHED, "mip_abs_gap": 0.999, "mip_rel_gap": 0.0}
    highs = quiet_highs(options, time_limit_s=budget.remaining_s(), seed=seed)
    highs.passModel(program)
    here = np.zeros(num_pairs)
    for part, node in zip(parts, start, strict=True):
        here[place[part.replica, part.device_class, part.size, node]] += 1
    begun = highspy.HighsSolution()
    begun.col_value = np.concatenate([here, np.bincount(hosts, here, num_hosts) > 0]).tolist()
    highs.setSolution(begun)
    highs.run()
    if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return list(start)
    left = defaultdict[tuple[int, int, int], list[int]](list)
    for (replica, c, of_size, v), number in zip(pairs, highs.getSolution().col_value, strict=False):
        left[replica, c, of_size] += [v] * round(number)
    return [left[part.replica, part.device_class, part.size].pop(0) for part in parts]


def _numbered(keys: Iterable[Hashable]) -> IntArray:
    """Return the number of each key among the different ones, in order of first appearance."""
    numbers = dict[Hashable, int]()
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _nodes_of(c: DeviceClass) -> list[tuple[NodeGroup, int]]:
    """Return the nodes of a class by number: their groups, and their numbers in these."""
    return [(group, i) for group in c.groups for i in range(group.count)]


class _Names:
    """An allocator of device names: the next free GPUs of a class in a node, by their indices."""

    def __init__(self, costs: CostTables) -> None:
        self._classes, self._nodes = costs.classes, [_nodes_of(c) for c in costs.classes]
        self._free: dict[tuple[int, int], Iterator[str]] = {}

    def take(self, device_class: int, node: int, count: int) -> list[str]:
        key = device_class, node
        if key not in self._free:
            group, number = self._nodes[device_class][node]
            own = self._classes[device_class].gpu
            indices = (index for index, gpu in group.gpus_of_node().items() if gpu == own)
            self._free[key] = iter([f"{group.node_name(number)}/{index}" for index in indices])
        return list(islice(self._free[key], count))
