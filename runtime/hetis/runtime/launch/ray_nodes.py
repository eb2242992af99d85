"""Which node of a Ray cluster is which node of a plan, and what a process needs there. Ray is not needed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hetis.engines.commands import Addresses
from hetis.engines.errors import LayoutError
from hetis.engines.layout import Process

NODE_LABEL = "hetis-node"
Node = Mapping[str, Any]  # as `ray.nodes` lists them


def nodes_of(processes: Sequence[Process], addresses: Addresses, nodes: Sequence[Node]) -> dict[str, Node]:
    """The node of Ray that is each node of the plan, which is one of ``nodes``.

    It is the one with the label ``hetis-node``, the address that ``addresses`` gives, or the host name of the plan's
    node, in this order. With ``addresses.all_here`` the first node is all of them.

    Raises:
        LayoutError: a node of the plan is not in the cluster.
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
    """What Ray sets apart for a process: a CPU, and its GPUs, or its part of one that several share."""
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
