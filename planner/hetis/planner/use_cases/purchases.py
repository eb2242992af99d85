"""GPUs and nodes named on a command line: ``4xL4``, ``L4=0.80,H100-SXM-80GB``, ``like node a100-0``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem, did_you_mean
from hetis.planner.use_cases.sources import attempt
from hetis.planner.use_cases.what_if import FleetChange
from hetis.profiler.defaults import profile_origin
from hetis.solver.advice import Addition, NodeShape, node_names
from hetis.solver.cluster import Cluster, GpuType, Link, NodeGroup

MAX_ADDED = 100_000  # GPUs per option
_ADDED = re.compile(r"(\d{1,9})\s*[x×]\s*(\S.*)")
DEFAULT_GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The parsed options."""

    change: FleetChange
    market: tuple[Addition, ...]


def read(
    cluster: Cluster,
    *,
    add: Sequence[str],
    remove: Sequence[str],
    market: tuple[str | None, int] | None,
    like: str | None,
    gpus_per_node: int | None,
    zone: str | None,
    nic: Link | None,
) -> Wanted:
    """Parse all options for another fleet. ``market`` is its text and the number of GPUs, or None if not requested.

    Raises:
        DocumentError: with the problems of all options.
    """
    problems: list[Problem] = []
    shape = attempt(lambda: node_shape(cluster, like=like, gpus_per_node=gpus_per_node, zone=zone, nic=nic), problems)
    added = attempt(lambda: additions(add, cluster), problems)
    removed = attempt(lambda: removals(remove, cluster), problems)
    offers = attempt(lambda: market_of(market[0], cluster, market[1]), problems) if market is not None else ()
    if problems or shape is None:
        raise DocumentError(problems)
    return Wanted(change=FleetChange(add=added or (), remove=removed or (), shape=shape), market=offers or ())


def additions(texts: Sequence[str], cluster: Cluster) -> tuple[Addition, ...]:
    """Return the GPUs of ``--add`` options.

    Raises:
        DocumentError: with every option that cannot be parsed.
    """
    problems: list[Problem] = []
    found = [attempt(lambda text=text: _addition(text, cluster), problems) for text in texts]  # type: ignore[misc]
    if problems:
        raise DocumentError(problems)
    return tuple(addition for addition in found if addition is not None)


def _addition(text: str, cluster: Cluster) -> Addition:
    parts = _ADDED.fullmatch(text.strip())
    if parts is None:
        raise _problem("--add", f"{text!r} is not a number of GPUs of a type, such as 4xL4")
    count = int(parts[1])
    if not 1 <= count <= MAX_ADDED:
        raise _problem("--add", f"{text!r} adds {count} GPUs, must be 1 to {MAX_ADDED:,}")
    return Addition(gpu=_gpu(parts[2], cluster, "--add"), count=count)


def _gpu(name: str, cluster: Cluster, option: str) -> GpuType:
    """Return a type of the fleet or of the catalogue that can be planned with."""
    if name in cluster.gpu_types:
        return cluster.gpu_types[name]
    try:
        gpu = catalogue.find_gpu(name, also=tuple(cluster.gpu_types)).gpu
    except catalogue.UnknownNameError as error:
        raise _problem(option, str(error)) from None
    gpu = cluster.gpu_types.get(gpu.name, gpu)
    if profile_origin(gpu) is None:
        raise _problem(option, f"{gpu.name} has no profile and none can be modelled")
    return gpu


def removals(names: Sequence[str], cluster: Cluster) -> tuple[str, ...]:
    """Return the nodes and groups of ``--remove`` options.

    Raises:
        DocumentError: with every name that the cluster does not have.
    """
    known = {group.name for group in cluster.node_groups} | set(node_names(cluster))
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
    """Return the nodes in which GPUs are added: like one of the fleet's, or of 8 GPUs in the fleet's first zone.

    The other options override these values.

    Raises:
        DocumentError: no such node or zone.
    """
    problems: list[Problem] = []
    model = attempt(lambda: _node(cluster, like), problems) if like is not None else None
    if zone is not None and zone not in cluster.zones():
        message = f"cluster {cluster.name} has no zone {zone}{did_you_mean(zone, cluster.zones())}"
        problems.append(Problem(file="--zone", message=message))
    if problems:
        raise DocumentError(problems)
    if model is None:
        shape = NodeShape(gpus_per_node=DEFAULT_GPUS_PER_NODE, zone=cluster.zones()[0])
    else:
        size = sum(slots.count for slots in model.gpus)
        shape = NodeShape(gpus_per_node=size, zone=model.zone, nic=model.nic, intra_link=model.intra_link)
    return replace(
        shape,
        gpus_per_node=gpus_per_node if gpus_per_node is not None else shape.gpus_per_node,
        zone=zone if zone is not None else shape.zone,
        nic=nic if nic is not None else shape.nic,
    )


def _node(cluster: Cluster, name: str) -> NodeGroup:
    for group in cluster.node_groups:
        if name == group.name or any(name == group.node_name(i) for i in range(group.count)):
            return group
    known = [group.name for group in cluster.node_groups] + list(node_names(cluster))
    raise _problem("--node-like", f"cluster {cluster.name} has no node {name}{did_you_mean(name, known)}")


def market_of(text: str | None, cluster: Cluster, count: int) -> tuple[Addition, ...]:
    """Return the types of a ``--market`` option with their prices, each once.

    The default is all types of the catalogue that have a price and can be planned with, and those of the fleet.

    Raises:
        DocumentError: with every entry that cannot be parsed.
    """
    if text is None:
        return tuple(Addition(gpu=gpu, count=count) for gpu in _priced(cluster))
    problems: list[Problem] = []
    entries = _entries(text)
    found = [attempt(lambda e=entry: _offer(e, cluster, count), problems) for entry in entries]  # type: ignore[misc]
    if not entries:
        problems.append(Problem(file="--market", message=f"{text!r} names no GPU type"))
    if problems:
        raise DocumentError(problems)
    by_type = {offer.gpu.name: offer for offer in found if offer is not None}
    return tuple(by_type.values())


def _priced(cluster: Cluster) -> Iterator[GpuType]:
    own = dict(cluster.gpu_types)
    for entry in catalogue.gpus():
        gpu = own.pop(entry.gpu.name, entry.gpu)
        if gpu.usd_per_hour is not None and profile_origin(gpu) is not None:
            yield gpu
    yield from (gpu for gpu in own.values() if gpu.usd_per_hour is not None)


def _entries(text: str) -> list[str]:
    """Return the entries between commas or line ends; if a file has that name, its entries without comments."""
    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8") if path.is_file() else text
    except (OSError, UnicodeDecodeError) as error:
        raise _problem(text, f"cannot be read as text: {error}") from None
    lines = (line.partition("#")[0] for line in content.splitlines())
    return [entry.strip() for line in lines for entry in line.split(",") if entry.strip()]


def _offer(entry: str, cluster: Cluster, count: int) -> Addition:
    name, equals, price = (part.strip() for part in entry.partition("="))
    gpu = _gpu(name, cluster, "--market")
    if not equals:
        return Addition(gpu=gpu, count=count)
    try:
        usd = float(price)
    except ValueError:
        raise _problem("--market", f"{entry!r}: {price!r} is not a price in USD per hour") from None
    if not 0 < usd < float("inf"):
        raise _problem("--market", f"{entry!r}: the price is {price}, must be above 0 and finite")
    return Addition(gpu=gpu, count=count, usd_per_hour=usd)


def _problem(option: str, message: str) -> DocumentError:
    return DocumentError([Problem(file=option, message=message)])
