"""What people want of a plan beside its objective: which GPUs are used and what for, TP sizes, replicas, rent.

A *wish* is one ``--pin`` or ``--forbid`` of the command line and written like it (`str`). A plan keeps all wishes of
its problem: `hetis.solver.placement.grounding` makes them part of the search, `hetis.solver.check.will` checks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from hetis.solver.cluster import Cluster
from hetis.solver.plan import Role


class Duty(StrEnum):
    """What a GPU may do in a plan: be part of a stage or an attention worker, in a replica of a role."""

    PRIMARY = "primary"
    WORKER = "worker"
    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def others(self) -> frozenset[Duty]:
        """What is left out if GPUs have this duty alone."""
        return frozenset((PARTS if self in PARTS else ROLES) - {self})


PARTS = frozenset({Duty.PRIMARY, Duty.WORKER})
ROLES = frozenset({Duty.UNIFIED, Duty.PREFILL, Duty.DECODE})
DUTY_OF_ROLE = {Role.UNIFIED: Duty.UNIFIED, Role.PREFILL: Duty.PREFILL, Role.DECODE: Duty.DECODE}


class Unit(StrEnum):
    """What a selection of GPUs names."""

    GPU = "gpu"  # one, as `node/index`
    NODE = "node"
    TYPE = "type"
    ZONE = "zone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """GPUs by name: ``type=L4``, ``node=a100-0``, ``gpu=a100-0/2``, ``zone=west``."""

    unit: Unit
    name: str

    def __str__(self) -> str:
        return f"{self.unit}={self.name}"

    def takes(self, *, device: str, node: str, gpu: str, zone: str) -> bool:
        """Return whether a GPU is one of them."""
        return self.name == {Unit.GPU: device, Unit.NODE: node, Unit.TYPE: gpu, Unit.ZONE: zone}[self.unit]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOut:
    """These GPUs are not used."""

    gpus: Selection

    def __str__(self) -> str:
        return f"--forbid {self.gpus}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """These GPUs have, of the duties of its kind, ``duty`` alone (``only``), or any but that."""

    gpus: Selection
    duty: Duty
    only: bool

    @property
    def barred(self) -> frozenset[Duty]:
        """Duties that the GPUs do not have."""
        return self.duty.others if self.only else frozenset({self.duty})

    def __str__(self) -> str:
        return f"--{'pin' if self.only else 'forbid'} {self.gpus}:as={self.duty}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Constraint that at least ``least`` of these GPUs are in use."""

    gpus: Selection
    least: int

    def __str__(self) -> str:
        return f"--pin {self.gpus}:use={self.least}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutTp:
    """No stage has this TP size."""

    tp: int

    def __str__(self) -> str:
        return f"--forbid tp={self.tp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutWorkers:
    """No stage has attention workers."""

    def __str__(self) -> str:
        return "--forbid workers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """The plan has between ``least`` and ``most`` replicas, of all roles together; None: no limit."""

    least: int
    most: int | None

    def allows(self, count: int) -> bool:
        return count >= self.least and (self.most is None or count <= self.most)

    def __str__(self) -> str:
        if self.least == self.most:
            return f"--pin replicas={self.least}"
        return f"--pin replicas={self.least or ''}..{'' if self.most is None else self.most}"


class Sum(StrEnum):
    """What a plan takes, all together."""

    USD = "usd"  # rent, per hour
    GPUS = "gpus"


@dataclass(frozen=True, slots=True, kw_only=True)
class AtMost:
    """The plan takes no more than that."""

    of: Sum
    most: float

    def __str__(self) -> str:
        return f"--pin {self.of}=..{self.most:.12g}"


Wish = LeaveOut | Keep | Use | WithoutTp | WithoutWorkers | Replicas | AtMost
Will = tuple[Wish, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What is wished of some GPUs: duties they do not have, and the numbers of `Marks.least` that they count for."""

    barred: frozenset[Duty] = frozenset()
    counts_for: frozenset[int] = frozenset()


NO_MARK = Mark()


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The wishes of a problem that its cluster and family do not express.

    Attributes:
        on: by node group and GPU type; those not listed have none.
        least: GPUs that are in use at least, for every `Use`.
        replicas: of the plan, at least and at most.
        most: what the plan takes at most.
    """

    on: Mapping[tuple[str, str], Mark]
    least: tuple[int, ...] = ()
    replicas: tuple[int, float] = (0, float("inf"))
    most: tuple[AtMost, ...] = ()

    def of(self, group: str, gpu: str) -> Mark:
        return self.on.get((group, gpu), NO_MARK)

    @property
    def has_rows(self) -> bool:
        """Whether they limit the sums of a plan, not only what its replicas may be."""
        return bool(self.least) or bool(self.most) or self.replicas != (0, float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """What is wrong with a wish on a cluster; ``known``: names that it could have meant."""

    wish: Wish
    message: str
    name: str = ""
    known: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.wish}: {self.message}"


def misfits(will: Will, cluster: Cluster, tp_sizes: tuple[int, ...]) -> Iterator[Misfit]:
    """Wishes that speak of what a cluster does not have; all of them."""
    if not will:
        return
    known = _names(cluster) if any(isinstance(wish, LeaveOut | Keep | Use) for wish in will) else {}
    for wish in will:
        match wish:
            case LeaveOut(gpus=gpus) | Keep(gpus=gpus) | Use(gpus=gpus):
                names = known[gpus.unit]
                if gpus.name not in names:
                    message = f"{cluster.name} has no {gpus.unit} {gpus.name}"
                    yield Misfit(wish=wish, message=message, name=gpus.name, known=tuple(names))
                elif isinstance(wish, Use) and wish.least > names[gpus.name]:
                    yield Misfit(wish=wish, message=f"{cluster.name} has {names[gpus.name]} of these GPUs")
                elif isinstance(wish, Keep | Use) and gpus.unit is Unit.GPU:
                    yield Misfit(wish=wish, message="a single GPU can only be left out: name its node or its type")
            case WithoutTp(tp=tp) if tp not in tp_sizes:
                yield Misfit(wish=wish, message=f"TP sizes are {', '.join(map(str, tp_sizes))}")
            case AtMost(of=Sum.USD) if unpriced := _without_price(cluster):
                yield Misfit(wish=wish, message=f"GPU type {unpriced[0]} has no price")
            case Replicas(least=least, most=most) if most is not None and most < max(1, least):
                yield Misfit(wish=wish, message="the most is below the least, or below 1")


def _without_price(cluster: Cluster) -> list[str]:
    slots = (slots for group in cluster.node_groups for slots in group.gpus)
    return [each.gpu for each in slots if cluster.price_of(each) is None]


def _names(cluster: Cluster) -> dict[Unit, dict[str, int]]:
    """Every name of a unit, with the number of its GPUs."""
    found: dict[Unit, dict[str, int]] = {unit: {} for unit in Unit}
    for device in cluster.devices():
        for unit, name in (
            (Unit.GPU, device.name), (Unit.NODE, device.node), (Unit.TYPE, device.gpu), (Unit.ZONE, device.group.zone)
        ):  # fmt: skip
            found[unit][name] = found[unit].get(name, 0) + 1
    return found
