"""The class table of a plan: a row for every device class, which counts its GPUs and those that the plan uses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from hetis.solver.check.fleet import Fleet, slowest
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.cluster import Link, NodeGroup
from hetis.solver.plan import Plan, Status


class Row(NamedTuple):
    """The contents of a row; device classes that differ only in links or price have equal rows."""

    gpu: str
    zone: str
    gpus_per_node: int
    available: int
    used: int  # by the plan, in any role
    as_attention_workers: int

    def __str__(self) -> str:
        return (
            f"{self.gpu} x{self.gpus_per_node} in {self.zone}, {self.available} available, {self.used} used, "
            f"{self.as_attention_workers} attention workers"
        )


def check_class_table(plan: Plan, fleet: Fleet) -> list[Violation]:
    """Check that the table has one row for every device class, with the cluster's GPUs and those in use."""
    if plan.result.status is Status.INFEASIBLE and not plan.prices:
        return []
    says = Counter(
        Row(row.gpu, row.zone, row.gpus_per_node, row.available, row.used, row.as_attention_workers)
        for row in plan.prices
    )
    has = Counter(_rows(plan, fleet))
    return [
        Violation(rule=Rule.PRICES, where="class table", message=f"{word} row {row}")
        for word, rows in (("has no", has - says), ("has a wrong", says - has))
        for row in rows.elements()
    ]


def _rows(plan: Plan, fleet: Fleet) -> Iterator[Row]:
    """Yield the rows that the table must have."""
    workers = {name for r in plan.replicas for pool in r.attention_workers for name in pool.devices}
    used = workers | {name for r in plan.replicas for stage in r.stages for name in stage.devices}
    classes: defaultdict[EqualDevices, list[str]] = defaultdict(list)
    class_of: dict[tuple[str, str], EqualDevices] = {}
    explicit = _worst_node_links(fleet)
    for name, device in fleet.devices.items():
        kind = (device.group.name, device.gpu)
        if kind not in class_of:
            class_of[kind] = _class_of(device.group, device.gpu, fleet, explicit)
        classes[class_of[kind]].append(name)
    for device_class, names in classes.items():
        yield Row(
            device_class.gpu,
            device_class.zone,
            device_class.gpus_per_node,
            len(names),
            len(used.intersection(names)),
            len(workers.intersection(names)),
        )


class EqualDevices(NamedTuple):
    """GPUs that no number of a plan distinguishes."""

    gpu: str
    zone: str
    gpus_per_node: int
    nic: Link
    intra_link: Link
    usd_per_hour: float | None
    node_link: Link | None  # the worst explicit link of its nodes


def _class_of(group: NodeGroup, gpu: str, fleet: Fleet, explicit: dict[str, Link]) -> EqualDevices:
    slots = [slots for slots in group.gpus if slots.gpu == gpu]
    count, prices = sum(s.count for s in slots), [fleet.cluster.price_of(s) for s in slots]
    known = [price * s.count for price, s in zip(prices, slots, strict=True) if price is not None]
    nodes = [group.node_name(i) for i in range(group.count)] if explicit else []
    links = [explicit[node] for node in nodes if node in explicit]
    return EqualDevices(
        gpu=gpu,
        zone=group.zone,
        gpus_per_node=count,
        nic=group.nic or fleet.cluster.network.default,
        intra_link=group.intra_link or fleet.board_link(gpu),
        usd_per_hour=None if None in prices else round(sum(known) / count, 9),
        node_link=slowest(links) if links else None,
    )


def _worst_node_links(fleet: Fleet) -> dict[str, Link]:
    """Return the worst explicit link of every node that has one."""
    worst: dict[str, Link] = {}
    for pair, link in fleet.cluster.network.between_nodes.items():
        for node in pair:
            worst[node] = slowest([worst.get(node, link), link])
    return worst
