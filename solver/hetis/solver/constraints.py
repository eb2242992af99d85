"""Constraints on a plan besides its objective: which GPUs are used and how, TP sizes, replicas, rent.

A constraint is one ``--pin`` or ``--forbid`` of the command line and written like it (`str`). Some come from an engine
that cannot use certain GPUs (``by``), which `described` says. A plan keeps all constraints of its problem:
`hetis.solver.placement.constrained_problem` applies them to the search, and `hetis.solver.check.constraint_rules`
checks them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from hetis.solver.cluster import Cluster
from hetis.solver.plan import Role


class Duty(StrEnum):
    """A use of a GPU in a plan: part of a stage or attention worker, and the role of its replica."""

    PRIMARY = "primary"
    WORKER = "worker"
    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def others(self) -> frozenset[Duty]:
        """Return the duties that are excluded if GPUs have only this one."""
        return frozenset((PARTS if self in PARTS else ROLES) - {self})


PARTS = frozenset({Duty.PRIMARY, Duty.WORKER})
ROLES = frozenset({Duty.UNIFIED, Duty.PREFILL, Duty.DECODE})
DUTY_OF_ROLE = {Role.UNIFIED: Duty.UNIFIED, Role.PREFILL: Duty.PREFILL, Role.DECODE: Duty.DECODE}


class Unit(StrEnum):
    """The kind of name by which GPUs are selected."""

    GPU = "gpu"  # a single one, as `node/index`
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
        """Return whether a GPU is in the selection."""
        return self.name == {Unit.GPU: device, Unit.NODE: node, Unit.TYPE: gpu, Unit.ZONE: zone}[self.unit]


class Selected:
    """The GPUs that any of some selections takes, found by name however many these are."""

    def __init__(self, selections: Iterable[Selection]) -> None:
        self._names: dict[Unit, set[str]] = {unit: set() for unit in Unit}
        for each in selections:
            self._names[each.unit].add(each.name)

    def takes(self, *, device: str, node: str, gpu: str, zone: str) -> bool:
        """Return whether a GPU is in one of the selections."""
        names = self._names
        return (
            gpu in names[Unit.TYPE] or zone in names[Unit.ZONE] or node in names[Unit.NODE] or device in names[Unit.GPU]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclude:
    """Constraint that these GPUs are not used."""

    gpus: Selection
    by: str = field(default="", compare=False)  # the engine that does not run on them; empty: it was requested

    def __str__(self) -> str:
        return f"--forbid {self.gpus}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestrictRole:
    """Constraint that these GPUs have only ``duty`` (``only``), or any but ``duty``, among duties of its kind."""

    gpus: Selection
    duty: Duty
    only: bool
    by: str = field(default="", compare=False)  # the engine that does not give them the duty; empty: it was requested

    @property
    def barred(self) -> frozenset[Duty]:
        """Return the duties that the GPUs may not have."""
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
    """Constraint that no stage has this TP size."""

    tp: int

    def __str__(self) -> str:
        return f"--forbid tp={self.tp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutWorkers:
    """Constraint that no stage has attention workers."""

    by: str = field(default="", compare=False)  # the engine that has none for the model; empty: it was requested

    def __str__(self) -> str:
        return "--forbid workers"


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutSharedExperts:
    """Constraint that no copies share their experts."""

    def __str__(self) -> str:
        return "--forbid shared-experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Constraint that the plan has ``least`` to ``most`` replicas over all roles; None: no limit."""

    least: int
    most: int | None

    def allows(self, count: int) -> bool:
        return count >= self.least and (self.most is None or count <= self.most)

    def __str__(self) -> str:
        if self.least == self.most:
            return f"--pin replicas={self.least}"
        return f"--pin replicas={self.least or ''}..{'' if self.most is None else self.most}"


class Sum(StrEnum):
    """A quantity summed over a whole plan."""

    USD = "usd"  # rent per hour
    GPUS = "gpus"


@dataclass(frozen=True, slots=True, kw_only=True)
class AtMost:
    """Constraint that the plan takes no more than ``most`` of a sum."""

    of: Sum
    most: float

    def __str__(self) -> str:
        return f"--pin {self.of}=..{self.most:.12g}"


Constraint = Exclude | RestrictRole | Use | WithoutTp | WithoutWorkers | WithoutSharedExperts | Replicas | AtMost
Constraints = tuple[Constraint, ...]


def described(constraint: Constraint) -> str:
    """Return a constraint for people: the option that was given, or what the engine cannot do."""
    by = getattr(constraint, "by", "")
    return in_words(constraint, by) if by else str(constraint)


