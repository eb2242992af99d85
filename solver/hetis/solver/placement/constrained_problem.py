"""Constraints applied before the search: GPUs removed from the fleet, sizes from the family, an index of the rest.

Removed GPUs are treated as absent, so bounds hold for the fleet without them. A node that a constraint names, or that
has an explicit link to another, becomes a group of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace

from hetis.solver.cluster import Cluster, NodeGroup
from hetis.solver.constraints import (
    UNCONSTRAINED,
    AtMost,
    ConstraintIndex,
    Constraints,
    Exclude,
    GpuConstraints,
    Replicas,
    RestrictRole,
    Selected,
    Unit,
    Use,
    WithoutSharedExperts,
    WithoutTp,
    WithoutWorkers,
    misfits,
)
from hetis.solver.engine_rules import Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.node_links import node_links_of
from hetis.solver.placement.fleet import class_of_slots, class_prices, device_classes
from hetis.solver.plan import ClassPrice, Plan
from hetis.solver.problem import PlacementProblem, without_selected


def apply_constraints(problem: PlacementProblem) -> PlacementProblem:
    """Return the problem as the search sees it: constraints are in its cluster, family and index, links in classes.

    Raises:
        InvalidProblemError: a constraint names something that the cluster does not have.
    """
    network = problem.cluster.network
    links = node_links_of(problem.cluster, problem.nodes_left_out()) if network.between_nodes else None
    if not problem.constraints and links is None:
        return problem
    found = list(misfits(problem.constraints, problem.cluster, problem.family.tp_sizes))
    if found:
        raise InvalidProblemError("; ".join(map(str, found)))
    linked = links.block_of if links is not None else {}
    pieces = (piece for group in problem.cluster.node_groups for piece in _pieces(group, problem.constraints, linked))
    groups = tuple(group for group in pieces if group.gpus)
    index = ConstraintIndex(
        on=dict(_gpu_constraints(groups, problem.constraints)),
        least=tuple(each.least for each in problem.constraints if isinstance(each, Use)),
        replicas=_replicas(problem.constraints),
        most=tuple(each for each in problem.constraints if isinstance(each, AtMost)),
    )
    cluster = replace(problem.cluster, node_groups=groups)
    family = _family(problem.family, problem.constraints)
    return replace(problem, cluster=cluster, family=family, constraints=(), constraint_index=index, node_links=links)


def is_nothing_left(searched: PlacementProblem) -> bool:
    """Return whether constraints left no GPU, or no way to use one."""
    return not searched.cluster.node_groups or not searched.family.tp_sizes


def _pieces(group: NodeGroup, constraints: Constraints, linked: Collection[str]) -> Iterator[NodeGroup]:
    """Yield a group without excluded GPUs and with named and ``linked`` nodes separated."""
    out = Selected(each.gpus for each in constraints if isinstance(each, Exclude))
    of_some = [each.gpus for each in constraints if isinstance(each, Exclude | RestrictRole | Use)]
    named, names_nodes = {gpus.name for gpus in of_some}, any(gpus.unit in (Unit.NODE, Unit.GPU) for gpus in of_some)
    nodes = [group.node_name(i) for i in range(group.count)] if names_nodes or linked else []
    named |= {name.partition("/")[0] for name in named}
    apart = [i for i, node in enumerate(nodes) if node in named or node in linked]
    if not apart:
        yield without_selected(out, group, group.node_name(0))
        return
    if apart[0] > 0:
        yield without_selected(out, replace(group, count=apart[0]), group.node_name(0))
    for i in range(apart[0], group.count):
        yield without_selected(out, group.node(i), nodes[i])


def _gpu_constraints(
    groups: tuple[NodeGroup, ...], constraints: Constraints
) -> Iterator[tuple[tuple[str, str], GpuConstraints]]:
    restricted = [each for each in constraints if isinstance(each, RestrictRole)]
    uses = [each for each in constraints if isinstance(each, Use)]
    for group in groups:
        node = group.node_name(0)
        for gpu in dict.fromkeys(slots.gpu for slots in group.gpus):
            where = {"device": "", "node": node, "gpu": gpu, "zone": group.zone}
            barred = (each.barred for each in restricted if each.gpus.takes(**where))
            counts = (i for i, each in enumerate(uses) if each.gpus.takes(**where))
            found = GpuConstraints(barred=frozenset().union(*barred), counts_for=frozenset(counts))
            if found != UNCONSTRAINED:
                yield (group.name, gpu), found


def _replicas(constraints: Constraints) -> tuple[int, float]:
    limits = [each for each in constraints if isinstance(each, Replicas)]
    most = [each.most for each in limits if each.most is not None]
    return max((each.least for each in limits), default=0), min(most, default=float("inf"))


def _family(family: Family, constraints: Constraints) -> Family:
    out = {each.tp for each in constraints if isinstance(each, WithoutTp)}
    without_workers = any(isinstance(each, WithoutWorkers) for each in constraints)
    return replace(
        family,
        tp_sizes=tuple(tp for tp in family.tp_sizes if tp not in out),
        max_pool=0 if without_workers else family.max_pool,
        attention_dp=() if any(isinstance(each, WithoutSharedExperts) for each in constraints) else family.attention_dp,
    )


def restored(plan: Plan, searched: PlacementProblem, problem: PlacementProblem) -> Plan:
    """Return a plan with a class table of the whole fleet, and the family of the problem with its constraints."""
    return replace(plan, family=problem.describe_family(), prices=_prices(plan, searched, problem.cluster))


def _prices(plan: Plan, searched: PlacementProblem, cluster: Cluster) -> tuple[ClassPrice, ...]:
    """Return the classes of the whole fleet, each at the highest price of any searched part, or 0 if none was."""
    classes = device_classes(cluster)
    class_at = class_of_slots(classes)
    class_of = {device.name: class_at[device.group.name, device.gpu] for device in cluster.devices()}
    node_of = {device.node: device.group for device in cluster.devices()}
    duals = [0.0] * len(classes)
    parts = device_classes(searched.cluster, searched.constraint_index, searched.node_links)
    for part, price in zip(parts, plan.prices, strict=True):
        for group in part.groups:
            whole = class_at[node_of[group.node_name(0)].name, part.gpu]
            duals[whole] = max(duals[whole], price.dual)
    used = Counter(class_of[name] for replica in plan.replicas for name in replica.devices())
    workers = Counter(class_of[name] for replica in plan.replicas for name in replica.worker_devices())
    return class_prices(classes, used, workers, duals)
