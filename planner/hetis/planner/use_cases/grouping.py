"""Groups of equal replicas, of GPUs by work or type, and of names: thousands of replicas have only a few shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hetis.simulator.metrics import DeviceUse
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Plan, ReplicaPlan, Role, StagePlan

_NUMBERED = re.compile(r"^(?P<stem>.*-)(?P<number>\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaGroup:
    """Replicas that differ only in the names of their devices; the ``first`` of them represents all.

    ``numbers`` are their positions in the plan, from 0; ``rate`` is their total saturated rate in requests/s.
    """

    first: ReplicaPlan
    numbers: tuple[int, ...]
    rate: float


def group_replicas(replicas: Sequence[ReplicaPlan]) -> tuple[ReplicaGroup, ...]:
    """Group equal replicas, the group with the highest rate first."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, replica in enumerate(replicas):
        groups.setdefault(_shape(replica), []).append(number)
    found = (
        ReplicaGroup(first=replicas[numbers[0]], numbers=tuple(numbers), rate=sum(replicas[n].rate for n in numbers))
        for numbers in groups.values()
    )
    return tuple(sorted(found, key=lambda group: -group.rate))


def shapes_of(plan: Plan) -> Counter[tuple[object, ...]]:
    """Return the shapes of a plan's replicas, whatever their times and how many requests may run at once."""
    return Counter(_layout(replica) for replica in plan.replicas)


def _layout(replica: ReplicaPlan) -> tuple[object, ...]:
    stages = tuple((s.gpu, s.tp, s.copies, s.first_layer, s.num_layers, s.kv_head_groups_kept) for s in replica.stages)
    pools = tuple((p.stage, p.gpu, len(p.devices), p.kv_head_groups, p.shared) for p in replica.attention_workers)
    sizes = (replica.micro_batch, replica.in_flight, replica.chunk_tokens, replica.kv_tokens)
    return stages, pools, sizes, replica.role, replica.kv_zones, replica.expert_parallel, replica.classes


def _shape(replica: ReplicaPlan) -> tuple[object, ...]:
    # Four digits, since replicas of one template on different nodes may differ in the last digits.
    times = tuple(f"{value:.4g}" for value in (replica.rate, replica.ttft_s, replica.tpot_s))
    return _layout(replica), times, replica.max_num_seqs


def gpu_counts(cluster: Cluster) -> Counter[str]:
    """Return the number of GPUs of every type in a fleet."""
    counts = Counter[str]()
    for group in cluster.node_groups:
        for slots in group.gpus:
            counts[slots.gpu] += group.count * slots.count
    return counts


def used_counts(plan: Plan | None) -> Counter[str]:
    """Return the number of used GPUs of every type known to a plan; empty without a plan."""
    counts = Counter[str]()
    for price in () if plan is None else plan.prices:
        counts[price.gpu] += price.used
    return counts


def device_groups(plan: Plan) -> dict[str, str]:
    """Return the name of each device's group: its GPU type, and its role unless it serves whole requests."""
    groups: dict[str, str] = {}
    for replica in plan.replicas:
        role = "" if replica.role is Role.UNIFIED else f", {replica.role}"
        for part in replica.parts():
            duty = role if isinstance(part, StagePlan) else ", attention worker"
            groups |= dict.fromkeys(part.devices, f"{part.gpu}{duty}")
    return groups


def grouped_use(plan: Plan, uses: Sequence[DeviceUse]) -> list[DeviceUse]:
    """Return one use per group, with its name and number of GPUs: means of the means, and the highest maximum."""
    groups = device_groups(plan)
    members: dict[str, list[DeviceUse]] = {}
    for use in uses:
        members.setdefault(groups.get(use.device, use.device), []).append(use)
    return [
        DeviceUse(
            device=f"{len(group)} × {name}",
            kv_mean=sum(use.kv_mean for use in group) / len(group),
            kv_max=max(use.kv_max for use in group),
            busy_mean=sum(use.busy_mean for use in group) / len(group),
        )
        for name, group in members.items()
    ]


def abbreviate(devices: Sequence[str]) -> str:
    """Return the devices as a compact host list, which does not keep their order."""
    nodes: dict[str, list[int]] = {}
    for device in devices:
        node, _, index = device.rpartition("/")
        nodes.setdefault(node, []).append(int(index))
    same_indices: dict[tuple[str, str], list[int]] = {}
    for node, indices in nodes.items():
        match = _NUMBERED.match(node)
        numbers = same_indices.setdefault((match["stem"] if match else node, number_ranges(indices)), [])
        if match:
            numbers.append(int(match["number"]))
    return " ".join(
        f"{stem}{number_ranges(numbers) if numbers else ''}/{indices}"
        for (stem, indices), numbers in same_indices.items()
    )


def number_ranges(numbers: Iterable[int]) -> str:
    """Return the numbers as ``3`` or ``[0-2,5]``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if text.isdigit() else f"[{text}]"
