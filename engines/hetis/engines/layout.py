"""The processes of a replica of a plan, where each runs, and how much it may hold: the list that all launchers use.

An engine, vLLM or SGLang, is one process if all stages are on one node, and then starts a process for each rank
itself. Otherwise it is one process per stage, each a node of the engine's own multi-node launch. A GPU that holds KV
has one worker process for every vLLM rank that it serves, because a worker accepts one connection. GPUs at the same
position in their stages form one *worker* to vLLM's scheduler, with an address for every rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from hetis.engines.attention import common_backend, image_tokens
from hetis.engines.errors import LayoutError
from hetis.engines.gpus import VENDORS, GpuKind, common_dtype, kind_of, kinds_in
from hetis.engines.memory import memory_of
from hetis.engines.precision import DEPRECATED, why_not_loaded
from hetis.engines.versions import Engine
from hetis.engines.workers import why_no_workers
from hetis.formats.errors import did_you_mean
from hetis.solver.cluster import node_of
from hetis.solver.model import Kernel, ModelSpec
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role, StagePlan
from hetis.solver.problem import shares_indexers

PAGE_TOKENS = 16  # the plugin's default
_MLA_BLOCK_TOKENS = 128  # with latent attention and states, vLLM's blocks are multiples of it
PROMPT_TOKENS = 64  # prompts of this length fill the chunks of a prefill replica, as plans assume; shorter ones do not
DTYPE_BYTES: Mapping[str, int] = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
LONGEST_NAME = 63  # longest name of a worker
_NODES_SHOWN = 5  # nodes that an error message lists
_DEVICE = re.compile(r"(?P<node>.+)/(?P<index>[0-9]{1,4})")


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


class _Card(NamedTuple):
    """A GPU that holds KV for the ranks of a stage; ``kv_bytes`` is the memory for each of them."""

    device: str
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class _Room:
    """The memory for KV and states.

    It has ``pages`` for every head group, each of ``page_bytes`` per layer, and ``state_bytes`` per layer for the
    states of all requests, which ranks hold in parts or, unless ``divides_states``, whole. The last of the
    ``num_layers`` layers is followed by ``draft_layers`` more. At least ``fitting_pages`` are in every stage, whichever
    of its layers have an indexer, and beside ``taken_bytes``.
    """

    pages: int
    fitting_pages: int
    page_bytes: int
    state_bytes: float
    divides_states: bool
    num_layers: int
    draft_layers: int
    taken_bytes: int = 0  # memory of a rank that plans do not count (`_beside_shared_experts`)

    @classmethod
    def of(cls, kv_tokens: int, replica: ReplicaPlan, model: ModelSpec, dtype: str) -> _Room:
        numbers = model.kv_bytes_per_token_group() / model.kv_bytes
        each = 1 if _is_fp8(model, dtype) else DTYPE_BYTES[dtype]
        # Decoding requests, and one prompt for each micro-batch.
        decoding = max(replica.micro_batch * replica.in_flight, replica.max_num_seqs)
        requests = (decoding + replica.in_flight) // replica.attention_dp
        pages = -(-kv_tokens // PAGE_TOKENS)
        # A mean of layers may be no whole number of bytes; up, but not by a rounding error.
        page_bytes = math.ceil(PAGE_TOKENS * numbers * (1 - 1e-12)) * each
        taken_bytes, left = _beside_shared_experts(replica, model), pages
        if taken_bytes:
            layers = model.num_layers + model.draft_layers  # copies that share experts have one stage (`_unshared`)
            left -= -(-taken_bytes // (max(replica.stages[0].kv_head_groups_kept, 1) * layers * page_bytes))
        return cls(
            pages=pages,
            fitting_pages=_fitting_pages(max(left, 0), replica, model),
            page_bytes=page_bytes,
            state_bytes=requests * model.kept_states * model.state_bytes()
            + replica.in_flight // replica.attention_dp * replica.chunk_tokens * model.chunk_state_bytes(),
            divides_states=model.divides_states,
            num_layers=model.num_layers,
            draft_layers=model.draft_layers,
            taken_bytes=taken_bytes,
        )

    @property
    def context_tokens(self) -> int:
        """The longest request in tokens. Engines keep one page for themselves."""
        return max(self.fitting_pages - 1, 1) * PAGE_TOKENS

    def of_ranks(self, stage: StagePlan) -> int:
        is_last = stage.first_layer + stage.num_layers == self.num_layers
        layers = stage.num_layers + (self.draft_layers if is_last else 0)
        kv_bytes = stage.kv_head_groups_kept * self.pages * layers * self.page_bytes
        ranks = stage.tp if self.divides_states else 1
        return max(0, kv_bytes + round(layers * self.state_bytes / ranks) - self.taken_bytes)

    def cards(self, replica: ReplicaPlan, number: int) -> Iterator[_Card]:
        """Yield the GPUs that hold KV for a stage; the heads that a rank does not keep are divided evenly among them.

        On a GPU shared by several stages, each stage gets what its own heads need: the planned capacity fits all of
        them.
        """
        for pool in replica.attention_workers:
            if pool.stage == number:
                pages = -(-pool.kv_head_groups * self.pages // len(pool.devices))
                kv_bytes = pages * replica.stages[number].num_layers * self.page_bytes
                yield from (_Card(device, kv_bytes) for device in pool.devices)


def _fitting_pages(pages: int, replica: ReplicaPlan, model: ModelSpec) -> int:
    """Return how many of the pages fit in each stage if it has as many layers with an indexer as it can.

    Plans count the mean of all layers. vLLM's drafting layer always has an indexer (models/deepseek_v32/attention.py).
    """
    indexer, layers = model.indexer, model.indexer_layers
    if indexer is None or layers == model.num_layers:
        return pages
    mean, share = model.kv_bytes_per_token_group(), layers / model.num_layers
    most = 0.0
    for number, stage in enumerate(replica.stages, 1):
        drafting = model.draft_layers if number == len(replica.stages) else 0
        own = (min(stage.num_layers, layers) + drafting) / (stage.num_layers + drafting)
        most = max(most, mean + (own - share) * indexer.key_bytes)
    return int(pages * (mean / most))


_MOE_TOKENS = 16_384  # most tokens per call of vLLM's fused experts


def _beside_shared_experts(replica: ReplicaPlan, model: ModelSpec) -> int:
    """Return the bytes of a rank that plans do not count for copies that share experts; less KV then fits.

    With several ranks per copy, vLLM keeps all shared experts on each rank (``use_sequence_parallel_moe``), and its
    fused experts need a workspace for the tokens of all copies times the number of experts that each token activates.
    """
    experts = model.experts
    if not replica.expert_parallel or experts is None:
        return 0
    layers, (stage, *_) = (model.num_layers - model.prefix_layers) * model.expert_share, replica.stages
    whole = layers * experts.shared_params(model.hidden) * model.weight_bytes
    tokens = replica.attention_dp * (replica.micro_batch * model.step_tokens + replica.chunk_tokens)
    wide = experts.active * (experts.size(model.hidden) + experts.width) * model.activation_bytes
    return round(whole * (1 - 1 / stage.tp) + min(tokens, _MOE_TOKENS) * wide)


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
    planned, cluster, replica = _planned(plan, "model"), _planned(plan, "cluster"), plan.replicas[number]
    if unknown := list(_unknown_gpus(replica, cluster)):
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
        most_seats=_most_seats(plan),
        limits_blocks=limits_blocks(plan),
        utilisation=utilisation_of(plan),
    )
    return _with_resources(layout, cluster)


def seats_limit_of(replica: ReplicaPlan, plan: Plan) -> int:
    """Return how many prompts a prefill replica may run at once if the plan's setting allows for less than its chunks
    hold; 0: no such limit, as for other roles, which run what is planned.
    """
    most = _most_seats(plan)
    if replica.role is not Role.PREFILL or most is None or most >= _prompts_of(replica):
        return 0
    return most


def _most_seats(plan: Plan) -> int | None:
    """Return how many requests each engine may run at once, if the plan was made for such a setting."""
    return _setting(plan, "max_num_seqs")


def _setting(plan: Plan, name: str) -> int | None:
    settings = plan.inputs.get("engine_settings")
    found = settings.get(name) if isinstance(settings, Mapping) else None
    return found if isinstance(found, int) else None


def limits_blocks(plan: Plan) -> bool:
    """Return whether the plan was made for a maximum of KV blocks, of which its engines may not find more."""
    return bool(_setting(plan, "kv_blocks"))


def utilisation_of(plan: Plan) -> float | None:
    """Return the share of the memory for which the plan was made; None: the engine's default."""
    settings = plan.inputs.get("engine_settings")
    share = settings.get("gpu_memory_utilization") if isinstance(settings, Mapping) else None
    return float(share) if isinstance(share, float | int) else None


