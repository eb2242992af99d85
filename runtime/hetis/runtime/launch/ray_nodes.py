"""Matches nodes of a Ray cluster to nodes of a plan, and sizes bundles for processes. Does not need Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hetis.engines.commands import Addresses
from hetis.engines.errors import LayoutError
from hetis.engines.layout import Process

NODE_LABEL = "hetis-node"
Node = Mapping[str, Any]  # as `ray.nodes` lists them


def nodes_of(processes: Sequence[Process], addresses: Addresses, nodes: Sequence[Node]) -> dict[str, Node]:
    """Return the Ray node, one of ``nodes``, for each node of the plan.

    It is the one with the label ``hetis-node``, the address that ``addresses`` gives, or the host name of the plan's
    node, in this order. With ``addresses.all_here`` the first node serves for all. Raises LayoutError if a node of the
    plan is not in the cluster.
    """
    alive = [node for node in nodes if node.get("Alive")]
    wanted = list(dict.fromkeys(process.node for process in processes))
    if addresses.all_here and alive:
        return dict.fromkeys(wanted, alive[0])
    found, missing = {}, []
    for name in wanted:
        node = _node_named(name, addresses.hosts.get(name), alive)
        if node is None:
            missing.append(name)
        else:
            found[name] = node
    if missing:
        there = ", ".join(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in alive) or "none"
        raise LayoutError(
            *(f"node {name} of the plan is not in the Ray cluster, whose nodes are {there}" for name in missing)
        )
    return found


def bundle_of(process: Process, *, gpus: bool) -> dict[str, float]:
    """Return the resources that Ray reserves for a process: a CPU, and its GPUs or its share of a GPU."""
    return {"CPU": 1.0} | ({"GPU": len(process.gpus) / process.sharing} if gpus else {})


def _node_named(name: str, host: str | None, nodes: Sequence[Node]) -> Node | None:
    for node in nodes:
        if node.get("Labels", {}).get(NODE_LABEL) == name:
            return node
    for node in nodes:
        if host is not None and host == node["NodeManagerAddress"]:
            return node
    for node in nodes:
        if host is None and name in (node["NodeManagerHostname"], node["NodeManagerHostname"].partition(".")[0]):
            return node
    return None
