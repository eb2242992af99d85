"""What layouts take from a plan besides the replica: its model, nodes and settings, and which replicas exchange KV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hetis.engines.kv_room import PROMPT_TOKENS
from hetis.engines.memory import memory_of
from hetis.engines.versions import Engine
from hetis.formats.errors import did_you_mean
from hetis.solver.cluster import Cluster, GpuType, NodeGroup, node_of
from hetis.solver.model import ModelSpec
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role, StagePlan

_NODES_SHOWN = 5  # nodes that an error message lists
DEVICE = re.compile(r"(?P<node>.+)/(?P<index>[0-9]{1,4})")


def seats_limit_of(replica: ReplicaPlan, plan: Plan) -> int:
    """Return how many prompts a prefill replica may run at once if the plan's setting allows for less than its chunks
    hold; 0: no such limit, as for other roles, which run what is planned.
    """
    most = most_seats_of(plan)
    if replica.role is not Role.PREFILL or most is None or most >= prompts_of(replica):
        return 0
    return most


def most_seats_of(plan: Plan) -> int | None:
    """Return how many requests each engine may run at once, if the plan was made for such a setting."""
    return _setting(plan, "max_num_seqs")


def _setting(plan: Plan, name: str) -> int | None:
    settings = plan.inputs.get("engine_settings")
    found = settings.get(name) if isinstance(settings, Mapping) else None
    return found if isinstance(found, int) else None


def limits_blocks(replica: ReplicaPlan, plan: Plan) -> bool:
    """Return whether engines may not find more KV blocks than are planned: the plan was made for a maximum, or others
    hold different memory of the stages' GPUs.
    """
    return bool(_setting(plan, "kv_blocks")) or len({held for _, held in _reserved(replica, plan)}) > 1


def utilisation_of(replica: ReplicaPlan, plan: Plan, engine: Engine | None = None) -> float | None:
    """Return the share of the memory that the engine may take; None: its default.

    It is that for which the plan was made, and beside others no more than is free. ``engine``: None: the plan's.
    """
    if engine is None:
        rules = plan.inputs.get("engine")
        engine = Engine(rules["name"] if isinstance(rules, Mapping) else Engine.VLLM_HETIS)
    settings = plan.inputs.get("engine_settings")
    given = settings.get("gpu_memory_utilization") if isinstance(settings, Mapping) else None
    share = float(given) if isinstance(given, float | int) else None
    held = _reserved(replica, plan)
    if not any(reserved for _, reserved in held) or (engine is Engine.SGLANG and share is None):
        return share  # SGLang's default is a share of what it finds free
    memory, ranks = memory_of(engine), sum(len(stage.devices) for stage in replica.stages)
    free = min(memory.share_beside(gpu, ranks, reserved) for gpu, reserved in held)
    return min(memory.utilisation if share is None else share, free)


def _reserved(replica: ReplicaPlan, plan: Plan) -> list[tuple[GpuType, int]]:
    """Return the type of each stage's GPUs, and the most memory that others hold of one; nothing if they hold none."""
    from hetis.formats.documents import from_data

    document, nodes = planned_document(plan, "cluster"), dict[str, NodeGroup]()
    listed = document.get("nodes") if isinstance(document, Mapping) else None
    parts = [node.get("gpus") for node in listed if isinstance(node, Mapping)] if isinstance(listed, list) else []
    slots = (one for some in parts if isinstance(some, list) for one in some)
    if not any(isinstance(one, Mapping) and "reserved" in one for one in slots):
        return []
    cluster = from_data(document, name="inputs.documents.cluster")
    assert isinstance(cluster, Cluster), "its kind is that of a fleet"
    used = {node_of(device) for stage in replica.stages for device in stage.devices}
    for group in cluster.node_groups:
        nodes |= dict.fromkeys((node for node in used if group.index_of(node) is not None), group)
    found = list[tuple[GpuType, int]]()
    for stage in replica.stages:
        groups = [nodes[node] for node in map(node_of, stage.devices) if node in nodes]
        if gpu := cluster.gpu_types.get(stage.gpu):
            found.append((gpu, max((group.reserved_bytes(stage.gpu) for group in groups), default=0)))
    return found


def planned_model(plan: Plan) -> ModelSpec | None:
    """Return the model that a plan was made for, or None if the plan does not include its documents.

    Raises:
        DocumentError: the document cannot be used.
    """
    from hetis.formats.documents import from_data

    planned = planned_document(plan, "model")
    found = None if planned is None else from_data(planned, name="inputs.documents.model")
    return found if isinstance(found, ModelSpec) else None


def planned_document(plan: Plan, name: str) -> Any:
    documents = plan.inputs.get("documents")
    return documents.get(name) if isinstance(documents, Mapping) else None


