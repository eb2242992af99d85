"""The processes of a replica of a plan, where each runs, and how much it may hold: the list that all launchers use.

An engine, vLLM or SGLang, is one process if all stages are on one node, and then starts a process for each rank
itself. Otherwise it is one process per stage, each a node of the engine's own multi-node launch. A GPU that holds KV
has one worker process for every vLLM rank that it serves, because a worker accepts one connection. GPUs at the same
position in their stages form one *worker* to vLLM's scheduler, with an address for every rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from hetis.engines.attention import common_backend, image_tokens
from hetis.engines.errors import LayoutError
from hetis.engines.gpus import GpuKind, common_dtype, kind_of, kinds_in
from hetis.engines.kv_room import DTYPE_BYTES, PAGE_TOKENS, Card, KvRoom, is_fp8
from hetis.engines.memory import memory_of
from hetis.engines.planned import (
    KvPartner,
    index_of,
    kv_partners,
    limits_blocks,
    most_seats_of,
    node_groups,
    planned_document,
    prompts_of,
    pushes_kv,
    unknown_gpus,
    utilisation_of,
)
from hetis.engines.precision import DEPRECATED
from hetis.engines.refusals import impossible, no_backend, no_room, other_model, uneven, unlike_vendors
from hetis.engines.versions import Engine
from hetis.engines.workers import worker_name
from hetis.solver.cluster import node_of
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role, StagePlan

_MLA_BLOCK_TOKENS = 128  # with latent attention and states, vLLM's blocks are multiples of it


class ProcessKind(StrEnum):
    """The kind of a process: the engine with scheduler and front end, a further stage of the engine, or a worker."""

    SERVER = "server"
    SERVER_STAGE = "server-stage"
    ATTENTION_WORKER = "attention-worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    name: str  # unique in the replica
    kind: ProcessKind
    stage: int  # the stage that it computes or holds KV for; 0 if the engine is one process
    node: str
    gpus: tuple[int, ...]  # indices of its GPUs on the node, in the driver's numbering and the order of the ranks
    kv_bytes: int  # planned memory for KV on each GPU
    sharing: int = 1  # number of the replica's processes on these GPUs
    vendor: str = "NVIDIA"  # vendor of its GPUs
    resource: str = ""  # by which a pod requests its GPUs; empty: that of the vendor's device plugin


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker as vLLM's scheduler sees it. ``processes`` names its process for each rank of vLLM, rank 0 first."""

    name: str
    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    engine: Engine
    role: Role
    tensor_parallel: int  # ranks of each stage, per data-parallel copy
    layers: tuple[int, ...]  # number of the model's layers in each stage
    servers: tuple[Process, ...]  # processes of the engine, the one with the scheduler first
    attention_workers: tuple[Process, ...]  # worker processes, which hold KV
    workers: tuple[Worker, ...]  # the same processes, as the scheduler sees them
    micro_batch: int  # requests that decode in one iteration; 0 for a prefill replica
    seats: int  # maximum number of concurrent requests per data-parallel copy
    chunk_tokens: int  # prompt tokens per iteration and data-parallel copy; 0 for a decode replica
    kv_tokens: int  # KV capacity in tokens per data-parallel copy
    kv_is_fp8: bool = False  # KV has one byte per number; otherwise as many as the model's own numbers
    has_states: bool = False  # some layers keep a state for each request instead of KV
    has_windows_in_some: bool = False  # some layers have a sliding window and others do not, so that their KV differs
    draft_tokens: int = 0  # tokens that multi-token prediction drafts per request and iteration
    # The longest request that fits into the KV capacity. None: the model's full context fits.
    context_tokens: int | None = None
    dtype: str = "auto"  # dtype of model and KV if its GPUs would choose differently; ``auto`` leaves it to the engine
    # The backend of all replicas that exchange KV with this one, if their GPUs would choose differently. Empty: the
    # engine's choice.
    attention_backend: str = ""
    # Copies that share their experts, each with its own requests; 1 without expert parallelism.
    data_parallel: int = 1
    image_tokens: int = 0  # prompt tokens that vLLM does not divide among iterations; 0: it divides all
    # Tokens of vLLM's blocks, of which it only computes whole ones, where layers keep states; 0: none does.
    block_tokens: int = 0
    is_deprecated: bool = False  # vLLM loads weights of this method only if it is allowed to
    # vLLM's prefill replicas write KV to decode replicas, which otherwise read it.
    pushes_kv: bool = False
    # KV is as planned, not what the engine finds: its stages differ, or others hold or limit its blocks.
    fixes_kv: bool = True
    utilisation: float | None = None  # share of the memory that the engine takes; None: as the plan does not say

    @property
    def processes(self) -> tuple[Process, ...]:
        return (*self.servers, *self.attention_workers)

    @property
    def rank_kv_bytes(self) -> int:
        """The planned KV memory of the rank that has the most."""
        return max(process.kv_bytes for process in self.servers)

    @property
    def vendor(self) -> str:
        """The vendor of the GPUs that compute the layers."""
        return self.servers[0].vendor

    @property
    def meets(self) -> bool:
        """Whether its ranks connect through an address: processes on several nodes, or copies that share experts."""
        return len(self.servers) > 1 or self.data_parallel > 1

    def caller(self, worker: Process) -> Process:
        """Return the vLLM process that connects to a worker process."""
        return self.servers[worker.stage] if len(self.servers) > 1 else self.servers[0]