def _with_resources(layout: Layout, cluster: Any) -> Layout:
    """Return the layout with the resources by which the fleet's nodes offer their GPUs to pods, if it states any."""
    used, named = {process.node for process in layout.processes}, dict[str, str]()
    for names, node in _fleet(cluster):
        if isinstance(resource := node.get("resource"), str):
            named |= dict.fromkeys(used.intersection(names), resource)
    if not named:
        return layout

    def told(processes: Iterable[Process]) -> tuple[Process, ...]:
        return tuple(replace(process, resource=named.get(process.node, "")) for process in processes)

    return replace(layout, servers=told(layout.servers), attention_workers=told(layout.attention_workers))


def planned_model(plan: Plan) -> ModelSpec | None:
    """Return the model that a plan was made for, or None if the plan does not include its documents.

    Raises:
        DocumentError: the document cannot be used.
    """
    from hetis.formats.documents import from_data

    planned = _planned(plan, "model")
    found = None if planned is None else from_data(planned, name="inputs.documents.model")
    return found if isinstance(found, ModelSpec) else None


def _planned(plan: Plan, name: str) -> Any:
    documents = plan.inputs.get("documents")
    return documents.get(name) if isinstance(documents, Mapping) else None


def unknown_nodes(named: Iterable[str], plan: Plan, further: Iterable[str] = ()) -> Iterator[str]:
    """Yield an error for each name that is a node neither of the plan nor of its fleet, nor one of ``further``."""
    used = {node_of(device) for replica in plan.replicas for device in replica.devices()}
    known = sorted(used.union(further, *(names for names, _ in _fleet(_planned(plan, "cluster")))))
    for node in named:
        if node not in known:
            some = ", ".join(known[:_NODES_SHOWN]) + (", ..." if len(known) > _NODES_SHOWN else "")
            yield f"{node!r} is not a node of the plan{did_you_mean(node, known) or f', its nodes are {some}'}"


