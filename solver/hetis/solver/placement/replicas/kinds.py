"""Kinds of replicas: the GPUs that each takes of every device class, and the nodes that these need at least."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from hetis.solver.placement.fleet import DeviceClass, IntArray
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.template import Template

Parts = tuple[int, ...]  # sizes of a replica's parts, the largest first
Kind = tuple[tuple[int, Parts], ...]  # for every device class that a replica uses, its parts, the largest first
Piece = tuple[tuple[int, int], ...]  # GPUs of a replica in one node: the number of each device class
Layout = tuple[tuple[int, int, Piece], ...]  # a replica's pieces, each with its place and the node's number there


def kind_of(costs: CostTables, template: Template) -> Kind:
    """Return the GPUs that a replica takes."""
    parts = list[tuple[int, int, int]]()
    for stage in template.stages:
        parts.append((*costs.ranks[stage.rank], 1))
        if stage.pool_class >= 0:
            parts.append((stage.pool_class, 1, stage.pool_cards))
    return kind_of_parts(parts)


def kind_of_parts(counted: Iterable[tuple[int, int, int]]) -> Kind:
    """Return the kind of parts that are given as (device class, size, count)."""
    parts = defaultdict[int, list[int]](list)
    for device_class, size, count in counted:
        if count:
            parts[device_class] += [size] * count
    return tuple((c, tuple(sorted(sizes, reverse=True))) for c, sizes in sorted(parts.items()))


def fewest_nodes(sizes: Sequence[int], node_size: int) -> int:
    """Return the fewest nodes for TP groups of one size and single GPUs; ``sizes`` are those of all parts."""
    largest = max(sizes)
    return int(nodes_of_groups(sum(size == largest for size in sizes), largest, sum(sizes), node_size))


def nodes_of_groups(groups: IntArray | int, tp: int, gpus: IntArray | int, node_size: int) -> IntArray:
    """Return the fewest nodes for TP groups with single GPUs next to them; ``gpus`` counts the GPUs of both."""
    return np.maximum(-(-groups // max(1, node_size // tp)), -(-gpus // node_size))


def shared_places(classes: Sequence[DeviceClass]) -> list[int]:
    """Return a number for every class, equal for classes whose GPUs may be in one node."""
    place, of_group = list(range(len(classes))), dict[str, int]()
    for index, c in enumerate(classes):
        for group in c.groups:
            first = of_group.setdefault(group.name, index)
            old, new = place[index], place[first]
            place = [new if number == old else number for number in place]
    return place


def least_nodes_of(classes: Sequence[DeviceClass], kind: Kind) -> int:
    """Return the fewest nodes that a replica takes, whatever else is on them."""
    places, nodes = shared_places(classes), dict[int, int]()
    for c, parts in kind:
        nodes[places[c]] = max(nodes.get(places[c], 0), fewest_nodes(parts, classes[c].gpus_per_node))
    return sum(nodes.values())
