"""A map of the fleet: zones, nodes, and the use of every GPU. In large fleets, equal nodes are drawn only once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hetis.planner.report.blocks import COLORS, PLAIN, FleetMap, GpuCell, NodeCard, ZoneMap
from hetis.planner.report.explanation import idle_name
from hetis.planner.report.figures import plural
from hetis.planner.report.replica import replica_name
from hetis.planner.use_cases.grouping import ReplicaGroup, abbreviate, group_replicas
from hetis.solver.cluster import Cluster, NodeGroup
from hetis.solver.placement.explanation.facts import Explanation
from hetis.solver.plan import Plan, ReplicaPlan, Role

MAX_NODES = 60  # cards per zone; further ones are only counted
ROW = 4  # GPUs per row of a node's card
MAX_SINGLE = 48  # GPUs of a fleet in which each has its own cell; in larger fleets, equal neighbours share one
MAX_NAMED = COLORS  # replicas with a colour of their own; if there are more, equal ones share a colour


IDLE = GpuCell(role="idle", color=PLAIN, lines=("idle",))


def fleet_map(plan: Plan, cluster: Cluster, explanation: Explanation) -> FleetMap:
    """Return the map of a plan on its cluster, with the reasons why GPUs are idle."""
    groups = group_replicas(plan.replicas)
    named, joined = len(plan.replicas) <= MAX_NAMED, cluster.num_gpus() > MAX_SINGLE
    duties = {**_held(plan), **dict(_duties(plan, groups, named=named))}
    zones = [
        _zone(zone, [group for group in cluster.node_groups if group.zone == zone], duties, joined=joined)
        for zone in cluster.zones()
    ]
    several = len(zones) > 1
    return FleetMap(
        title="The fleet",
        zones=tuple(zones),
        legend=tuple(_legend(plan, groups, named=named)),
        idle=tuple((idle_name(idle, several=several), idle.reason) for idle in explanation.idle),
    )


def _held(plan: Plan) -> dict[str, GpuCell]:
    """Return the cells of the GPUs that other tenants hold."""
    cells = {name: GpuCell(role="idle", color=PLAIN, lines=(f"of {name}",)) for name in plan.other_tenants()}
    return {device: cells[name] for name, own in plan.other_tenants().items() for device in own}


def _duties(plan: Plan, groups: tuple[ReplicaGroup, ...], *, named: bool) -> Iterator[tuple[str, GpuCell]]:
    for color, group in enumerate(groups):
        for number in group.numbers:
            replica = plan.replicas[number]
            name = f"R{number if named else group.numbers[0]}"
            yield from replica_duties(replica, name, (number if named else color) % COLORS)


def replica_duties(replica: ReplicaPlan, name: str, color: int) -> Iterator[tuple[str, GpuCell]]:
    """Yield the cell of every GPU of a replica, which is called ``name``."""
    role = "" if replica.role is Role.UNIFIED else f"{replica.role}, "
    for number, stage in enumerate(replica.stages):
        pools = [pool for pool in replica.attention_workers if pool.stage == number]
        every = stage.kv_head_groups_kept + sum(pool.kv_head_groups for pool in pools)
        heads = f", {stage.kv_head_groups_kept} of {every} heads" if pools else ""
        layers = f"{role}layers {stage.first_layer}–{stage.first_layer + stage.num_layers - 1}"
        lines = (f"{name} stage {number + 1}", layers, f"{replica.parallel_sizes(stage)}{heads}")
        yield from dict.fromkeys(stage.devices, GpuCell(role="stage", color=color, lines=lines)).items()
        for pool in pools:
            stages = "all stages" if pool.shared else f"stage {number + 1}"
            together = f", {len(pool.devices)} cards" if len(pool.devices) > 1 else ""
            lines = (f"{name} {stages}", f"attention{together}", f"{pool.kv_head_groups} of {every} heads")
            yield from dict.fromkeys(pool.devices, GpuCell(role="worker", color=color, lines=lines)).items()


def _legend(plan: Plan, groups: tuple[ReplicaGroup, ...], *, named: bool) -> Iterator[tuple[str, int]]:
    if named:
        yield from ((replica_name(i, replica.role), i % COLORS) for i, replica in enumerate(plan.replicas))
        return
    for color, group in enumerate(groups[:COLORS]):
        role = "" if group.first.role is Role.UNIFIED else f" ({group.first.role})"
        equal = f"{len(group.numbers):,} equal replicas" if len(group.numbers) > 1 else "1 replica"
        yield f"R{group.numbers[0]}: {equal}{role}", color


def _zone(name: str, groups: list[NodeGroup], duties: Mapping[str, GpuCell], *, joined: bool) -> ZoneMap:
    cards = [card for group in groups for card in _cards(group, duties, joined=joined)]
    rest = len(cards) - MAX_NODES
    more = f"and {plural(rest, 'more kind')} of nodes" if rest > 0 else ""
    return ZoneMap(name=name, nodes=tuple(cards[:MAX_NODES]), rest=more)


def _cards(group: NodeGroup, duties: Mapping[str, GpuCell], *, joined: bool) -> Iterator[NodeCard]:
    """Yield one card for all nodes of the group whose GPUs have the same uses, or one per node unless ``joined``.

    Cards are in the order of their first nodes.
    """
    gpus = dict(sorted(group.gpus_of_node().items()))
    alike: dict[tuple[int, tuple[GpuCell, ...]], list[str]] = {}
    for number in range(group.count):
        node = group.node_name(number)
        pattern = tuple(duties.get(f"{node}/{index}", IDLE) for index in gpus)
        alike.setdefault((0 if joined else number, pattern), []).append(node)
    held = ", ".join(f"{slots.count} × {slots.gpu}" for slots in group.gpus)
    for (_, pattern), nodes in alike.items():
        name = nodes[0] if len(nodes) == 1 else f"{_nodes(nodes)} ({plural(len(nodes), 'equal node')})"
        cells = _cells(pattern, gpus, mixed=len(group.gpus) > 1, joined=joined)
        yield NodeCard(name=name, gpus=held, cells=tuple(cells))


def _nodes(nodes: list[str]) -> str:
    short = abbreviate([f"{node}/0" for node in nodes]).replace("/0", "")
    return short if len(short) <= 40 else f"{nodes[0]} … {nodes[-1]}"


def _cells(pattern: tuple[GpuCell, ...], gpus: Mapping[int, str], *, mixed: bool, joined: bool) -> Iterator[GpuCell]:
    """Yield a cell for every GPU or, if ``joined``, one for neighbours in a row with the same use.

    ``gpus`` are types by index, in the order of ``pattern``.
    """
    # Neighbours have indices that follow each other, so these minus their positions are the same.
    alike = (
        (i // ROW if joined else i, duty, gpu, index - i)
        for i, (duty, (index, gpu)) in enumerate(zip(pattern, gpus.items(), strict=True))
    )
    first = 0
    for (_, duty, gpu, offset), neighbours in itertools.groupby(alike):
        end = first + len(list(neighbours))
        index = str(first + offset) if end == first + 1 else f"{first + offset}–{end - 1 + offset}"
        lines = (gpu, *duty.lines) if mixed else duty.lines
        yield replace(duty, index=index, lines=lines, span=end - first)
        first = end
