"""Nodes as ``ray list nodes --format json`` and ``ray.nodes()`` list them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetis.formats.discovery.found import (
    FoundGpus,
    FoundNode,
    Inventory,
    counted,
    inventory,
    listed,
    mapping,
    some_of,
    text,
    whole_number,
    zone_of,
)
from hetis.formats.errors import Problem, single_problem
from hetis.formats.positions import Text

UNTYPED = "GPU"
"""The product name of GPUs on a node that names no accelerator type."""

_TYPE = "accelerator_type:"
_ZONES = ("ray.io/availability-zone", "topology.kubernetes.io/zone")


def is_ray(data: Any) -> bool:
    """Return whether data is a list of Ray's nodes."""
    first = mapping(next(iter(listed(data)), None))
    return "resources_total" in first or "Resources" in first or ("node_ip" in first and "is_head_node" in first)


def read_ray(data: Any, source: Text) -> Inventory:
    """Return what the list says about nodes.

    Raises:
        DocumentError: it is not a list of nodes, has no resources (``--detail`` has them), or has wrong counts.
    """
    if not is_ray(data):
        raise single_problem(source.file, "is no list of nodes: ray list nodes --detail --format json")
    problems: list[Problem] = []
    found = [_node(mapping(node), i, source, problems) for i, node in enumerate(data)]
    notes = ["Ray does not say here which GPUs are in use: all of a living node count as free"]
    return inventory(found, problems, notes)


def _node(node: Mapping[str, Any], index: int, source: Text, problems: list[Problem]) -> FoundNode:
    resources = node.get("resources_total", node.get("Resources"))
    labels = mapping(node.get("labels", node.get("Labels")))
    host = text(node.get("NodeManagerHostname"))
    name = host or text(node.get("node_name")) or text(node.get("NodeName")) or text(node.get("node_ip"))
    if not name:
        problems.append(source.problem((index,), "has no node_name and no NodeManagerHostname"))
    alive = node["state"] == "ALIVE" if "state" in node else node.get("Alive", node.get("alive")) is True
    if not isinstance(resources, dict) and alive:
        problems.append(source.problem((index,), "has no resources: ray list nodes --detail --format json has them"))
    count = whole_number(mapping(resources).get("GPU"), (index, "resources_total", "GPU"), source, problems)
    types = [key.removeprefix(_TYPE) for key in mapping(resources) if key.startswith(_TYPE)]
    types = types or [text(labels.get("ray.io/accelerator-type"))]
    hint = text(labels.get("ray.io/accelerator-type"))  # may say more than the resource: A100-80G instead of A100
    product, reason = types[0] or UNTYPED, "" if alive else "not alive"
    if len(types) > 1:
        reason = reason or f"of several types ({some_of(types)}), and Ray does not say how many of each"
    where = source.problem((index,), "")
    zone = zone_of(labels, _ZONES)
    if not count or reason:
        left_out = (f"{counted(count)} ({some_of(types)}): {reason}",) if count else ()
        return FoundNode(name=name, zone=zone, left_out=left_out, where=where)
    return FoundNode(name=name, zone=zone, gpus=(FoundGpus(product=product, count=count, hints=(hint,)),), where=where)
