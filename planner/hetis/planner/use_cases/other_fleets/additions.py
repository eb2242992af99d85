"""GPUs and nodes specified on a command line: ``4xL4``, ``L4=0.80,H100-SXM-80GB``, ``like node a100-0``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem, attempt, did_you_mean, single_problem
from hetis.formats.files import read_text
from hetis.profiler.defaults import profile_origin
from hetis.solver.advice import Addition, NodeShape
from hetis.solver.cluster import Cluster, GpuType, Link, NodeGroup

T = TypeVar("T")

MAX_ADDED = 100_000  # GPUs per option
_ADDED = re.compile(r"(\d{1,9})\s*[x×]\s*(\S.*)")
DEFAULT_GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetChange:
    """Nodes or groups to remove, GPUs to add, and the nodes in which these come."""

    remove: tuple[str, ...] = ()
    add: tuple[Addition, ...] = ()
    shape: NodeShape


def read_wanted(
    cluster: Cluster,
    *,
    add: Sequence[str],
    remove: Sequence[str],
    market: tuple[Sequence[str] | None, int] | None,
    like: str | None,
    gpus_per_node: int | None,
    zone: str | None,
    nic: Link | None,
) -> tuple[FleetChange, tuple[Addition, ...]]:
    """Return the change and the market of all options for another fleet.

    ``market`` is the option's texts and the number of GPUs, or None if it was not requested.

    Raises:
        DocumentError: contains the problems of all options.
    """
    problems: list[Problem] = []
    shape = attempt(lambda: node_shape(cluster, like=like, gpus_per_node=gpus_per_node, zone=zone, nic=nic), problems)
    added = attempt(lambda: _every(add, lambda text: _addition(text, cluster)), problems)
    removed = attempt(lambda: removals(remove, cluster), problems)
    offers = attempt(lambda: market_of(market[0], cluster, market[1]), problems) if market is not None else ()
    if problems or shape is None:
        raise DocumentError(problems)
    return FleetChange(add=added or (), remove=removed or (), shape=shape), offers or ()


def _every(texts: Sequence[T], read: Callable[[T], Addition]) -> tuple[Addition, ...]:
    """Read all texts, and report the problems of all of them together."""
    problems: list[Problem] = []
    found = [attempt(partial(read, text), problems) for text in texts]
    if problems:
        raise DocumentError(problems)
    return tuple(one for one in found if one is not None)


def _addition(text: str, cluster: Cluster) -> Addition:
    """Return the GPUs of an ``--add`` option."""
    parts = _ADDED.fullmatch(text.strip())
    if parts is None:
        raise single_problem("--add", f"{text!r} is not a count and a GPU type such as 4xL4")
    count = int(parts[1])
    if not 1 <= count <= MAX_ADDED:
        raise single_problem("--add", f"{text!r} adds {count} GPUs, must be 1 to {MAX_ADDED:,}")
    return Addition(gpu=_gpu(parts[2], cluster, "--add"), count=count)


def _gpu(name: str, cluster: Cluster, option: str, line: int | None = None) -> GpuType:
    """Return a type of the fleet, or of the catalogue if it can be planned with.

    ``option``: the option that names it, or the file, which does in a ``line``.
    """
    if name in cluster.gpu_types:
        return cluster.gpu_types[name]
    try:
        gpu = catalogue.find_gpu(name, also=tuple(cluster.gpu_types)).gpu
    except catalogue.UnknownNameError as error:
        raise single_problem(option, str(error), line=line) from None
    gpu = cluster.gpu_types.get(gpu.name, gpu)
    if profile_origin(gpu) is None:
        raise single_problem(option, f"{gpu.name} has no profile, and none can be modelled", line=line)
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


def market_of(texts: Sequence[str] | None, cluster: Cluster, count: int) -> tuple[Addition, ...]:
    """Return the types of all ``--market`` options with their prices, each of them once, at the last of its prices.

    The default is every type of the catalogue that has a price and can be planned with, and every type of the fleet.

    Raises:
        DocumentError: contains every entry that cannot be parsed.
    """
    if not texts:
        return tuple(Addition(gpu=gpu, count=count) for gpu in _priced(cluster))
    problems: list[Problem] = []
    entries = [entry for text in texts for entry in attempt(partial(_entries, text), problems) or ()]
    offers = attempt(lambda: _every(entries, lambda one: _offer(one, cluster, count)), problems) or ()
    if problems:
        raise DocumentError(problems)
    return tuple({offer.gpu.name: offer for offer in offers}.values())


def _priced(cluster: Cluster) -> Iterator[GpuType]:
    own = dict(cluster.gpu_types)
    for entry in catalogue.gpus():
        gpu = own.pop(entry.gpu.name, entry.gpu)
        if gpu.usd_per_hour is not None and profile_origin(gpu) is not None:
            yield gpu
    yield from (gpu for gpu in own.values() if gpu.usd_per_hour is not None)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A GPU type on the market, with its price if that is not the catalogue's, and where it stands."""

    text: str
    file: str = "--market"
    line: int | None = None


def _entries(text: str) -> list[_Entry]:
    """Return the entries between commas or line ends.

    If there is a file of that name, these are its entries without comments.

    Raises:
        DocumentError: there are none, or the file is not a readable text.
    """
    if Path(text).is_file():
        lines = enumerate(read_text(text).splitlines(), start=1)
        found = [_Entry(part, text, number) for number, line in lines for part in _parts_of(line.partition("#")[0])]
        if not found:
            raise single_problem(text, "does not name a GPU type")
        return found
    found = [_Entry(part) for part in _parts_of(text)]
    if not found:
        raise single_problem("--market", f"{text!r} does not name a GPU type")
    return found


def _parts_of(text: str) -> list[str]:
    return [part for line in text.splitlines() for each in line.split(",") if (part := each.strip())]


def _offer(entry: _Entry, cluster: Cluster, count: int) -> Addition:
    name, equals, price = (part.strip() for part in entry.text.partition("="))
    gpu = _gpu(name, cluster, entry.file, entry.line)
    if not equals:
        return Addition(gpu=gpu, count=count)

    def wrong(message: str) -> DocumentError:
        return DocumentError([Problem(file=entry.file, line=entry.line, path=name, message=message)])

    try:
        usd = float(price)
    except ValueError:
        raise wrong(f"{price!r} is not a price in USD per hour") from None
    if not 0 < usd < float("inf"):
        raise wrong(f"the price is {price}, must be above 0 and finite")
    return Addition(gpu=gpu, count=count, usd_per_hour=usd)