def in_words(constraint: Constraint, engine: str) -> str:
    """Return what an engine cannot do, if it is the engine that needs the constraint; else the constraint's option."""
    match constraint:
        case Exclude(gpus=gpus):
            return f"{engine} not running on {gpus.name}"
        case RestrictRole(gpus=gpus, duty=Duty.PRIMARY, only=False):
            return f"{engine} computing no layers on {gpus.name}"
        case WithoutWorkers():
            return f"{engine} having no attention workers for this model"
    return str(constraint)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConstraints:
    """The constraints on some GPUs.

    Attributes:
        barred: duties they may not have.
        counts_for: the indices of the minima in `ConstraintIndex.least` to which they count.
    """

    barred: frozenset[Duty] = frozenset()
    counts_for: frozenset[int] = frozenset()


UNCONSTRAINED = GpuConstraints()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintIndex:
    """The constraints of a problem that its cluster and family do not express.

    Attributes:
        on: constraints by node group and GPU type; those not listed have none.
        least: the fewest GPUs in use, for every `Use`.
        replicas: the fewest and the most replicas of the plan.
        most: limits on sums over the plan.
    """

    on: Mapping[tuple[str, str], GpuConstraints]
    least: tuple[int, ...] = ()
    replicas: tuple[int, float] = (0, float("inf"))
    most: tuple[AtMost, ...] = ()

    def of(self, group: str, gpu: str) -> GpuConstraints:
        return self.on.get((group, gpu), UNCONSTRAINED)

    @property
    def has_rows(self) -> bool:
        """Return whether they limit sums over a plan, not only the properties of its replicas."""
        return bool(self.least) or bool(self.most) or self.replicas != (0, float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """An error in a constraint on a cluster; ``known`` are names that it could have meant."""

    constraint: Constraint
    message: str
    name: str = ""
    known: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.constraint}: {self.message}"


def misfits(constraints: Constraints, cluster: Cluster, tp_sizes: tuple[int, ...]) -> Iterator[Misfit]:
    """Yield an error for every constraint that names something the cluster does not have."""
    if not constraints:
        return
    known = _names(cluster) if any(isinstance(each, Exclude | RestrictRole | Use) for each in constraints) else {}
    for constraint in constraints:
        match constraint:
            case Exclude(gpus=gpus) | RestrictRole(gpus=gpus) | Use(gpus=gpus):
                names = known[gpus.unit]
                if gpus.name not in names:
                    kind = "GPU" if gpus.unit is Unit.GPU else gpus.unit
                    message = f"{cluster.name} has no {kind} {gpus.name}"
                    if other := _of_another_unit(gpus.name, known):
                        yield Misfit(constraint=constraint, message=f"{message}, did you mean {other}?")
                    else:
                        yield Misfit(constraint=constraint, message=message, name=gpus.name, known=tuple(names))
                elif isinstance(constraint, Use) and constraint.least > names[gpus.name]:
                    yield Misfit(constraint=constraint, message=f"{cluster.name} has {names[gpus.name]} of these GPUs")
                elif isinstance(constraint, RestrictRole | Use) and gpus.unit is Unit.GPU:
                    yield Misfit(
                        constraint=constraint, message="a single GPU can only be forbidden: name its node or its type"
                    )
            case WithoutTp(tp=tp) if tp not in tp_sizes:
                yield Misfit(constraint=constraint, message=f"TP sizes are {', '.join(map(str, tp_sizes))}")
            case AtMost(of=Sum.USD) if unpriced := cluster.without_price():
                yield Misfit(constraint=constraint, message=f"no price is known of {', '.join(unpriced)}")
            case Replicas(least=least, most=most) if most is not None and most < max(1, least):
                yield Misfit(constraint=constraint, message="the maximum is below the minimum, or below 1")


def _of_another_unit(name: str, known: Mapping[Unit, Iterable[str]]) -> Selection | None:
    """Return what a name that one unit lacks selects by another unit, in whatever case, if anything."""
    found = ((unit, own) for unit, names in known.items() for own in names if own.casefold() == name.casefold())
    return next((Selection(unit=unit, name=own) for unit, own in found), None)


def _names(cluster: Cluster) -> dict[Unit, Counter[str]]:
    """Return every name of a unit with the number of its GPUs."""
    found = {unit: Counter[str]() for unit in Unit}
    for group in cluster.node_groups:
        gpus = group.gpus_of_node()
        found[Unit.ZONE][group.zone] += group.count * len(gpus)
        for gpu in gpus.values():
            found[Unit.TYPE][gpu] += group.count
        for node in map(group.node_name, range(group.count)):
            found[Unit.NODE][node] += len(gpus)
            found[Unit.GPU].update(f"{node}/{index}" for index in gpus)
    return found
