"""Finds the GPU types that product names mean, and writes a cluster file with what was left out and assumed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hetis.formats import catalogue
from hetis.formats.catalogue import UnknownNameError
from hetis.formats.discovery.found import DEFAULT_ZONE, FoundGpus, FoundNode, Inventory, counted, some_of
from hetis.formats.discovery.labels import product_label
from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.solver.cluster import Cluster, GpuSlots, GpuType, Link, Network, NodeGroup, indices_of

LEAVE_OUT = "none"
"""Given instead of a product's type to exclude it from the plan."""

# Memory as drivers report it is up to 7% below the board's nominal size (ECC and firmware take some).
_MOST_DIFFERENCE = 0.12
_SHARED = re.compile(r"-SHARED$")  # appended by GFD if several pods take turns on a GPU


class UnclearBoardError(Exception):
    """A product name means no GPU type, or several. The text names them, and says what to do."""


def said_types(pairs: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the types in ``--gpu PRODUCT=TYPE`` options, by product, and the problems with them."""
    said, wrong = dict[str, str](), list[str]()
    for pair in pairs:
        product, equals, name = (part.strip() for part in pair.partition("="))
        if not (product and equals and name):
            wrong.append(f"--gpu {pair[:80]!r}: expected PRODUCT=TYPE, such as a100=A100-SXM-80GB")
            continue
        try:
            said[product.casefold()] = name if name.lower() == LEAVE_OUT else catalogue.find_gpu(name).gpu.name
        except UnknownNameError as error:
            wrong.append(f"--gpu {pair[:80]!r}: {error}")
    return said, wrong


def unmatched(inventory: Inventory, said: Mapping[str, str]) -> list[str]:
    """Return a sentence for each product that the user named and the inventory lacks, also among GPUs left out."""
    names = dict.fromkeys(gpus.product for node in inventory.nodes for gpus in node.gpus)
    known = {spelled.casefold() for name in names for spelled in (name, _SHARED.sub("", name))}
    unusable = "\n".join(reason for node in inventory.nodes for reason in node.left_out).casefold()
    there = f"names found: {some_of([repr(name) for name in names])}" if names else "no usable GPUs were found"

    def is_unusable(name: str) -> bool:
        return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", unusable) is not None

    return [f"no GPU is called {name!r}; {there}" for name in said if name not in known and not is_unusable(name)]


def board_of(gpus: FoundGpus, said: Mapping[str, str]) -> str:
    """Return the name in the catalogue, or `LEAVE_OUT` if the user has chosen that.

    Boards that share a name are distinguished by memory, then by the hints. Raises UnclearBoardError if the product
    matches no type, or more than one.
    """
    product = _SHARED.sub("", gpus.product)
    for spelled in (gpus.product, product):
        if spelled.casefold() in said:
            return said[spelled.casefold()]
    candidates, suggested = _candidates(product)
    sizes = {name: catalogue.find_gpu(name).gpu.memory_bytes for name in candidates}
    own = gpus.memory_bytes
    fitting = [name for name, size in sizes.items() if own is None or abs(own / size - 1) <= _MOST_DIFFERENCE]
    fitting = [name for name in fitting if _may_be_of(gpus.part, name, sizes[name])] or fitting
    for hint in filter(None, gpus.hints):
        if len(fitting) > 1:
            told = {*_candidates(f"{product} {hint}")[0], *_candidates(hint)[0]}
            fitting = [name for name in fitting if name in told] or fitting
    if own is not None and not fitting:  # a board of which there is one with other memory
        sizes_gb = range(round(own / 2**30), round(own * 1.05 / 2**30) + 1)  # nominal ones are somewhat larger
        fitting = next(filter(None, (list(_candidates(f"{product} {size}GB")[0]) for size in sizes_gb)), [])
    if len(fitting) == 1 or (gpus.part and _are_alike(fitting)):
        return min(fitting, key=lambda name: catalogue.find_gpu(name).gpu.mem_bytes_per_s)
    how = f"; --gpu '{gpus.product}=TYPE' selects one ('={LEAVE_OUT}' leaves them out)"
    if "/" in gpus.product:  # a resource of Kubernetes
        label = product_label(gpus.product)
        names = f", which {label} does" if label else ""
        raise UnclearBoardError(f"no label of the node says what {gpus.product} is{names}{how}")
    if len(fitting) > 1:
        raise UnclearBoardError(f"GPU {gpus.product!r} could be {' or '.join(fitting)}{how}")
    if candidates and gpus.memory_bytes is not None:
        has = ", ".join(f"{name} with {_gib(catalogue.find_gpu(name).gpu.memory_bytes)} GiB" for name in candidates)
        size_gib = _gib(gpus.memory_bytes)
        raise UnclearBoardError(f"GPU {gpus.product!r} has {size_gib} GiB; the catalogue knows {has}{how}")
    near = f", did you mean {' or '.join(suggested)}?" if suggested else ""
    add = "" if near else "; a file of gpu_types adds it, with five figures: hetis-plan schema Cluster"
    raise UnclearBoardError(f"GPU {gpus.product!r} is not in the catalogue{near}{how}{add}")


def _may_be_of(part: str, name: str, memory_bytes: int) -> bool:
    """Return whether a card may have slices of a profile: one of 3g has half its memory, so 3g.20gb is of 40 GB."""
    shape = _SLICE.fullmatch(part)
    shares: Mapping[str, Sequence[int]] = {"1": (8, 4), "2": (4,), "3": (2,), "4": (2,), "7": (1,)}
    if name.startswith(_OF_FOUR):
        shares = {"1": (4,), "2": (2,), "4": (1,)}
    sizes = [int(shape[2]) * share * 2**30 for share in shares.get(shape[1], ())] if shape else [memory_bytes]
    return any(abs(size / memory_bytes - 1) <= _MOST_DIFFERENCE for size in sizes)


def _are_alike(names: Sequence[str]) -> bool:
    """Return whether boards differ by so little that a slice of one is as fast as of another: without links."""
    gpus = [catalogue.find_gpu(name).gpu for name in names]
    figures = [[gpu.mem_bytes_per_s for gpu in gpus], [gpu.fp16_flops for gpu in gpus]]
    return bool(gpus) and all(max(of) <= min(of) * 1.1 for of in figures)


def _candidates(product: str) -> tuple[Collection[str], Collection[str]]:
    """Return the types that a name may mean or, if there are none, those nearest to it."""
    try:
        return (catalogue.find_gpu(product).gpu.name,), ()
    except UnknownNameError as error:
        return (error.candidates, ()) if error.ambiguous else ((), error.candidates)


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f}"


DEFAULT_LINK = Link(bytes_per_s=12.5e9, latency_s=20e-6)  # 100 Gbit/s: what a node's NIC usually has at least
ZONE_LINK = Link(bytes_per_s=1.25e9, latency_s=1e-3)  # 10 Gbit/s: zones of one region, a share of their trunk

_MOST_LEFT_OUT = 1000  # maximum number of such lines in a file
_NUMBERED = re.compile(r"(.+)-(0|[1-9]\d{0,6})")

# Bytes per second of one NVLink in one direction, by architecture (from NVIDIA's white papers). Ampere boards without
# HBM have slower ones.
_LANES = {"Pascal": 20e9, "Volta": 25e9, "Turing": 25e9, "Ampere": 25e9, "Hopper": 25e9, "Blackwell": 50e9}
_SLOW_LANE = 14.0625e9
_AMPERE_WITH_HBM = ("A100", "A800", "A30")


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovered:
    """A fleet as its tools describe it."""

    cluster: Cluster  # the hardware that a plan may use
    left_out: tuple[str, ...]  # a sentence for everything that it may not use
    assumed: tuple[str, ...]  # what no tool reported, so the file states it
    renamed: tuple[str, ...] = ()  # a sentence for each node and zone whose name a cluster file does not allow


def discovered(inventory: Inventory, *, name: str, link: Link | None = None, said: Mapping[str, str]) -> Discovered:
    """Return the cluster of an inventory. Raises DocumentError if a product name matches no type or several, two nodes
    share a name, also after their names were changed to those that files allow, or nothing is usable.

    ``link`` is that between any two nodes of a zone; None: `DEFAULT_LINK`, which the file then states. ``said`` has the
    types of products that the user named (`said_types`).
    """
    groups, left_out, notes = list[NodeGroup](), list[str](), list[str]()
    types = dict[str, GpuType]()
    problems: dict[str, Problem] = {}
    seen: dict[str, FoundNode] = {}
    for node in inventory.nodes:
        called = _name(node.name)
        if called in seen:
            problems.setdefault(called, replace(node.where, message=_same_name(node, seen[called], called)))
        seen[called] = node
        left_out += [f"{node.name}: {reason}" for reason in node.left_out]
        slots, indices, unwanted = _slots(node, said, problems)
        left_out += unwanted
        types |= _types_reported(node, said)
        for gpus, group in _slices(node, said, problems, called):
            types[gpus.name] = gpus
            groups.append(group)
            notes.append(_OF_SLICES)
        if slots:
            intra, note = _inside(node, [catalogue.find_gpu(one.gpu).gpu for one in slots])
            notes += [note] if note else []
            groups.append(
                NodeGroup(
                    name=called,
                    gpus=slots,
                    zone=_name(node.zone),
                    intra_link=intra,
                    indices=indices,
                    resource=next((one.resource for one in node.gpus if one.resource and not one.part), ""),
                )
            )
    if problems:
        raise DocumentError(problems.values())
    if not groups:
        raise single_problem(inventory.file, _nothing(inventory, left_out))
    if inventory.num_without_gpus:
        left_out.append(f"{counted(inventory.num_without_gpus, 'node')} without GPUs")
    zones = list(dict.fromkeys(group.zone for group in groups))
    used = {
        slots.gpu: types.get(slots.gpu) or catalogue.find_gpu(slots.gpu).gpu for group in groups for slots in group.gpus
    }
    notes += [
        f"memory: {gpu.memory_bytes / 2**30:.1f} GiB of {name}, as reported, which `gpu_types` states"
        for name, gpu in used.items()
        if (known := catalogue.gpu_types().get(name)) is not None and known.memory_bytes != gpu.memory_bytes
    ]
    if any(slots.reserved_bytes for group in groups for slots in group.gpus):
        notes.append(
            "memory in use stays in use: plans are made beside `reserved`, the most of a node's GPUs of a type; take "
            "it out if it will be free"
        )
    cluster = Cluster(
        name=name,
        node_groups=tuple(_numbered(groups)),
        gpu_types=used,
        network=Network(default=link or DEFAULT_LINK, zone_default=ZONE_LINK if len(zones) > 1 else None),
    )
    assumed = (*inventory.notes, *dict.fromkeys(notes), *_assumed(groups, used, zones, link))
    usable = {group.name for group in groups}
    renamed = _renamed(node for node in inventory.nodes if _name(node.name) in usable)
    return Discovered(cluster=cluster, left_out=tuple(left_out), assumed=assumed, renamed=tuple(renamed))


def file_text(found: Discovered, *, sources: Sequence[str]) -> str:
    """Return the cluster file with comments on its sources, what is left out and why, is renamed, and is assumed."""
    cluster = found.cluster
    num_nodes = sum(group.count for group in cluster.node_groups)
    by_type = Counter[str]()
    for group in cluster.node_groups:
        by_type.update({slots.gpu: group.count * slots.count for slots in group.gpus})
    types = ", ".join(f"{count} {gpu}" for gpu, count in by_type.items())
    lines = [
        f"Found by `hetis-plan cluster discover` in {some_of(sources)}: {counted(num_nodes, 'node')} with {types}."
    ]
    renamed = "Renamed, because names have only letters, digits, '.', '_' and '-':"
    for title, sentences in (("Left out:", found.left_out), (renamed, found.renamed)):
        if sentences:
            lines += ["", title, *(f"- {one}" for one in sentences[:_MOST_LEFT_OUT])]
        if len(sentences) > _MOST_LEFT_OUT:
            lines.append(f"- and {len(sentences) - _MOST_LEFT_OUT} more")
    lines += ["", "Not reported and therefore assumed; correct what is wrong:", *(f"- {one}" for one in found.assumed)]
    # Nothing may end a comment, whatever names it contains.
    safe = ["".join(sign if sign.isprintable() else "?" for sign in line)[:1000] for line in lines]
    return "".join(f"# {line}".rstrip() + "\n" for line in safe) + dump(cluster)


def _slots(
    node: FoundNode, said: Mapping[str, str], problems: dict[str, Problem]
) -> tuple[tuple[GpuSlots, ...], tuple[int, ...], list[str]]:
    """Return the GPUs of a node by type, the driver's indices of these unless they are 0, 1, ..., and a sentence for
    each group of GPUs that the user leaves out. Each unclear name is reported once.
    """
    places, unwanted, start, reserved = dict[str, list[int]](), list[str](), 0, dict[str, int]()
    for gpus in node.gpus:
        if gpus.part:
            continue
        here, start = range(start, start + gpus.count), start + gpus.count
        board = _board(node, gpus, said, problems)
        if board is None:
            continue
        if board == LEAVE_OUT:
            unwanted.append(f"{node.name}: {counted(gpus.count)} ({gpus.product}): excluded by --gpu")
        else:  # a type that comes again after another one is one type all the same
            places.setdefault(board, []).extend(here)
            reserved[board] = max(reserved.get(board, 0), gpus.reserved_bytes)
    numbers = [node.indices[i] for of_type in places.values() for i in of_type] if node.indices else []
    return (
        tuple(
            GpuSlots(gpu=board, count=len(of_type), reserved_bytes=reserved[board]) for board, of_type in places.items()
        ),
        indices_of(numbers),
        unwanted,
    )


def _board(node: FoundNode, gpus: FoundGpus, said: Mapping[str, str], problems: dict[str, Problem]) -> str | None:
    """Return the board of a node's GPUs, or `LEAVE_OUT`; None: it is unclear, which is reported once."""
    try:
        return board_of(gpus, said)
    except UnclearBoardError as error:
        problems.setdefault(str(error), replace(node.where, message=f"{node.name}: {error}"))
        return None


def _types_reported(node: FoundNode, said: Mapping[str, str]) -> dict[str, GpuType]:
    """Return the types whose memory a tool reports as another than nominal."""
    found = dict[str, GpuType]()
    for gpus in node.gpus:
        try:
            board = LEAVE_OUT if gpus.part or gpus.memory_bytes is None else board_of(gpus, said)
        except UnclearBoardError:  # `_slots` refuses it
            continue
        if board == LEAVE_OUT:
            continue
        gpu = catalogue.find_gpu(board).gpu
        if gpus.memory_bytes and _LEAST_DIFFERENCE < abs(gpus.memory_bytes / gpu.memory_bytes - 1) <= _MOST_DIFFERENCE:
            found[board] = replace(gpu, memory_bytes=gpus.memory_bytes)
    return found


_LEAST_DIFFERENCE = 0.01  # of memory as reported from nominal memory, below which it is nominal
_OF_SLICES = (
    "MIG slices are nodes of their own, since no engine joins two of them; the affinity of exported pods has to name "
    "the node that they are on"
)
_SLICE = re.compile(r"([1-7])[cg]\.(?:[1-7]g\.)?(\d{1,3})gb(?:[+-]me)?(?:\.\w+)?", re.IGNORECASE)
# Of a card's multiprocessors and of its memory (docs.nvidia.com, MIG User Guide, "Profiles"); some have four of both.
_SLICES, _OF_FOUR = (7, 8), ("A30", "RTX-PRO")


def _slices(
    node: FoundNode, said: Mapping[str, str], problems: dict[str, Problem], called: str
) -> Iterator[tuple[GpuType, NodeGroup]]:
    """Yield the type and the group of the MIG slices of each profile on a node: a seventh of the card's compute and an
    eighth of its memory and bandwidth, times the numbers in its name (``3g.20gb``).
    """
    for gpus in node.gpus:
        shape = _SLICE.fullmatch(gpus.part)
        if not gpus.part or shape is None:
            if gpus.part:
                message = f"MIG profile {gpus.part[:40]!r} is not of the form 1g.10gb"
                problems.setdefault(message, replace(node.where, message=f"{node.name}: {message}"))
            continue
        board = _board(node, gpus, said, problems)
        if board is None or board == LEAVE_OUT:
            continue
        card, num_slices = catalogue.find_gpu(board).gpu, 4 if board.startswith(_OF_FOUR) else _SLICES[0]
        compute = min(1.0, int(shape[1]) / num_slices)
        eighths = max(1, min(_SLICES[1], round(int(shape[2]) * 2**30 * _SLICES[1] / card.memory_bytes)))
        memory = eighths / _SLICES[1]
        gpu = replace(
            card,
            name=f"{board}-{gpus.part.lower()}",
            memory_bytes=int(card.memory_bytes * memory),
            mem_bytes_per_s=card.mem_bytes_per_s * memory,
            fp16_flops=card.fp16_flops * compute,
            fp8_flops=None if card.fp8_flops is None else card.fp8_flops * compute,
            nvlink_bytes_per_s=None,
            usd_per_hour=None if card.usd_per_hour is None else card.usd_per_hour * memory,
        )
        slots, zone = (GpuSlots(gpu=gpu.name, count=1),), _name(node.zone)
        name = _name(f"{called}-{gpus.part.lower()}")
        yield gpu, NodeGroup(name=name, gpus=slots, count=gpus.count, numbered=True, zone=zone, resource=gpus.resource)


def _nothing(inventory: Inventory, left_out: Iterable[str]) -> str:
    reasons = list(left_out)
    if not reasons:
        return f"has no GPUs in its {counted(inventory.num_without_gpus, 'node')}"
    return f"has no GPU that a plan may use: {'; '.join(reasons[:8])}" + ("; ..." if len(reasons) > 8 else "")


def _name(text: str) -> str:
    """Return a node's or zone's name, part of device names, with ``-`` for what cluster files do not allow."""
    kept = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in text)[:200]
    return kept if kept[:1].isalnum() else f"n{kept}"[:200]


