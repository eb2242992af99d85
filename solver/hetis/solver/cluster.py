"""The fleet: GPU types, groups of equal nodes, and the links between them.

A `Cluster` holds *groups* of equal nodes, never single ones, so a fleet of a million GPUs is as small a value as one of
twelve. Names of single nodes and devices are derived: node 3 of group ``l4`` is ``l4-3`` (the node of a group of one is
just ``l4``), and its second GPU is ``l4-3/1``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hetis.solver.errors import InvalidProblemError


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection; a message takes ``latency_s + bytes / bytes_per_s`` seconds in one direction."""

    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise InvalidProblemError(f"link bandwidth is {self.bytes_per_s} bytes/s, must be > 0")
        if not self.latency_s >= 0:
            raise InvalidProblemError(f"link latency is {self.latency_s} s, must be >= 0")

    def slower_of(self, other: Link) -> Link:
        """Return a link with the worse bandwidth and the worse latency of the two, as the cost model treats a path."""
        return Link(
            bytes_per_s=min(self.bytes_per_s, other.bytes_per_s), latency_s=max(self.latency_s, other.latency_s)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuType:
    """The catalogue entry of a GPU type; peaks are nominal, and profiles record what is reached."""

    name: str
    architecture: str
    memory_bytes: int  # nominal
    mem_bytes_per_s: float  # peak memory bandwidth
    fp16_flops: float  # peak dense fp16 or bf16 matrix rate, FLOP/s
    fp8_flops: float | None = None  # None: no fp8 matrix units
    pcie_bytes_per_s: float = 32e9  # one direction
    nvlink_bytes_per_s: float | None = None  # one direction; None: no switched NVLink or Infinity Fabric on this board
    usd_per_hour: float | None = None
    vendor: str = "NVIDIA"  # vendor of the software that runs on it


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSlots:
    """``count`` GPUs of one type in every node of a group."""

    gpu: str
    count: int
    usd_per_hour: float | None = None  # price of one GPU; overrides the catalogue
    reserved_bytes: int = 0  # memory of each that others hold

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidProblemError(f"{self.gpu}: count is {self.count}, must be >= 1")
        if self.reserved_bytes < 0:
            raise InvalidProblemError(f"{self.gpu}: reserved_bytes is {self.reserved_bytes}, must be >= 0")


def indices_of(numbers: Sequence[int]) -> tuple[int, ...]:
    """Return the ``indices`` of nodes whose GPUs the driver numbers so, in the order of ``gpus``: empty if from 0."""
    return () if list(numbers) == list(range(len(numbers))) else tuple(numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """``count`` equal nodes. A node may hold several GPU types."""

    name: str
    gpus: tuple[GpuSlots, ...]
    count: int = 1
    numbered: bool = False  # True: the file gave `count`, so even a single node is called `name-0`
    zone: str = "default"
    nic: Link | None = None  # None: the cluster network's link
    intra_link: Link | None = None  # GPU to GPU inside the node; None: NVLink or PCIe of the GPU type
    indices: tuple[int, ...] = ()  # the driver's index of each GPU, in the order of ``gpus``; empty: from 0
    resource: str = ""  # by which pods request the GPUs in Kubernetes; empty: that of their vendor's device plugin

    def __post_init__(self) -> None:
        num_gpus = sum(slots.count for slots in self.gpus)
        if self.indices and (len(self.indices) != num_gpus or len(set(self.indices)) < num_gpus):
            raise InvalidProblemError(f"node {self.name}: indices must be {num_gpus} different numbers")

    def node_name(self, index: int) -> str:
        return f"{self.name}-{index}" if self.numbered else self.name

    def index_of(self, node: str) -> int | None:
        """Return the index of the node of this name, or None if the group has no such node."""
        number = node.removeprefix(f"{self.name}-") if self.numbered else "0"
        index = int(number) if number.isascii() and number.isdigit() and len(number) < 20 else -1
        return index if 0 <= index < self.count and node == self.node_name(index) else None

    def devices(self, index: int) -> Iterator[Device]:
        """Yield the GPUs of one of its nodes."""
        name = self.node_name(index)
        return (Device(node=name, index=number, gpu=gpu, group=self) for number, gpu in self.gpus_of_node().items())

    def node(self, index: int) -> NodeGroup:
        """Return one of its nodes as a group of its own with the node's name."""
        return replace(self, name=self.node_name(index), count=1, numbered=False)

    def gpus_of_node(self) -> dict[int, str]:
        """Return the type of each GPU of a node by its index, in the order of ``gpus``."""
        types = [slots.gpu for slots in self.gpus for _ in range(slots.count)]
        return dict(zip(self.indices or range(len(types)), types, strict=True))

    def reserved_bytes(self, gpu: str) -> int:
        """Return the memory that others hold of any GPU of a type: engines take as much of each GPU."""
        return max((slots.reserved_bytes for slots in self.gpus if slots.gpu == gpu), default=0)

    def keeping(self, is_kept: Callable[[int, str], bool]) -> NodeGroup:
        """Return the nodes with some of their GPUs, possibly none; ``is_kept`` is called with each index and type."""
        slots, kept, left = list[GpuSlots](), list[int](), iter(self.gpus_of_node().items())
        for each in self.gpus:
            own = [index for index, gpu in itertools.islice(left, each.count) if is_kept(index, gpu)]
            kept += own
            if own:
                slots.append(replace(each, count=len(own)))
        return replace(self, gpus=tuple(slots), indices=indices_of(kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Links between nodes.

    ``between_zones`` and ``between_nodes`` hold the explicit pairs (both orders of a pair are looked up). A pair of
    zones that is not listed uses ``zone_default``, or ``default`` if that is None.
    """

    default: Link
    zone_default: Link | None = None
    between_zones: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    between_nodes: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    def zone_link(self, a: str, b: str) -> Link:
        """Return the link between two zones, or inside one if ``a == b``."""
        explicit = self.between_zones.get((a, b)) or self.between_zones.get((b, a))
        if explicit is not None:
            return explicit
        return self.default if a == b or self.zone_default is None else self.zone_default

    def node_link(self, a: str, b: str) -> Link | None:
        """Return the explicit link between two named nodes, or None if the cluster gives none."""
        return self.between_nodes.get((a, b)) or self.between_nodes.get((b, a))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A fleet: node groups, the GPU types they use, and the network."""

    name: str
    node_groups: tuple[NodeGroup, ...]
    gpu_types: Mapping[str, GpuType]  # by name; includes every type used
    network: Network

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for group in self.node_groups:
            if group.name in seen:
                raise InvalidProblemError(f"node group {group.name} appears twice")
            seen.add(group.name)
            for slots in group.gpus:
                if slots.gpu not in self.gpu_types:
                    raise InvalidProblemError(f"node {group.name}: unknown GPU type {slots.gpu}")

    def nodes(self) -> Iterator[tuple[str, NodeGroup]]:
        """Yield the name of every node with its group."""
        for group in self.node_groups:
            yield from ((group.node_name(index), group) for index in range(group.count))

    def num_nodes(self) -> int:
        return sum(group.count for group in self.node_groups)

    def types_used(self) -> tuple[str, ...]:
        """Return the GPU types of its nodes in order of appearance."""
        return tuple(dict.fromkeys(slots.gpu for group in self.node_groups for slots in group.gpus))

    def num_gpus(self) -> int:
        return sum(group.count * slots.count for group in self.node_groups for slots in group.gpus)

    def node_named(self, name: str) -> str:
        """Return the node to which ``name`` refers, or ``name`` itself if there is none.

        A group with an explicit count has a node ``name-0`` even if it is the only one; ``name`` also refers to that.
        """
        for group in self.node_groups:
            if group.name == name and group.numbered and group.count == 1:
                return name if any(name == node for node, _ in self.nodes()) else group.node_name(0)
        return name

    def device_named(self, name: str) -> str:
        """Return the device to which ``node/index`` refers; see `node_named`."""
        node, slash, index = name.partition("/")
        return f"{self.node_named(node)}{slash}{index}" if slash else name

    def zones(self) -> tuple[str, ...]:
        """Return zone names in order of appearance."""
        return tuple(dict.fromkeys(group.zone for group in self.node_groups))

    def price_of(self, slots: GpuSlots) -> float | None:
        """Return USD per hour for one GPU of these slots, or None if unknown."""
        return slots.usd_per_hour if slots.usd_per_hour is not None else self.gpu_types[slots.gpu].usd_per_hour

    def without_price(self) -> dict[str, str]:
        """Return every GPU type of which some have no known price, with the first node (group) that has them."""
        found = dict[str, str]()
        for group in self.node_groups:
            for slots in group.gpus:
                if self.price_of(slots) is None:
                    found.setdefault(slots.gpu, group.name)
        return found

    def devices(self) -> Iterator[Device]:
        """Yield every GPU with its name, in time linear in the fleet; only binding and checking need this."""
        for group in self.node_groups:
            for node in range(group.count):
                yield from group.devices(node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU; ``index`` is the driver's on its node, unique over all its GPUs."""

    node: str
    index: int
    gpu: str
    group: NodeGroup

    @property
    def name(self) -> str:
        return f"{self.node}/{self.index}"


def node_of(device: str) -> str:
    """Return the node of a device's name (`Device.name`)."""
    return device.rpartition("/")[0]