def layout_of(
    plan: Plan, number: int, model: ModelSpec, *, engine: Engine = Engine.VLLM_HETIS, dtype: str = "auto",
    kv_tokens: int | None = None, partners: Sequence[KvPartner] | None = None,
) -> Layout:  # fmt: skip
    """Return the layout of one replica.

    Args:
        plan, number: the plan, and the index of the replica in it.
        model: the model to serve.
        engine: the engine that serves it.
        dtype: dtype of KV, a key of `DTYPE_BYTES`.
        kv_tokens: KV capacity in tokens of each data-parallel copy, to override the plan's on a smaller machine.
        partners: the replica's entry of `kv_partners`, for callers that lay out many replicas. None: it is computed.

    Raises:
        LayoutError: there is no such replica, the plan is for another model, or the engine cannot run it; carries all
            reasons.
    """
    if not 0 <= number < len(plan.replicas):
        raise LayoutError(f"there is no replica {number}, the plan has {len(plan.replicas)}, counted from 0")
    planned, cluster, replica = (
        planned_document(plan, "model"),
        planned_document(plan, "cluster"),
        plan.replicas[number],
    )
    if unknown := list(unknown_gpus(replica, cluster)):
        raise LayoutError(*unknown)
    layout = layout_of_replica(
        replica,
        model,
        planned=planned if isinstance(planned, Mapping) else None,
        engine=engine,
        dtype=dtype,
        kv_tokens=kv_tokens,
        partners=kv_partners(plan)[number] if partners is None else partners,
        own_types=kinds_in(cluster),
        most_seats=most_seats_of(plan),
        limits_blocks=limits_blocks(replica, plan),
        utilisation=utilisation_of(replica, plan, engine),
    )
    return _with_resources(layout, cluster)


def _with_resources(layout: Layout, cluster: Any) -> Layout:
    """Return the layout with the resources by which the fleet's nodes offer their GPUs to pods, if it states any."""
    used, named = {process.node for process in layout.processes}, dict[str, str]()
    for names, node in node_groups(cluster):
        if isinstance(resource := node.get("resource"), str):
            named |= dict.fromkeys(used.intersection(names), resource)
    if not named:
        return layout

    def with_resources(processes: Iterable[Process]) -> tuple[Process, ...]:
        return tuple(replace(process, resource=named.get(process.node, "")) for process in processes)

    return replace(
        layout, servers=with_resources(layout.servers), attention_workers=with_resources(layout.attention_workers)
    )