def _same_name(node: FoundNode, other: FoundNode, called: str) -> str:
    """Return the sentence about two nodes with one name, which they may have only in a cluster file."""
    if node.name != other.name:
        where = f" of {other.where.file}" if other.where.file else ""
        return f"{other.name!r}{where} and {node.name!r} would both be named {called!r}: rename one of them"
    return f"two nodes are named {called!r}" + (f", of {other.where.file}" if other.where.file else "")


def _renamed(nodes: Iterable[FoundNode]) -> Iterator[str]:
    """Yield a sentence for each node and zone that has another name in the file, and for zones that become one."""
    zones: dict[str, dict[str, None]] = {}  # the tool's names by that in the file
    for node in nodes:
        if (called := _name(node.name)) != node.name:
            yield f"node {node.name[:80]!r} is {called!r}"
        zones.setdefault(_name(node.zone), {})[node.zone] = None
    for called, names in zones.items():
        shown = " and ".join(repr(name[:80]) for name in names)
        if len(names) > 1:
            yield f"zones {shown} are one, {called!r}"
        elif called not in names:
            yield f"zone {shown} is {called!r}"


def _inside(node: FoundNode, gpus: Sequence[GpuType]) -> tuple[Link | None, str]:
    """Return the link between a node's GPUs if its topology differs from that of their types, and a note about it."""
    switched = [gpu.nvlink_bytes_per_s for gpu in gpus if gpu.nvlink_bytes_per_s is not None]
    if node.nvlinks is None or len(gpus) != 1:
        return None, ""
    if node.bridged:
        return None, f"{node.name}: only some pairs of GPUs have NVLinks; the file has a single link for all pairs"
    if node.nvlinks == 0 and switched:
        slow = Link(bytes_per_s=gpus[0].pcie_bytes_per_s, latency_s=0.0)
        return slow, f"{node.name}: its topology shows no NVLink, so that `link` is PCIe"
    lane = _lane(gpus[0])
    if node.nvlinks and not switched and lane:
        fast = Link(bytes_per_s=node.nvlinks * lane, latency_s=0.0)
        return fast, f"{node.name}: `link` is {node.nvlinks} NVLinks between every pair, as its topology shows"
    return None, ""


