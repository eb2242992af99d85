"""GPUs and nodes specified on a command line: ``4xL4``, ``like node a100-0``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem, attempt, did_you_mean, single_problem
from hetis.profiler.defaults import profile_origin
from hetis.solver.advice import Addition, NodeShape
from hetis.solver.cluster import Cluster, GpuType, Link, NodeGroup

MAX_ADDED = 100_000  # GPUs per option
_ADDED = re.compile(r"(\d{1,9})\s*[x×]\s*(\S.*)")
DEFAULT_GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetChange:
    """Nodes or groups to remove, GPUs to add, and the nodes in which these come."""

    remove: tuple[str, ...] = ()
    add: tuple[Addition, ...] = ()
    shape: NodeShape


def read_change(
    cluster: Cluster,
    *,
    add: Sequence[str],
    remove: Sequence[str],
    like: str | None,
    gpus_per_node: int | None,
    zone: str | None,
    nic: Link | None,
) -> FleetChange:
    """Return the change of all options for another fleet.

    Raises:
        DocumentError: contains the problems of all options.
    """
    problems: list[Problem] = []
    shape = attempt(lambda: node_shape(cluster, like=like, gpus_per_node=gpus_per_node, zone=zone, nic=nic), problems)
    added = [attempt(partial(_addition, text, cluster), problems) for text in add]
    removed = attempt(lambda: removals(remove, cluster), problems)
    if problems or shape is None:
        raise DocumentError(problems)
    return FleetChange(add=tuple(filter(None, added)), remove=removed or (), shape=shape)


def _addition(text: str, cluster: Cluster) -> Addition:
    """Return the GPUs of an ``--add`` option."""
    parts = _ADDED.fullmatch(text.strip())
    if parts is None:
        raise single_problem("--add", f"{text!r} is not a count and a GPU type such as 4xL4")
    count = int(parts[1])
    if not 1 <= count <= MAX_ADDED:
        raise single_problem("--add", f"{text!r} adds {count} GPUs, must be 1 to {MAX_ADDED:,}")
    return Addition(gpu=_gpu(parts[2], cluster), count=count)


def _gpu(name: str, cluster: Cluster) -> GpuType:
    """Return a type of the fleet, or of the catalogue if it can be planned with."""
    if name in cluster.gpu_types:
        return cluster.gpu_types[name]
    try:
        gpu = catalogue.find_gpu(name, also=tuple(cluster.gpu_types)).gpu
    except catalogue.UnknownNameError as error:
        raise single_problem("--add", str(error)) from None
    gpu = cluster.gpu_types.get(gpu.name, gpu)
    if profile_origin(gpu) is None:
        raise single_problem("--add", f"{gpu.name} has no profile, and none can be modelled")
    return gpu


def removals(names: Sequence[str], cluster: Cluster) -> tuple[str, ...]:
    """Return the nodes and groups of ``--remove`` options.

    Raises:
        DocumentError: contains every name that the cluster does not have.
    """
    known = {name for node, group in cluster.nodes() for name in (group.name, node)}
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    if unknown:
        raise DocumentError(
            Problem(file="--remove", message=f"cluster {cluster.name} has no node {name}{did_you_mean(name, known)}")
            for name in unknown
        )
    return tuple(dict.fromkeys(names))


def node_shape(
    cluster: Cluster, *, like: str | None, gpus_per_node: int | None, zone: str | None, nic: Link | None
) -> NodeShape:
    """Return the nodes in which GPUs are added: like a node of the fleet, or with 8 GPUs in the fleet's first zone.

    The other options override these properties.

    Raises:
        DocumentError: there is no such node or zone.
    """
    problems: list[Problem] = []
    model = attempt(lambda: _node(cluster, like), problems) if like is not None else None
    if zone is not None and zone not in cluster.zones():
        message = f"cluster {cluster.name} has no zone {zone}{did_you_mean(zone, cluster.zones())}"
        problems.append(Problem(file="--zone", message=message))
    if problems:
        raise DocumentError(problems)
    shape = NodeShape(gpus_per_node=DEFAULT_GPUS_PER_NODE, zone=cluster.zones()[0])
    if model is not None:
        size = sum(slots.count for slots in model.gpus)
        shape = NodeShape(gpus_per_node=size, zone=model.zone, nic=model.nic, intra_link=model.intra_link)
    given: dict[str, Any] = {"gpus_per_node": gpus_per_node, "zone": zone, "nic": nic}
    return replace(shape, **{name: value for name, value in given.items() if value is not None})


def _node(cluster: Cluster, name: str) -> NodeGroup:
    for node, group in cluster.nodes():
        if name in (group.name, node):
            return group
    known = [group.name for group in cluster.node_groups] + [node for node, _ in cluster.nodes()]
    raise single_problem("--node-like", f"cluster {cluster.name} has no node {name}{did_you_mean(name, known)}")
