"""Constraints applied before the search: GPUs removed from the fleet, sizes from the family, marks on other GPUs.

Removed GPUs are treated as absent, so bounds hold for the fleet without them. A node that a constraint names becomes a
group of its own. If a node loses GPUs, the others are renumbered, which `Grounded.names` undoes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hetis.solver.cluster import Cluster, NodeGroup
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.classes import class_of_slots, class_prices, device_classes
from hetis.solver.plan import ClassPrice, Plan, ReplicaPlan
from hetis.solver.problem import Family, PlacementProblem
from hetis.solver.will import (
    NO_MARK,
    AtMost,
    Keep,
    LeaveOut,
    Mark,
    Marks,
    Replicas,
    Selection,
    Unit,
    Use,
    Will,
    WithoutSharedExperts,
    WithoutTp,
    WithoutWorkers,
    misfits,
)


@dataclass(frozen=True, slots=True)
class Grounded:
    """A problem with constraints moved into cluster, family and marks, and the true names of renumbered devices."""

    problem: PlacementProblem
    names: Mapping[str, str]

    @property
    def is_empty(self) -> bool:
        """Return whether no GPU, or no way to use one, is left."""
        return not self.problem.cluster.node_groups or not self.problem.family.tp_sizes


def grounded(problem: PlacementProblem) -> Grounded:
    """Return the problem that the search sees.

    Raises:
        InvalidProblemError: a constraint names something that the cluster does not have.
    """
    if not problem.will:
        return Grounded(problem, {})
    found = list(misfits(problem.will, problem.cluster, problem.family.tp_sizes))
    if found:
        raise InvalidProblemError("; ".join(map(str, found)))
    pieces = [piece for group in problem.cluster.node_groups for piece in _pieces(group, problem.will)]
    groups = tuple(group for group, _ in pieces if group.gpus)
    marks = Marks(
        on=dict(_marks(groups, problem.will)),
        least=tuple(wish.least for wish in problem.will if isinstance(wish, Use)),
        replicas=_replicas(problem.will),
        most=tuple(wish for wish in problem.will if isinstance(wish, AtMost)),
    )
    cluster = replace(problem.cluster, node_groups=groups)
    family = _family(problem.family, problem.will)
    names = {name: true for _, renamed in pieces for name, true in renamed.items()}
    return Grounded(replace(problem, cluster=cluster, family=family, will=(), marks=marks), names)


def _pieces(group: NodeGroup, will: Will) -> Iterator[tuple[NodeGroup, Mapping[str, str]]]:
    """Yield a group without excluded GPUs and with named nodes separated, together with changed device names."""
    named = {wish.gpus.name for wish in will if isinstance(wish, LeaveOut | Keep | Use)}
    nodes = [group.node_name(i) for i in range(group.count)] if _names_nodes(will) else []
    apart = [i for i, node in enumerate(nodes) if node in named or any(n.startswith(f"{node}/") for n in named)]
    if not apart:
        yield _without(group, group.node_name(0), will)
        return
    if apart[0] > 0:
        yield _without(replace(group, count=apart[0]), group.node_name(0), will)
    for i in range(apart[0], group.count):
        yield _without(group.node(i), nodes[i], will)


def _names_nodes(will: Will) -> bool:
    return any(
        isinstance(wish, LeaveOut | Keep | Use) and wish.gpus.unit in (Unit.NODE, Unit.GPU) for wish in will
    )  # fmt: skip


def _without(group: NodeGroup, node: str, will: Will) -> tuple[NodeGroup, Mapping[str, str]]:
    """Return a group of nodes like ``node`` without the excluded GPUs, and its changed device names."""
    out = [wish.gpus for wish in will if isinstance(wish, LeaveOut)]
    slots, kept = group.slots_left(
        lambda index, gpu: not any(_takes(gpus, f"{node}/{index}", node, gpu, group) for gpus in out)
    )
    names = {f"{node}/{now}": f"{node}/{index}" for now, index in enumerate(kept) if now != index}
    if group.count > 1 and names:  # all nodes of the group lost the same GPUs
        for i in range(1, group.count):
            other = group.node_name(i)
            names |= {name.replace(node, other, 1): true.replace(node, other, 1) for name, true in _of(names, node)}
    return replace(group, gpus=slots), names


def _of(names: Mapping[str, str], node: str) -> list[tuple[str, str]]:
    return [(name, true) for name, true in names.items() if name.startswith(f"{node}/")]


def _takes(gpus: Selection, device: str, node: str, gpu: str, group: NodeGroup) -> bool:
    return gpus.takes(device=device, node=node, gpu=gpu, zone=group.zone)


def _marks(groups: tuple[NodeGroup, ...], will: Will) -> Iterator[tuple[tuple[str, str], Mark]]:
    uses = [wish for wish in will if isinstance(wish, Use)]
    for group in groups:
        node = group.node_name(0)
        for gpu in dict.fromkeys(slots.gpu for slots in group.gpus):
            barred = [
                wish.barred for wish in will if isinstance(wish, Keep) and _takes(wish.gpus, "", node, gpu, group)
            ]  # fmt: skip
            counts = (i for i, wish in enumerate(uses) if _takes(wish.gpus, "", node, gpu, group))
            mark = Mark(barred=frozenset().union(*barred), counts_for=frozenset(counts))
            if mark != NO_MARK:
                yield (group.name, gpu), mark


def _replicas(will: Will) -> tuple[int, float]:
    wishes = [wish for wish in will if isinstance(wish, Replicas)]
    most = [wish.most for wish in wishes if wish.most is not None]
    return max((wish.least for wish in wishes), default=0), min(most, default=float("inf"))


def _family(family: Family, will: Will) -> Family:
    out = {wish.tp for wish in will if isinstance(wish, WithoutTp)}
    without_workers = any(isinstance(wish, WithoutWorkers) for wish in will)
    return replace(
        family,
        tp_sizes=tuple(tp for tp in family.tp_sizes if tp not in out),
        max_pool=0 if without_workers else family.max_pool,
        attention_dp=() if any(isinstance(wish, WithoutSharedExperts) for wish in will) else family.attention_dp,
    )


def restored(plan: Plan, found: Grounded, problem: PlacementProblem) -> Plan:
    """Return a plan with true device names and a class table of the whole fleet."""
    replicas = tuple(_renamed(replica, found.names) for replica in plan.replicas) if found.names else plan.replicas
    plan = replace(plan, family=problem.describe_family(), replicas=replicas)
    return replace(plan, prices=_prices(plan, found.problem, problem.cluster))


def _renamed(replica: ReplicaPlan, names: Mapping[str, str]) -> ReplicaPlan:
    def true(devices: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(device, device) for device in devices)

    return replace(
        replica,
        stages=tuple(replace(stage, devices=true(stage.devices)) for stage in replica.stages),
        attention_workers=tuple(replace(pool, devices=true(pool.devices)) for pool in replica.attention_workers),
    )


def _prices(plan: Plan, searched: PlacementProblem, cluster: Cluster) -> tuple[ClassPrice, ...]:
    """Return the classes of the whole fleet at the highest price of any searched part, or 0 if none was searched."""
    classes = device_classes(cluster)
    class_at = class_of_slots(classes)
    class_of = {device.name: class_at[device.group.name, device.gpu] for device in cluster.devices()}
    node_of = {device.node: device.group for device in cluster.devices()}
    duals = [0.0] * len(classes)
    parts = device_classes(searched.cluster, searched.marks)
    for part, price in zip(parts, plan.prices, strict=True):
        for group in part.groups:
            whole = class_at[node_of[group.node_name(0)].name, part.gpu]
            duals[whole] = max(duals[whole], price.dual)
    used = Counter(class_of[name] for replica in plan.replicas for name in replica.devices())
    workers = Counter(class_of[name] for replica in plan.replicas for name in replica.worker_devices())
    return class_prices(classes, used, workers, duals)