def _lane(gpu: GpuType) -> float | None:
    if gpu.architecture == "Ampere" and not gpu.name.startswith(_AMPERE_WITH_HBM):
        return _SLOW_LANE
    return _LANES.get(gpu.architecture)


def _numbered(groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """Return the groups with equal nodes ``name-0``, ``name-1``, ... merged if none is missing: no name changes."""
    names = {group.name for group in groups}
    members: dict[str, dict[int, NodeGroup]] = {}
    for group in groups:
        if found := _NUMBERED.fullmatch(group.name):
            members.setdefault(found[1], {})[int(found[2])] = group
    whole = {
        prefix
        for prefix, found in members.items()
        if len(found) > 1
        and prefix not in names
        and set(found) == set(range(len(found)))
        and len({replace(one, name=prefix) for one in found.values()}) == 1
    }
    together: dict[str, NodeGroup] = {}
    for group in groups:
        prefix = found[1] if (found := _NUMBERED.fullmatch(group.name)) else group.name
        if prefix in whole:
            together[prefix] = replace(group, name=prefix, count=len(members[prefix]), numbered=True)
        else:
            together[group.name] = group
    return list(together.values())


def _assumed(
    groups: Sequence[NodeGroup], used: Mapping[str, GpuType], zones: Sequence[str], link: Link | None
) -> Iterable[str]:
    if link is None and len(groups) > 1:
        yield "network: 100 Gbps and 20 us between nodes; change it with --bandwidth and --latency, or `nic` of a node"
    if len(zones) > 1:
        yield "zones: 10 Gbps and 1 ms between nodes of different zones"
    if len(zones) > 1 and (unzoned := [group.name for group in groups if group.zone == DEFAULT_ZONE]):
        yield f"zones: none is reported for {some_of(unzoned)}: taken to be apart from all others; set `zone` there"
    priced = [name for name, gpu in used.items() if gpu.usd_per_hour is not None]
    unpriced = [name for name in used if name not in priced]
    if priced:
        yield (
            "prices: list prices of the catalogue, with sources in `hetis-plan catalog gpus -o json`; set your own in"
            " `usd_per_hour`"
        )
    if unpriced:
        yield f"prices: none is known for {', '.join(unpriced)}; --objective cost needs `usd_per_hour`"
