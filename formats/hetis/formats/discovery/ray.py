"""Nodes of Ray: ``ray list nodes --detail --format json``, ``ray.nodes()``, and ``ray status``, which has totals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hetis.formats.discovery.found import (
    FoundGpus,
    FoundNode,
    Inventory,
    counted,
    inventory,
    some_of,
    text,
    whole_number,
    zone_of,
)
from hetis.formats.errors import Problem, single_problem
from hetis.formats.fields import listed, mapping
from hetis.formats.positions import Text

UNTYPED_OF_RAY = "GPU"
"""The product name of GPUs on a node that names no accelerator type."""

_RAY_TYPE = "accelerator_type:"
_RAY_ZONES = ("ray.io/availability-zone", "topology.kubernetes.io/zone")


def is_ray(data: Any) -> bool:
    """Return whether data is a list of Ray's nodes."""
    first = mapping(next(iter(listed(data)), None))
    return "resources_total" in first or "Resources" in first or ("node_ip" in first and "is_head_node" in first)


def read_ray(data: Any, source: Text) -> Inventory:
    """Return the nodes in the list. Raises DocumentError if it is no such list, or resources are missing or wrong."""
    if not is_ray(data):
        raise single_problem(source.file, "is not a list of nodes: use ray list nodes --detail --format json")
    problems: list[Problem] = []
    found = [_ray_node(mapping(node), i, source, problems) for i, node in enumerate(data)]
    return inventory(found, problems, [_ALL_FREE])


def _ray_node(node: Mapping[str, Any], index: int, source: Text, problems: list[Problem]) -> FoundNode:
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
    types = [key.removeprefix(_RAY_TYPE) for key in mapping(resources) if key.startswith(_RAY_TYPE)]
    types = types or [text(labels.get("ray.io/accelerator-type"))]
    hint = text(labels.get("ray.io/accelerator-type"))  # may be more specific: A100-80G instead of A100
    product, reason = types[0] or UNTYPED_OF_RAY, "" if alive else "not alive"
    if len(types) > 1:
        reason = reason or f"of several types ({some_of(types)}), and Ray does not report how many of each"
    where = source.problem((index,), "")
    zone = zone_of(labels, _RAY_ZONES)
    if not count or reason:
        left_out = (f"{counted(count)} ({some_of(types)}): {reason}",) if count else ()
        return FoundNode(name=name, zone=zone, left_out=left_out, where=where)
    return FoundNode(name=name, zone=zone, gpus=(FoundGpus(product=product, count=count, hints=(hint,)),), where=where)


_ALL_FREE = "Ray does not report here which GPUs are in use: all GPUs of a live node count as free"
_STATUS = re.compile(r"(?m)^={3,} Autoscaler status")
_AMOUNT = re.compile(r"(?m)^\s+[\d.]+/([\d.]+) (GPU|accelerator_type:\S+)")


def is_ray_status(written: str) -> bool:
    return _STATUS.search(written[:2000]) is not None


def read_ray_status(written: str, file: str) -> Inventory:
    """Return the nodes in ``ray status -v``, or equal ones in ``ray status``.

    Raises DocumentError if totals do not say which node has which GPUs.
    """
    where, parts = Problem(file=file, message=""), re.split(r"(?m)^Node: ", written)
    if len(parts) > 1:
        return inventory([_of_usage(part, where) for part in parts[1:]], [], [_ALL_FREE], file=file)
    amounts = {kind: float(total) for total, kind in _AMOUNT.findall(written)}
    gpus = amounts.pop("GPU", 0.0)
    kinds, number = [kind.removeprefix(_RAY_TYPE) for kind in amounts], int(next(iter(amounts.values()), 0))
    if len(kinds) != 1 or not 1 <= number <= gpus or gpus % number:
        has = f"{gpus:g} GPUs of {some_of(kinds) or 'no type'}"
        raise single_problem(file, f"has totals, {has}, which do not say what each node has: ray status -v")
    each = (FoundGpus(product=kinds[0], count=int(gpus) // number),)
    made = [FoundNode(name=f"ray-{i}", gpus=each, where=where) for i in range(number)]
    return inventory(made, [], [_ALL_FREE, "ray status does not name nodes"], file=file)


def _of_usage(part: str, where: Problem) -> FoundNode:
    amounts = {kind: float(total) for total, kind in _AMOUNT.findall(part)}
    kinds = [kind.removeprefix(_RAY_TYPE) for kind in amounts if kind != "GPU"]
    count = int(amounts.get("GPU", 0))
    gpus = (FoundGpus(product=kinds[0] if kinds else UNTYPED_OF_RAY, count=count),) if count else ()
    return FoundNode(name=part.split()[0], gpus=gpus, where=where)
