"""Equal replicas as one object of Kubernetes, whose pods run on any node with GPUs of their type.

A pod is tied to the node of the plan only where the plan needs it: if it is one of several of a replica, exchanges KV,
has attention workers, or shares a node with pods of another size, which could take the GPUs that it needs together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hetis.planner.export.pairs import cluster_of
from hetis.planner.export.replicas import Launchable, LaunchableReplica
from hetis.planner.use_cases.record.parts import Requested
from hetis.solver.plan import Role

PRODUCTS: Mapping[str, str] = {
    "A10": "NVIDIA-A10", "A100-PCIe-40GB": "NVIDIA-A100-PCIE-40GB", "A100-PCIe-80GB": "NVIDIA-A100-80GB-PCIe",
    "A100-SXM-40GB": "NVIDIA-A100-SXM4-40GB", "A100-SXM-80GB": "NVIDIA-A100-SXM4-80GB", "A10G": "NVIDIA-A10G",
    "A40": "NVIDIA-A40", "B200-SXM-180GB": "NVIDIA-B200", "H100-PCIe-80GB": "NVIDIA-H100-PCIe",
    "H100-SXM-80GB": "NVIDIA-H100-80GB-HBM3", "H200-SXM-141GB": "NVIDIA-H200", "L4": "NVIDIA-L4", "L40": "NVIDIA-L40",
    "L40S": "NVIDIA-L40S", "RTX-3090": "NVIDIA-GeForce-RTX-3090", "RTX-4090": "NVIDIA-GeForce-RTX-4090",
    "RTX-5090": "NVIDIA-GeForce-RTX-5090", "T4": "Tesla-T4", "V100-PCIe-32GB": "Tesla-V100-PCIE-32GB",
    "V100-SXM2-16GB": "Tesla-V100-SXM2-16GB", "V100-SXM2-32GB": "Tesla-V100-SXM2-32GB",
}  # fmt: skip
"""Values of the label ``nvidia.com/gpu.product``, which NVIDIA's GPU feature discovery sets, by GPU type."""


def with_equals_merged(launchable: Launchable) -> Launchable:
    """Return the plan with equal replicas as copies of the first, on any node of their type where it will do."""
    sizes, free = _sizes_on(launchable), _free_types(launchable)
    groups = defaultdict[object, list[LaunchableReplica]](list)
    for number, one in launchable.replicas.items():
        groups[_kind(one) if _is_movable(one, sizes) else number].append(one)
    found = dict[int, LaunchableReplica]()
    for members in groups.values():
        first, *equals = members
        movable, gpu = _is_movable(first, sizes), first.plan.stages[0].gpu
        found[first.number] = replace(
            first,
            plan=replace(first.plan, rate=first.plan.rate * len(members)),
            equals=tuple(equals),
            product=PRODUCTS.get(gpu, "") if movable and gpu in free else "",
        )
    return replace(launchable, replicas=found)


def _is_movable(one: LaunchableReplica, sizes: Mapping[str, set[int]]) -> bool:
    """Return whether a replica is one pod that may be on any node on which equal ones are."""
    if one.plan.role is not Role.UNIFIED or len(one.layout.servers) > 1 or one.layout.attention_workers:
        return False
    [server] = one.layout.servers
    return sizes[server.node] == {len(server.gpus)} and len({stage.gpu for stage in one.plan.stages}) == 1


def _sizes_on(launchable: Launchable) -> dict[str, set[int]]:
    """Return the numbers of GPUs of the plan's pods on each node."""
    sizes = defaultdict[str, set[int]](set)
    for one in launchable.replicas.values():
        for process in one.layout.processes:
            sizes[process.node].add(len(process.gpus))
    return sizes


def _kind(one: LaunchableReplica) -> object:
    """Return what equal replicas have in common, apart from their nodes and GPUs."""
    [server] = one.layout.servers
    anywhere = replace(one.layout, servers=(replace(server, node="", gpus=tuple(range(len(server.gpus)))),))
    return anywhere, one.serving, one.plan.stages[0].gpu, one.plan.rate, one.plan.ttft_s


def _free_types(launchable: Launchable) -> set[str]:
    """Return the GPU types of which pods may be on any node: all of these have one size, of the same type, for us."""
    cluster, plan = cluster_of(launchable.plan), launchable.plan
    if cluster is None or plan.held_by_others() or Requested.of(plan).constraints:
        return set()
    sizes, sizes_of, fixed = _sizes_on(launchable), defaultdict[str, set[int]](set), set[str]()
    for node, group in cluster.nodes():
        types = {slots.gpu for slots in group.gpus if slots.count}
        for gpu in types:
            sizes_of[gpu] |= sizes.get(node, set())
        if len(types) > 1 or any(node in _named(one) for one in launchable.replicas.values()):
            fixed |= types
    return {gpu for gpu, found in sizes_of.items() if len(found) == 1} - fixed


def _named(one: LaunchableReplica) -> Iterator[str]:
    """Yield the nodes that offer GPUs to pods under a name of their own."""
    yield from (process.node for process in one.layout.processes if process.resource)
