"""Matches nodes of a Ray cluster to nodes of a plan, and sizes bundles for processes. Does not need Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hetis.engines.commands import Addresses
from hetis.engines.errors import LayoutError
from hetis.engines.layout import Process

NODE_LABEL = "hetis-node"
Node = Mapping[str, Any]  # an entry of the list that `ray.nodes` returns


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
    named = {name: _node_named(name, addresses.hosts.get(name), alive) for name in wanted}
    found = {name: node for name, node in named.items() if node is not None}
    if missing := [name for name in wanted if name not in found]:
        there = ", ".join(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in alive) or "none"
        why = f"of the plan is not in the Ray cluster, whose nodes are {there}"
        raise LayoutError(*(f"node {name} {why}" for name in missing))
    return found


def bundle_of(process: Process, *, gpus: bool) -> dict[str, float]:
    """Return the resources that Ray reserves for a process: a CPU, and its GPUs or its share of a GPU."""
    return {"CPU": 1.0} | ({"GPU": len(process.gpus) / process.sharing} if gpus else {})


def _node_named(name: str, host: str | None, nodes: Sequence[Node]) -> Node | None:
    def rank(node: Node) -> int:
        full = node["NodeManagerHostname"]
        if node.get("Labels", {}).get(NODE_LABEL) == name:
            return 0
        is_it = name in (full, full.partition(".")[0]) if host is None else host == node["NodeManagerAddress"]
        return 1 if is_it else 2

    best = min(nodes, key=rank, default=None)
    return None if best is None or rank(best) == 2 else best