def _unknown_gpus(replica: ReplicaPlan, cluster: Any) -> Iterator[str]:
    """Yield an error for each GPU that its node in the plan's fleet lacks, if the fleet states the node's ``indices``.

    Plans of earlier versions number such GPUs from 0, and would be started on others.
    """
    gpus_of = dict[str, dict[int, str]]()
    for names, node in _fleet(cluster):
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
        if known is not None and _DEVICE.fullmatch(device) and known.get(_index(device)) != gpu:
            there = ", ".join(f"{index} ({name})" for index, name in known.items())
            yield f"{device} is no {gpu} of the plan's fleet, where {node_of(device)} has {there}: plan again"


def _fleet(cluster: Any) -> Iterator[tuple[Iterable[str], Mapping[str, Any]]]:
    """Yield each group of equal nodes in a fleet document: the names of the nodes, and the fields of the group."""
    nodes = cluster.get("nodes") if isinstance(cluster, Mapping) else None
    for node in nodes if isinstance(nodes, list) else ():
        if isinstance(node, Mapping):
            name, count = node.get("name"), node.get("count")
            yield (f"{name}-{i}" for i in range(count)) if isinstance(count, int) else (str(name),), node


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
    room = _Room.of(kv_tokens, replica, model, dtype)
    cards = [tuple(room.cards(replica, i)) for i in range(len(replica.stages))]
    parts: list[StagePlan | AttentionWorkerPool] = [*replica.stages, *replica.attention_workers]
    vendors = {device: kind_of(part.gpu, own_types or {}).vendor for part in parts for device in part.devices}
    names = [stage.gpu for stage in replica.stages] + [gpu for partner in partners for gpu in partner.gpus]
    gpus = {name: kind_of(name, own_types or {}) for name in names}
    backend = common_backend(model, gpus.values(), engine.value) if partners else ""
    wrong = [
        *_unlike_vendors(replica, gpus, set(vendors.values())),
        *_no_backend(model, gpus, backend),
        *_other_model(planned, replica, model),
        *_impossible(replica, partners, model, engine, dtype),
        *_uneven(cards),
        *_no_room(replica, room),
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
                name=_worker_name([of_stage[place].device for of_stage in cards], place),
                processes=tuple(process.name for process in holding[place * ranks : (place + 1) * ranks]),
            )
            for place in range(len(cards[0]))
        ),
        micro_batch=-(-replica.seats // replica.in_flight) if replica.micro_batch else 0,
        seats=max(replica.seats // copies, _prompts(replica, model, room, most_seats)),
        chunk_tokens=replica.chunk_tokens,
        kv_tokens=kv_tokens,
        kv_is_fp8=_is_fp8(model, dtype),
        draft_tokens=model.step_tokens - 1,
        has_states=Kernel.RECURRENT in model.kernels,
        has_windows_in_some=0.0 < model.sliding_share < 1.0,
        context_tokens=_longest(room.context_tokens, model, fixes_kv=fixes_kv),
        dtype=common_dtype(gpus.values()),
        attention_backend=backend or "",
        data_parallel=copies,
        image_tokens=image_tokens(model),
        block_tokens=_block_tokens(model, tp, 1 if _is_fp8(model, dtype) else DTYPE_BYTES[dtype]),
        is_deprecated=model.weights in DEPRECATED,
        pushes_kv=engine is not Engine.SGLANG and _pushes_kv(replica, partners),
        fixes_kv=fixes_kv,
        utilisation=utilisation,
    )


def _longest(tokens: int, model: ModelSpec, *, fixes_kv: bool) -> int | None:
    """Return the longest request to allow; None: the model's. An engine that finds its own KV may find a tenth less."""
    if not fixes_kv:
        tokens = max(int(0.9 * tokens) // PAGE_TOKENS, 1) * PAGE_TOKENS
    return tokens if tokens < model.max_position else None


def _prompts(replica: ReplicaPlan, model: ModelSpec, room: _Room, most: int | None) -> int:
    """Return how many prompts a prefill replica, or each copy that shares experts, runs at once; 0 for other roles.

    Plans count full chunks, of several prompts if these are shorter. An engine that may run fewer leaves chunks empty.
    Where layers keep states, vLLM does not start without a block for each prompt, which holds those of a few layers.
    """
    if replica.role is not Role.PREFILL:
        return 0
    prompts = _prompts_of(replica)
    if Kernel.RECURRENT in model.kernels:
        for stage in replica.stages:
            of_prompt = stage.num_layers * model.kept_states * model.state_bytes() / stage.tp
            prompts = min(prompts, int(room.of_ranks(stage) / of_prompt))
    return prompts if most is None else min(prompts, most)


def _prompts_of(replica: ReplicaPlan) -> int:
    """Return how many prompts the chunks in flight of a prefill replica hold, as plans assume."""
    return replica.in_flight // replica.attention_dp * (replica.chunk_tokens // PROMPT_TOKENS)


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


def _pushes_kv(replica: ReplicaPlan, partners: Sequence[KvPartner]) -> bool:
    """Return whether the KV of prompts comes from several stages, which vLLM's decode replicas cannot read.

    `NixlConnector` reads it, and expects all layers from each rank (`_validate_remote_agent_handshake` in
    nixl/base_worker.py). `NixlPushConnector` writes the layers of each stage. Replicas that exchange KV have the same.
    """
    if replica.role is Role.PREFILL and len(replica.stages) > 1:
        return True
    return any(one.role is Role.PREFILL and len(one.gpus) > 1 for one in partners)


def _is_fp8(model: ModelSpec, dtype: str) -> bool:
    """Return whether KV has one byte per number: as planned, unless an explicit dtype overrides it."""
    return dtype == "auto" and model.kv_bytes == 1


def _servers(replica: ReplicaPlan, room: _Room, name: str, vendors: Mapping[str, str]) -> Iterator[Process]:
    nodes = {node_of(device) for stage in replica.stages for device in stage.devices}
    parts = [replica.stages] if len(nodes) == 1 else [(stage,) for stage in replica.stages]
    for number, stages in enumerate(parts):
        devices = [device for stage in stages for device in stage.devices]
        yield Process(
            name=f"{name}-{number}" if number else name,
            kind=ProcessKind.SERVER_STAGE if number else ProcessKind.SERVER,
            stage=number,
            node=node_of(devices[0]),
            gpus=tuple(map(_index, devices)),
            kv_bytes=max(map(room.of_ranks, stages)),
            vendor=vendors[replica.stages[0].devices[0]],
        )


def _worker_processes(cards: Sequence[Sequence[_Card]], tp: int, vendors: Mapping[str, str]) -> Iterator[Process]:
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
                    gpus=(_index(card.device),),
                    kv_bytes=card.kv_bytes,
                    sharing=sharing,
                    vendor=vendors[card.device],
                )


def _worker_name(devices: Sequence[str], place: int) -> str:
    """Return the names of the worker's GPUs, or a numbered name if that would be too long."""
    name = "+".join(dict.fromkeys(devices))
    return name if len(name) <= LONGEST_NAME else f"worker-{place}"


def _index(device: str) -> int:
    return int(device.rpartition("/")[2])


# --- reasons for refusal


def _unlike_vendors(replica: ReplicaPlan, gpus: Mapping[str, GpuKind], vendors: set[str]) -> Iterator[str]:
    """Yield why the vendors of a replica's GPUs rule it out.

    Args:
        replica: the replica.
        gpus: the kinds of the GPUs that compute its layers or exchange KV with it.
        vendors: vendors of its GPUs, including those of attention workers.
    """
    if others := sorted(vendors - set(VENDORS)):
        yield f"it has GPUs of {', '.join(others)}: hetis only starts processes on GPUs of {' and '.join(VENDORS)}"
    own = dict.fromkeys(gpus[stage.gpu].vendor for stage in replica.stages)
    if len(own) > 1:
        yield f"it has stages on GPUs of {' and '.join(own)}: an engine needs GPUs of a single vendor"
    elif others := sorted({kind.vendor for kind in gpus.values()} - own.keys()):
        yield f"it exchanges KV with GPUs of {' and '.join(others)}, its own are {''.join(own)}'s"


def _no_backend(model: ModelSpec, gpus: Mapping[str, GpuKind], backend: str | None) -> Iterator[str]:
    if backend is None:
        yield (
            f"it exchanges KV between {', '.join(sorted(gpus))}, and no attention backend of vLLM runs {model.name} on "
            "all of them"
        )


def _other_model(planned: Mapping[str, Any] | None, replica: ReplicaPlan, model: ModelSpec) -> Iterator[str]:
    """Yield the differences between the planned model and the one to serve."""
    if planned is not None:
        fields = ("num_layers", "hidden", "q_heads", "kv_heads", "head_dim", "vocab")
        other = [
            f"{n} {planned.get(n)}, not {getattr(model, n)}" for n in fields if planned.get(n) != getattr(model, n)
        ]
        if other:
            yield f"the plan is of another model ({planned.get('name', 'without a name')}): {', '.join(other)}"
            return
    layers = sum(stage.num_layers for stage in replica.stages)
    if layers != model.num_layers:
        yield f"the plan's stages have {layers} layers, the model {model.num_layers}"


def _impossible(
    replica: ReplicaPlan, partners: Sequence[KvPartner], model: ModelSpec, engine: Engine, dtype: str
) -> Iterator[str]:
    """Yield what the replica requires that the engine, or the plugin in it, does not support."""
    if replica.attention_workers and engine is not Engine.VLLM_HETIS:
        unsupported = "" if engine is Engine.VLLM else f"{engine.program} does not support; "
        yield f"it has attention workers, which {unsupported}vLLM only supports with hetis' plugin (engine vllm-hetis)"
    elif replica.attention_workers and replica.role is not Role.UNIFIED:
        yield (
            f"the replica is to {'prefill' if replica.role is Role.PREFILL else 'decode'} only: the plugin "
            "occupies the vLLM connector that would carry prompts between replicas"
        )
    if reason := why_not_loaded(model, engine.value):
        yield reason
    if engine is not Engine.SGLANG and shares_indexers(model) and len(replica.stages) > 1:
        yield (
            f"it has {len(replica.stages)} stages, and layers share indexers: vLLM's stages do not pass on which "
            "tokens an indexer chose"
        )
    yield from _handed_over(replica, partners, model, engine)
    if replica.role is Role.DECODE and engine is not Engine.SGLANG:
        ranks, senders = replica.stages[0].tp, sorted({one.tp for one in partners if one.role is Role.PREFILL})
        yield from _held_twice(ranks, senders, model, pushes=_pushes_kv(replica, partners))
        yield from _unlike_blocks(ranks, senders, model)
    yield from _unshared(replica, model)
    for number, stage in enumerate(replica.stages):
        yield from (f"stage {number + 1}: {why}" for why in _impossible_stage(replica, number, stage, model, engine))
    if replica.attention_workers and (why_not := why_no_workers(model)):
        yield f"it has attention workers, which {model.name} cannot have: {why_not}"
    if dtype == "auto" and model.kv_bytes < 1:
        yield f"the plan needs KV of {model.kv_bytes:g} bytes per element, {engine.program} supports 1 or 2"
    elif replica.attention_workers and dtype == "auto" and model.kv_bytes != DTYPE_BYTES["auto"]:
        yield f"the plan needs KV of {model.kv_bytes:g} bytes per element, workers support 2 or 4: set --dtype"


def _unshared(replica: ReplicaPlan, model: ModelSpec) -> Iterator[str]:
    """Yield why copies of the replica cannot share their experts."""
    if not replica.expert_parallel:
        return
    if len(replica.stages) != 1 or replica.attention_workers:
        yield "its copies share experts: it must have one stage, without attention workers"
        return
    (stage,) = replica.stages
    ranks = stage.tp * stage.copies
    if model.experts is None:
        yield f"its copies share experts, but {model.name} has none"
    elif model.experts.count % ranks:
        yield f"its {ranks} ranks share {model.experts.count} experts, a number that they must divide"
    if stage.copies < 2 or replica.in_flight != stage.copies:
        counts = f"copies is {stage.copies}, in_flight {replica.in_flight}"
        yield f"its copies share experts: {counts}, must be equal and at least 2"
    if len(stage.devices) != ranks:
        yield f"it has {len(stage.devices)} GPUs for {stage.copies} copies of {stage.tp} ranks"


def _no_room(replica: ReplicaPlan, room: _Room) -> Iterator[str]:
    """Yield why a rank of copies that share experts has no KV; engines keep one page for themselves."""
    if replica.expert_parallel and room.fitting_pages < 2:
        yield (
            f"its copies share experts: vLLM needs {room.taken_bytes} bytes of a rank's planned KV for shared experts "
            "and the workspace of all, which leaves no room for a request"
        )


def _handed_over(
    replica: ReplicaPlan, partners: Sequence[KvPartner], model: ModelSpec, engine: Engine
) -> Iterator[str]:
    """Yield why the KV of prompts cannot be handed over between these stages; see `EngineRules.stages_of`."""
    stages = len(replica.stages)
    if stages == 1:
        return
    if engine is Engine.SGLANG and model.draft is not None and replica.role is not Role.PREFILL:
        yield f"it drafts tokens in {stages} stages: SGLang only supports that in one"
    if engine is Engine.SGLANG:
        from_others = {len(one.gpus) for one in partners if one.role is Role.PREFILL} - {stages}
        if replica.role is Role.DECODE and from_others:
            others = ", ".join(map(str, sorted(from_others)))
            yield f"it decodes in {stages} stages: SGLang needs the same number in prefill replicas, not {others}"
        return
    if replica.role is Role.DECODE:
        yield f"it decodes in {stages} stages: vLLM's NIXL connector only supports decode replicas with one"
    unsupported = {
        "a layer that drafts": model.draft is not None,
        "sliding-window layers": model.sliding_window is not None,
        "layers that keep states": model.state_bytes() > 0.0,
    }
    for what, is_there in unsupported.items() if replica.role is Role.PREFILL else ():
        if is_there:
            yield f"it prefills in several stages: vLLM's NIXL connector does not support this with {what}"


def _held_twice(ranks: int, senders: Sequence[int], model: ModelSpec, *, pushes: bool) -> Iterator[str]:
    """Yield why the KV of prompts cannot come from more ranks than there are KV heads, where ranks hold duplicates.

    Nor can it be written to more (`_pushes_kv`). See `_validate_remote_agent_handshake` in vLLM's nixl/base_worker.py.
    Latent attention and states allow it. ``senders``: the numbers of ranks in prefill replicas.
    """
    if model.kernel is not Kernel.GROUPED or model.state_bytes() > 0.0:
        return
    if wider := [str(tp) for tp in senders if tp > max(ranks, model.kv_heads)]:
        yield (
            f"it decodes in TP{ranks}, and prompts come from TP{' and TP'.join(wider)}, where ranks share "
            f"{model.kv_heads} KV heads: vLLM's NIXL connector then needs the same number of ranks on both sides"
        )
    fewer = [str(tp) for tp in senders if ranks > max(tp, model.kv_heads)]
    if fewer and pushes:
        yield (
            f"it decodes in TP{ranks}, where ranks share {model.kv_heads} KV heads, and prompts come from "
            f"TP{' and TP'.join(fewer)}, from several stages: vLLM's NIXL connector then needs the same number of "
            "ranks on both sides"
        )


def _unlike_blocks(ranks: int, senders: Sequence[int], model: ModelSpec) -> Iterator[str]:
    """Yield why states cannot come from ranks whose blocks have other numbers of tokens.

    vLLM makes a block as large as a state (`_align_hybrid_block_size` in platforms/interface.py). Ranks divide a state,
    but share KV heads if there are fewer, and latent KV. Its NIXL connector then refuses blocks that are no multiple of
    those sent (`block_size_ratio` in kv_connector/utils.py) or, with prefix caching, have another number of the
    kernel's (`_validate_remote_agent_handshake` in nixl/base_worker.py); its documents support no others with states.
    """
    if Kernel.RECURRENT not in model.kernels:
        return
    is_latent = model.kernel is Kernel.LATENT
    heads = 1 if is_latent else model.kv_heads
    if unlike := [f"TP{tp}" for tp in senders if max(tp, heads) != max(ranks, heads)]:
        kv = "latent KV" if is_latent else f"{heads} KV heads"
        yield (
            f"it decodes in TP{ranks}, and prompts come from {' and '.join(unlike)}, where ranks share {kv} but divide "
            "states: vLLM's blocks then differ, which its NIXL connector does not support"
        )


def _impossible_stage(
    replica: ReplicaPlan, number: int, stage: StagePlan, model: ModelSpec, engine: Engine
) -> Iterator[str]:
    pools = [pool for pool in replica.attention_workers if pool.stage == number]
    named = (*stage.devices, *(device for pool in pools for device in pool.devices))
    yield from (f"device {name!r} must be NODE/INDEX, such as gpu2/0" for name in named if not _DEVICE.fullmatch(name))
    if not stage.devices:
        yield "it has no GPUs"
    if stage.copies > 1 and not replica.expert_parallel:
        yield f"it has {stage.copies} copies, {engine.program} has one of each stage"
    if stage.tp != replica.stages[0].tp:
        ranks = f"it has TP{stage.tp} and stage 1 TP{replica.stages[0].tp}"
        yield f"{ranks}, {engine.program} needs the same in every stage"
    first = replica.groups(stage)[0] if stage.devices else ()
    nodes = dict.fromkeys(map(node_of, first))
    if len(nodes) > 1:
        yield f"it is on several nodes, must be on one: {', '.join(first)}"
    if model.q_heads % stage.tp or (model.kv_heads % stage.tp and stage.tp % model.kv_heads):
        yield f"{stage.tp} ranks do not divide {model.q_heads} query heads and {model.kv_heads} KV heads"
        return
    if not model.divides(stage.tp):
        yield f"{stage.tp} ranks do not divide {model.attention.what_ranks_divide}"
        return
    placed = (stage.kv_head_groups_kept + sum(pool.kv_head_groups for pool in pools)) * stage.tp
    heads = max(model.kv_heads, stage.tp)
    if placed != heads and Kernel.LATENT not in model.kernels:
        yield f"the plan places {placed} KV heads, the model has {heads}"


def _uneven(cards: Sequence[Sequence[_Card]]) -> Iterator[str]:
    """Yield a problem if stages have different numbers of workers: a worker of the scheduler has a GPU per stage."""
    counts = [len(of_stage) for of_stage in cards]
    if len(set(counts)) > 1:
        yield (
            f"stages have {', '.join(map(str, counts))} attention workers: the plugin needs the same number in "
            "every stage, since a request's heads go to the same worker in all of them"
        )