def layout_of_replica(
    replica: ReplicaPlan, model: ModelSpec, *, planned: Mapping[str, Any] | None, engine: Engine = Engine.VLLM_HETIS,
    dtype: str = "auto", kv_tokens: int | None = None, partners: Sequence[KvPartner] = (),
    own_types: Mapping[str, GpuKind] | None = None, most_seats: int | None = None, limits_blocks: bool = False,
    utilisation: float | None = None,
) -> Layout:  # fmt: skip
    """Return the layout of a replica that is not, or no longer, in a plan; other arguments are those of `layout_of`.

    Args:
        planned: document of the model that the replica was planned for. None: unknown.
        partners: kinds of replicas with which it exchanges KV, in one dtype and with one attention backend.
        own_types: GPU types that are not in the catalogue; types found in neither count as NVIDIA's.
        most_seats: most requests that an engine may run at once. None: no limit besides memory.
        limits_blocks: the plan limits an engine's KV blocks, beside its memory.
        utilisation: share of the memory that an engine takes. None: its default, which SGLang computes itself.

    Raises:
        LayoutError: the replica is for another model, or the engine cannot run it; carries all reasons.
    """
    if not replica.stages:
        raise LayoutError("it has no stages")
    copies, differs = replica.attention_dp, len({(stage.gpu, stage.num_layers) for stage in replica.stages}) > 1
    if utilisation is None and engine is not Engine.SGLANG:
        utilisation = memory_of(engine).utilisation
    fixes_kv = bool(kv_tokens or limits_blocks or replica.attention_workers or differs or utilisation is None)
    kv_tokens = kv_tokens or replica.kv_tokens // copies
    model = model.on(replica.stages[0].gpu)
    room = KvRoom.of(kv_tokens, replica, model, dtype)
    cards = [tuple(room.cards(replica, i)) for i in range(len(replica.stages))]
    parts: list[StagePlan | AttentionWorkerPool] = [*replica.stages, *replica.attention_workers]
    own, vendors = own_types or {}, dict[str, str]()
    for part in parts:
        vendors |= dict.fromkeys(part.devices, kind_of(part.gpu, own).vendor)
    names = dict.fromkeys([stage.gpu for stage in replica.stages] + [gpu for one in partners for gpu in one.gpus])
    gpus = {name: kind_of(name, own) for name in names}
    backend = common_backend(model, gpus.values(), engine.value) if partners else ""
    wrong = [
        *unlike_vendors(replica, gpus, set(vendors.values())),
        *no_backend(model, gpus, backend, engine),
        *other_model(planned, replica, model),
        *impossible(replica, partners, model, engine, dtype),
        *uneven(cards),
        *no_room(replica, room),
    ]
    if wrong:
        raise LayoutError(*wrong)
    tp = replica.stages[0].tp
    holding = tuple(_worker_processes(cards, tp, vendors))
    ranks = len(cards) * tp
    return Layout(
        engine=engine,
        role=replica.role,
        tensor_parallel=tp,
        layers=tuple(stage.num_layers for stage in replica.stages),
        servers=tuple(_servers(replica, room, engine.program.lower(), vendors)),
        attention_workers=holding,
        workers=tuple(
            Worker(
                name=worker_name([of_stage[place].device for of_stage in cards], place),
                processes=tuple(process.name for process in holding[place * ranks : (place + 1) * ranks]),
            )
            for place in range(len(cards[0]))
        ),
        micro_batch=-(-replica.seats // replica.in_flight) if replica.micro_batch else 0,
        seats=max(replica.seats // copies, _prompts(replica, model, room, most_seats)),
        chunk_tokens=replica.chunk_tokens,
        kv_tokens=kv_tokens,
        kv_is_fp8=is_fp8(model, dtype),
        draft_tokens=model.step_tokens - 1,
        has_states=Kernel.RECURRENT in model.kernels,
        has_windows_in_some=0.0 < model.sliding_share < 1.0,
        context_tokens=_longest(room.context_tokens, model, fixes_kv=fixes_kv),
        dtype=common_dtype(gpus.values()),
        attention_backend=backend or "",
        data_parallel=copies,
        image_tokens=image_tokens(model),
        block_tokens=_block_tokens(model, tp, 1 if is_fp8(model, dtype) else DTYPE_BYTES[dtype]),
        is_deprecated=model.weights in DEPRECATED,
        pushes_kv=engine is not Engine.SGLANG and pushes_kv(replica, partners),
        fixes_kv=fixes_kv,
        utilisation=utilisation,
    )


def _longest(tokens: int, model: ModelSpec, *, fixes_kv: bool) -> int | None:
    """Return the longest request to allow; None: the model's. An engine that finds its own KV may find a tenth less."""
    if not fixes_kv:
        tokens = max(int(0.9 * tokens) // PAGE_TOKENS, 1) * PAGE_TOKENS
    return tokens if tokens < model.max_position else None


def _prompts(replica: ReplicaPlan, model: ModelSpec, room: KvRoom, most: int | None) -> int:
    """Return how many prompts a prefill replica, or each copy that shares experts, runs at once; 0 for other roles.

    Plans count full chunks, of several prompts if these are shorter. An engine that may run fewer leaves chunks empty.
    Where layers keep states, vLLM does not start without a block for each prompt, which holds those of a few layers.
    """
    if replica.role is not Role.PREFILL:
        return 0
    prompts = prompts_of(replica)
    if Kernel.RECURRENT in model.kernels:
        for stage in replica.stages:
            of_prompt = stage.num_layers * model.kept_states * model.state_bytes() / stage.tp
            prompts = min(prompts, int(room.of_ranks(stage) / of_prompt))
    return prompts if most is None else min(prompts, most)


def _block_tokens(model: ModelSpec, tp: int, number_bytes: int) -> int:
    """Return the tokens of vLLM's blocks if layers keep states: a block is as large as a state. 0: none does.

    See `_align_hybrid_block_size` in vllm/platforms/interface.py. Drafts lengthen a state by less than a page of KV
    each. ``number_bytes``: bytes of a number of KV.
    """
    if Kernel.RECURRENT not in model.kernels:
        return 0
    is_latent = model.kernel is Kernel.LATENT
    heads = 1 if is_latent else max(1, model.kv_heads / tp)
    token_bytes = model.kv_bytes_per_token_group() / model.kv_share / model.kv_bytes * number_bytes * heads
    step = _MLA_BLOCK_TOKENS if is_latent else PAGE_TOKENS
    blocks = math.ceil(model.recurrent_state_bytes / tp / (step * token_bytes) * (1 - 1e-12))
    return step * (blocks + model.step_tokens - 1)


def _servers(replica: ReplicaPlan, room: KvRoom, name: str, vendors: Mapping[str, str]) -> Iterator[Process]:
    nodes = {node_of(device) for stage in replica.stages for device in stage.devices}
    parts = [replica.stages] if len(nodes) == 1 else [(stage,) for stage in replica.stages]
    for number, stages in enumerate(parts):
        devices = [device for stage in stages for device in stage.devices]
        yield Process(
            name=f"{name}-{number}" if number else name,
            kind=ProcessKind.SERVER_STAGE if number else ProcessKind.SERVER,
            stage=number,
            node=node_of(devices[0]),
            gpus=tuple(map(index_of, devices)),
            kv_bytes=max(map(room.of_ranks, stages)),
            vendor=vendors[replica.stages[0].devices[0]],
        )


def _worker_processes(cards: Sequence[Sequence[Card]], tp: int, vendors: Mapping[str, str]) -> Iterator[Process]:
    """Yield the first worker's processes in the order of vLLM's ranks, then the second's, and so on."""
    on_card = Counter(card.device for of_stage in cards for card in of_stage for _ in range(tp))
    for place in range(len(cards[0])):
        for stage, of_stage in enumerate(cards):
            card = of_stage[place]
            sharing = on_card[card.device]
            for rank in range(tp):
                yield Process(
                    name=card.device if sharing == 1 else f"{card.device}.rank{stage * tp + rank}",
                    kind=ProcessKind.ATTENTION_WORKER,
                    stage=stage,
                    node=node_of(card.device),
                    gpus=(index_of(card.device),),
                    kv_bytes=card.kv_bytes,
                    sharing=sharing,
                    vendor=vendors[card.device],
                )