def unknown_nodes(named: Iterable[str], plan: Plan, further: Iterable[str] = ()) -> Iterator[str]:
    """Yield an error for each name that is a node neither of the plan nor of its fleet, nor one of ``further``."""
    used = {node_of(device) for replica in plan.replicas for device in replica.devices()}
    known = sorted(used.union(further, *(names for names, _ in node_groups(planned_document(plan, "cluster")))))
    for node in named:
        if node not in known:
            some = ", ".join(known[:_NODES_SHOWN]) + (", ..." if len(known) > _NODES_SHOWN else "")
            yield f"{node!r} is not a node of the plan{did_you_mean(node, known) or f', its nodes are {some}'}"


def unknown_gpus(replica: ReplicaPlan, cluster: Any) -> Iterator[str]:
    """Yield an error for each GPU that its node in the plan's fleet lacks, if the fleet states the node's ``indices``.

    Plans of earlier versions number such GPUs from 0, and would be started on others.
    """
    gpus_of = dict[str, dict[int, str]]()
    for names, node in node_groups(cluster):
        indices, parts = node.get("indices"), node.get("gpus")
        if isinstance(indices, list) and isinstance(parts, list):
            slots = ((part.get("type"), part.get("count", 1)) for part in parts if isinstance(part, Mapping))
            types = [str(gpu) for gpu, count in slots for _ in range(count if isinstance(count, int) else 0)]
            gpus = dict(zip(indices, types, strict=False))
            gpus_of |= dict.fromkeys(names, gpus)
    holders: list[StagePlan | AttentionWorkerPool] = [*replica.stages, *replica.attention_workers]
    for device, gpu in ((device, holder.gpu) for holder in holders for device in holder.devices):
        known = gpus_of.get(node_of(device))
        # Devices of no such form are refused with everything else that is wrong (`_impossible_stage`).
        if known is not None and DEVICE.fullmatch(device) and known.get(index_of(device)) != gpu:
            there = ", ".join(f"{index} ({name})" for index, name in known.items())
            yield f"{device} is no {gpu} of the plan's fleet, where {node_of(device)} has {there}: plan again"


def node_groups(cluster: Any) -> Iterator[tuple[Iterable[str], Mapping[str, Any]]]:
    """Yield each group of equal nodes in a fleet document: the names of the nodes, and the fields of the group."""
    nodes = cluster.get("nodes") if isinstance(cluster, Mapping) else None
    for node in nodes if isinstance(nodes, list) else ():
        if isinstance(node, Mapping):
            name, count = node.get("name"), node.get("count")
            yield tuple(f"{name}-{i}" for i in range(count)) if isinstance(count, int) else (str(name),), node


class KvPartner(NamedTuple):
    """The role, GPUs and shape of replicas that take part in an exchange of KV."""

    role: Role
    gpus: tuple[str, ...]  # GPU type of each stage
    tp: int  # ranks per stage


def kv_partners(plan: Plan) -> list[tuple[KvPartner, ...]]:
    """Return, for each replica, the kinds of replicas with which it exchanges KV, directly or indirectly, and its own.

    An entry is empty if the replica exchanges no KV. Without routes in the plan, all prefill and decode replicas
    exchange KV with each other.
    """
    found: list[tuple[KvPartner, ...]] = [()] * len(plan.replicas)
    apart = [number for number, one in enumerate(plan.replicas) if one.role is not Role.UNIFIED]
    for group in plan.joined_by_routes() if plan.kv_routes else [apart]:
        if len(group) > 1:
            replicas = (plan.replicas[number] for number in group if plan.replicas[number].stages)
            kinds = (KvPartner(one.role, tuple(s.gpu for s in one.stages), one.stages[0].tp) for one in replicas)
            partners = tuple(dict.fromkeys(kinds))
            for number in group:
                found[number] = partners
    return found


def prompts_of(replica: ReplicaPlan) -> int:
    """Return how many prompts the chunks in flight of a prefill replica hold, as plans assume."""
    return replica.in_flight // replica.attention_dp * (replica.chunk_tokens // PROMPT_TOKENS)


def pushes_kv(replica: ReplicaPlan, partners: Sequence[KvPartner]) -> bool:
    """Return whether the KV of prompts comes from several stages, which vLLM's decode replicas cannot read.

    `NixlConnector` reads it, and expects all layers from each rank (`_validate_remote_agent_handshake` in
    nixl/base_worker.py). `NixlPushConnector` writes the layers of each stage. Replicas that exchange KV have the same.
    """
    if replica.role is Role.PREFILL and len(replica.stages) > 1:
        return True
    return any(one.role is Role.PREFILL and len(one.gpus) > 1 for one in partners)


def index_of(device: str) -> int:
    return int(device.rpartition("/")[2])
