"""The memory of a GPU as an engine divides it: what contexts, graphs, workspaces, the largest batch and weights take,
and what is left for KV.

`EngineMemory` has the numbers of one version of an engine, each with its source; `EngineMemory.rank` turns them into
those of one rank (`hetis.solver.rank_memory`), by which plans are searched and checked, and `kv_bytes_of_request` is
what the engine's pages hold for one request. Both start with what tools report of a GPU, which is less than its name
says. `benchmarks.accuracy.memory` compares them with what users of the engines reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hetis.engines.gpus import kind_of_type, reported_bytes
from hetis.engines.loaded_weights import bytes_beyond_stored
from hetis.engines.versions import VERSIONS, Engine
from hetis.solver.cluster import GpuType
from hetis.solver.model import Compressed, Dense, Kernel, ModelSpec
from hetis.solver.rank_memory import RankKind, RankMemory, captured_graphs

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """How a version of an engine divides memory.

    Attributes:
        engine, version: the engine, and its first version with these numbers.
        utilisation: default share of the reported memory (``--gpu-memory-utilization``); SGLang's is computed.
        base_bytes: CUDA modules, cuBLAS and attention workspaces, counted against that share.
        counts_links: communicators count against the share; otherwise only against free memory.
        counts_graphs: captured graphs count against the share; otherwise they need memory beside it.
        keeps_workspaces: workspaces of fused experts stay allocated while tokens are sampled.
        sampler_bytes: bytes per request and vocabulary entry at the peak of the run at start.
        batches_in_flight: batches whose tokens a window still holds before it frees what they have passed.
        has_large_batches: GPUs with more memory have larger batches and more requests by default.
        spare_states: states of linear attention beside those of an iteration's tokens, for the prefix cache.
    """

    engine: Engine
    version: str
    utilisation: float
    base_bytes: float
    counts_links: bool
    counts_graphs: bool
    keeps_workspaces: bool
    sampler_bytes: float
    batches_in_flight: int = 1
    has_large_batches: bool = True
    spare_states: int = 1

    @property
    def is_sglang(self) -> bool:
        return self.engine is Engine.SGLANG

    def share(self, gpu: GpuType, tp: int = 1, stages: int = 1) -> float:
        """Return the share of the reported memory that the engine takes by default."""
        return _sglang_share(reported_bytes(gpu), tp * stages) if self.is_sglang else self.utilisation

    def share_of(self, start: Start, reported: float) -> float:
        """Return the share of the reported memory with which an engine is started."""
        if start.utilisation is not None:
            return start.utilisation
        return _sglang_share(int(reported), start.num_gpus) if self.is_sglang else self.utilisation

    def rank(
        self, model: ModelSpec, gpu: GpuType, tp: int, *, attention_dp: int = 1, stages: int = 1,
        utilisation: float | None = None, eager: bool = False,
    ) -> RankMemory:  # fmt: skip
        """Return what the engine takes of a GPU as one of ``tp`` ranks.

        Args:
            model: the model in the precision of this GPU.
            gpu, tp, attention_dp: the GPU, its stage's ranks, and the copies that share their experts.
            stages: stages of the replica; more than one have communicators among them.
            utilisation: share of the reported memory; None: the engine's default.
            eager: no graphs are captured.
        """
        total, ranks = reported_bytes(gpu), tp * attention_dp * stages
        share = self.share(gpu, tp, stages) if utilisation is None else utilisation
        links = _links_bytes(gpu, tp * attention_dp)
        free = total - self.taken_before(gpu, ranks)
        forward, workspace = _token_bytes(model, tp, attention_dp)
        held = 4.0 * model.hidden + (workspace if self.keeps_workspaces else 0.0)
        counts = self.counts_graphs and not eager and not self.is_sglang
        if self.is_sglang:  # takes activations and graphs from the rest, beside its share
            forward = held = 0.0
        return RankMemory(
            usable_bytes=max(0.0, min(share * total, free)),
            fixed_bytes=self.base_bytes
            + (links if self.counts_links else 0)
            + (VISION_BYTES if model.vision_params and not self.is_sglang else 0)
            + ((BREAKABLE_POOL_BYTES if model.kernel is Kernel.COMPRESSED else GRAPH_POOL_BYTES) if counts else 0),
            token_bytes=forward,
            held_bytes=held,
            request_bytes=self.sampler_bytes * model.vocab,
            graph_bytes=GRAPH_LAYER_BYTES * model.num_layers / stages if counts else 0.0,
            layer_bytes=bytes_beyond_stored(model, gpu, tp, attention_dp),
            free_bytes=max(0.0, free),
            reported_bytes=total,
            reserved_share=share if self.is_sglang else 0.0,  # SGLang's is a share of what it finds free
        )

    def taken_before(self, gpu: GpuType, ranks: int) -> float:
        """Return the bytes of contexts and communicators that exist when the engine looks whether its share is free,
        without which it refuses to start.
        """
        if not self.counts_links:
            return CONTEXT_BYTES + _links_bytes(gpu, ranks)
        return CONTEXT_BYTES + (EARLY_LINKS_BYTES if _over_switch(gpu, ranks) else 0)

    def share_beside(self, gpu: GpuType, ranks: int, reserved_bytes: int) -> float:
        """Return the largest share of the reported memory, in percent, with which the engine starts beside others."""
        total = reported_bytes(gpu)
        return max(0.0, math.floor(100.0 * (total - self.taken_before(gpu, ranks) - reserved_bytes) / total) / 100.0)


# torch and CUDA keep as much for a process on a GPU, before an engine looks (nvidia-smi beside idle engines).
CONTEXT_BYTES = int(0.5 * GIB)
# What NCCL holds of an H100 before: 1.0 GiB with two or four ranks or stages (vLLM 0.19, starts of llm-d-planner).
EARLY_LINKS_BYTES = GIB
# Image encoders run once at start with the largest image, whose output stays until a batch of text has run
# (``profile_run`` in v1/worker/gpu_model_runner.py); what remains of 2 RTX 3090 and an RTX 5090 with Qwen3.6.
VISION_BYTES = int(0.3 * GIB)
# Graphs: 0.36 GiB for 16 sizes of 64 layers, 0.73 for 86 of 24 (logs of vLLM 0.27 and 0.19, "Estimated CUDA graph
# memory"); a whole graph of 64 layers takes about 24 MiB (vLLM issue 50780).
GRAPH_POOL_BYTES, GRAPH_LAYER_BYTES = int(0.12 * GIB), 0.22 * MIB
# Models that torch does not compile (DeepSeek-V4) break graphs, and vLLM estimates those by the second of them (issues
# 45178, 54677): 4 GiB more on H200, H20 and GH200, of both models, none with ``--enforce-eager`` (vLLM 0.20 to 0.26).
BREAKABLE_POOL_BYTES = int(4.2 * GIB)
# Bytes per request and vocabulary entry. vLLM up to 0.16 sorts: logits in 16 and 32 bits, sorted values and 64-bit
# indices, and as much again inside the sort (v1/sample/ops/topk_topp_sampler.py, `apply_top_k_top_p_pytorch`). From
# 0.17 a kernel filters in place, and probabilities and noise are added (`random_sample`).
SORTED, FILTERED = 34.0, 14.0

# In ascending order of versions. Utilisation: vllm/config/cache.py, 0.92 in logs from 0.21 on. Workspaces stay from
# 0.12 on (v1/worker/workspace.py). Communicators exist before free memory is first read from 0.11.1 on (`init_device`
# in v1/worker/gpu_worker.py), those of all-reduces not since 0.17. Filtering and they: the same models on 4 and 8 H200
# with 0.11.2 to 0.20 (starts of vllm-memory-estimator). Graphs count from 0.20 on
# (VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS; its log says 0.21). Windows free what
# two batches in flight have passed since 0.27 (`max_in_flight_tokens` in vllm/config/vllm.py). What remains of reports
# is the base: 0.2 GiB of V0's own figures, 1.0 of gpt-oss on an H100 (issues 23278, 27508), 0.4 on an A100 (0.19).
_VLLM = tuple(
    EngineMemory(
        engine=Engine.VLLM, version=version, utilisation=share, base_bytes=int(base * GIB), counts_links=links,
        counts_graphs=graphs, keeps_workspaces=workspaces, sampler_bytes=sampler, batches_in_flight=batches,
        has_large_batches=version != "0.0",
    )
    for version, share, base, links, graphs, workspaces, sampler, batches in (
        ("0.0", 0.9, 0.2, True, False, False, SORTED, 1),
        ("0.8", 0.9, 1.0, True, False, False, SORTED, 1),
        ("0.11.1", 0.9, 1.0, False, False, False, SORTED, 1),
        ("0.12", 0.9, 1.0, False, False, True, SORTED, 1),
        ("0.17", 0.9, 0.4, True, False, True, FILTERED, 1),
        ("0.20", 0.9, 0.4, True, True, True, FILTERED, 1),
        ("0.21", 0.92, 0.4, True, True, True, FILTERED, 1),
        ("0.27", 0.92, 0.4, True, True, True, FILTERED, 2),
    )
)  # fmt: skip
_SGLANG = EngineMemory(
    engine=Engine.SGLANG, version="0.4.8", utilisation=0.88, base_bytes=int(0.5 * GIB), counts_links=True,
    counts_graphs=False, keeps_workspaces=False, sampler_bytes=0.0, spare_states=0,
)  # fmt: skip


def memory_of(engine: Engine, version: str | None = None) -> EngineMemory:
    """Return the numbers of an engine's version; None: the version whose options exports use.

    Raises:
        ValueError: the version does not begin with numbers.
    """
    if engine is Engine.SGLANG:
        return _SGLANG
    wanted = _numbers(VERSIONS[engine] if version is None else version)
    return [one for one in _VLLM if _numbers(one.version) <= wanted][-1]


def rank_memories(
    rules: EngineMemory, model: ModelSpec, gpus: Mapping[str, GpuType], tp_sizes: Iterable[int],
    copies: Iterable[int] = (), *, utilisation: float | None = None,
) -> dict[RankKind, RankMemory]:  # fmt: skip
    """Return what an engine takes of every kind of rank that a plan may have: of any TP size, with or without copies
    that share experts. Communicators are those of the stage alone.
    """
    return {
        RankKind(name, tp, dp): rules.rank(model.on(name), gpu, tp, attention_dp=dp, utilisation=utilisation)
        for name, gpu in gpus.items()
        for tp in tp_sizes
        for dp in (1, *copies)
    }


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    if found is None:
        raise ValueError(f"{version!r} is not a version such as 0.32.0")
    return tuple(map(int, found[1].split(".")))


def _sglang_share(total: int, ranks: int) -> float:
    """Return SGLang's default ``--mem-fraction-static`` (`_handle_gpu_memory_settings` in server_args.py)."""
    megabytes = total / MIB
    sizes = ((20 * 1024, 2048, 8), (35 * 1024, 2048, 24), (60 * 1024, 4096, 32), (90 * 1024, 8192, 256))
    chunk, graphs = next(((c, g) for most, c, g in sizes if megabytes < most), (8192, 512))
    reserved = 512 + 1.5 * max(chunk, 2048) + 2 * graphs + ranks / 8 * 1024
    if megabytes > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    return round((megabytes - reserved) / megabytes, 3)


def _links_bytes(gpu: GpuType, ranks: int) -> int:
    """Return the bytes of communicators among ranks of a stage: NCCL's channels and, over NVSwitch, buffers for
    multicast and custom all-reduces.

    1.8 GiB with two H100 (vLLM pull request 10511: 3.58 against 1.79), 1.7 with four in SGLang, 1.8 with two or four in
    vLLM 0.19 (67 starts of llm-d-planner); 0.05 with two RTX 4090 (issue 13061) or 16 RTX 3090 (pull request 14447).
    """
    return 0 if ranks == 1 else int(1.8 * GIB) if _over_switch(gpu, ranks) else int(0.05 * GIB)


def _over_switch(gpu: GpuType, ranks: int) -> bool:
    return 1 < ranks <= 8 and gpu.nvlink_bytes_per_s is not None and kind_of_type(gpu).capability in (9.0, 10.0)


def _token_bytes(model: ModelSpec, tp: int, attention_dp: int) -> tuple[float, float]:
    """Return the bytes per token at the peak of a forward pass, and those of fused experts' workspaces among them.

    A dense layer holds the residual and the hidden state, each read and written, both halves of the gated product and
    their product. Fused experts hold each token once per expert, before and after both products
    (`workspace_shapes` in fused_moe/experts/triton_moe.py).
    """
    size, streams = model.activation_bytes, 2.0 * (model.hidden + model.residual_width)
    mlps = {mlp for layer in model.layers for mlp in layer.mlps}
    inner = max((mlp.matrices * mlp.width / tp for mlp in mlps if isinstance(mlp, Dense)), default=0.0)
    if model.experts is None:
        return size * (streams + inner), 0.0
    experts, split = model.experts, tp if attention_dp == 1 else 1
    each = experts.width / split
    workspace = size * experts.active * (max(each, model.hidden) + max(2.0 * each, model.hidden))
    workspace *= attention_dp  # tokens of all copies
    beside = max(3.0 * experts.shared_width / tp, inner)
    return size * (streams + model.hidden + beside) + workspace, workspace


def block_tokens(model: ModelSpec, tp: int = 1, *, default: int = 16) -> int:
    """Return the tokens of a block of KV: where layers keep states, as many as make a block as large as a state.

    See `_align_hybrid_block_size` in vllm/platforms/interface.py; with latent attention multiples of 128.
    """
    if not model.recurrent_layers:
        return default
    is_latent = model.kernel is Kernel.LATENT
    groups = 1.0 if is_latent else max(1.0, model.kv_heads / tp)
    token_bytes = model.kv_bytes_per_token_group() / model.kv_share * groups
    step = 128 if is_latent else 16
    return step * math.ceil(model.recurrent_state_bytes / tp / (step * token_bytes) * (1 - 1e-12))


def kv_bytes_of_request(
    model: ModelSpec, context_tokens: int, rules: EngineMemory, *, tp: int = 1, batched_tokens: int = 8192,
    vendor: str = "NVIDIA",
) -> float:  # fmt: skip
    """Return the bytes that a rank with all layers needs for a request of this context, as the engine counts pages."""
    in_flight = rules.batches_in_flight * batched_tokens
    layers = model.num_layers + model.draft_layers
    groups = max(1.0, model.head_groups / tp)
    if model.kernel is Kernel.COMPRESSED and not rules.is_sglang:
        is_fp8 = model.kv_bytes < 2.0 and vendor != "AMD"  # its kernels have no packed FP8 (models/deepseek_v4/amd)
        return _compressed_bytes(model, context_tokens, in_flight, is_fp8=is_fp8)
    if model.recurrent_layers and not rules.is_sglang:
        return _hybrid_bytes(model, context_tokens, rules, tp)
    tokens = float(context_tokens)
    if model.cached_tokens(tokens) < context_tokens:  # windows are freed after the batch that passed them
        in_window = min(context_tokens, (model.sliding_window or 0) + in_flight)
        sliding = round(model.sliding_share * layers)
        filled = _in_groups(layers - sliding, sliding), _in_groups(sliding, layers - sliding)
        tokens = (filled[0] * tokens + filled[1] * in_window) / layers
    per_token = layers * groups * model.kv_bytes_per_token_group()
    states = layers * model.kept_states * model.state_bytes() / model.state_ranks(tp)
    return 16 * math.ceil(tokens / 16) * per_token + states


def _in_groups(layers: int, others: int) -> int:
    """Return the layers of a kind with those that fill up its groups, which are as large as the smaller kind, or as the
    larger one where that is less than a quarter larger (`_get_kv_cache_groups_uniform_page_size`, vLLM 0.32).
    """
    least, most = sorted((layers, others))
    size = most if most < 1.25 * least else max(least, 1)
    return size * math.ceil(layers / size)


def _hybrid_bytes(model: ModelSpec, context_tokens: int, rules: EngineMemory, tp: int) -> float:
    """Return the bytes of a request whose layers keep states or KV, all in blocks of the same size.

    A block holds one page of as many layers as have KV; layers with states are divided into groups of as many, of which
    each takes a block for every state (`_get_kv_cache_groups_uniform_page_size` in v1/core/kv_cache_utils.py).
    """
    block = block_tokens(model, tp)
    with_kv = round(model.num_layers * model.kv_share) + model.draft_layers
    groups = max(1.0, model.head_groups / tp)
    token_bytes = with_kv * groups * model.kv_bytes_per_token_group() / model.kv_share
    state_groups = math.ceil(model.recurrent_layers / with_kv)
    blocks = math.ceil(context_tokens / block) + state_groups * (model.kept_states + rules.spare_states)
    return blocks * block * token_bytes


def _compressed_bytes(model: ModelSpec, context_tokens: int, in_flight: int, *, is_fp8: bool) -> float:
    """Return the bytes of a request with compressed attention, all in blocks as large as the widest group of layers.

    Entries of all layers are one group, of 256 tokens per block; windows have 64, inputs of compressors 4 and 8, for
    the batch that is computed and what they reach back (models/deepseek_v4, `max_admission_blocks_per_request`). In
    FP8 pages are multiples of 576 bytes, otherwise, as on AMD, of 512.
    """
    entry, unit = (584, 576) if is_fp8 else (2 * model.head_dim, 512)

    def page(num_bytes: float) -> float:
        return unit * math.ceil(num_bytes / unit)

    in_flight = min(in_flight, context_tokens)
    entries = inputs = blocks = 0.0
    windows = max(mixer.window for mixer, _ in model.mixers if isinstance(mixer, Compressed))
    for mixer, layers in model.mixers:
        if not isinstance(mixer, Compressed) or mixer.ratio is None:
            continue
        entries += layers * page(256 / mixer.ratio * entry)
        if mixer.indexer is not None:
            entries += layers * page(256 / mixer.ratio * mixer.indexer.key_bytes)
            inputs += layers * (page(4 * 16.0 * model.head_dim) + page(4 * 16.0 * mixer.indexer.head_dim))
            blocks += math.ceil((2 * mixer.ratio - 1 + in_flight) / 4) + 1
        else:
            blocks += math.ceil((mixer.ratio - 1 + in_flight) / 8) + 1
    blocks += math.ceil(context_tokens / 256) + math.ceil((windows - 1 + in_flight) / 64) + 1
    return blocks * max(entries, inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How the engine of a replica of equal stages is started; ``utilisation`` of None is the engine's default."""

    rules: EngineMemory
    max_num_seqs: int
    batched_tokens: int
    tp: int = 1
    stages: int = 1
    utilisation: float | None = None
    eager: bool = False
    in_use_bytes: int = 0

    @property
    def num_gpus(self) -> int:
        return self.tp * self.stages


def default_start(rules: EngineMemory, gpu: GpuType, *, tp: int = 1, stages: int = 1) -> Start:
    """Return how an engine starts on a GPU without options (`get_batch_defaults` in vllm/engine/arg_utils.py).

    SGLang's are those of its ``--chunked-prefill-size``, and no limit on requests that takes memory.
    """
    total = reported_bytes(gpu)
    if not rules.has_large_batches or total < 70 * GIB or gpu.name.startswith("A100"):
        tokens, requests = 2048, 256
    else:
        tokens, requests = (16384 if total >= 160 * GIB else 8192), 1024
    return Start(rules=rules, max_num_seqs=requests, batched_tokens=tokens, tp=tp, stages=stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How a GPU's memory is divided on the stage that has the least left for KV; negative if nothing is left."""

    reported_bytes: float
    kept_bytes: float  # beyond the engine's share
    fixed_bytes: float
    graph_bytes: float
    weight_bytes: float
    batch_bytes: float  # the peak of the largest batch
    kv_bytes: float


def room_of(model: ModelSpec, gpu: GpuType, start: Start) -> Room:
    """Return the room for KV on each GPU of a replica whose stages have as many layers each."""
    rank = start.rules.rank(
        model, gpu, start.tp, stages=start.stages, utilisation=start.utilisation, eager=start.eager
    ).beside(start.in_use_bytes)
    tokens, requests = start.batched_tokens, min(start.max_num_seqs, start.batched_tokens)
    total, graphs = reported_bytes(gpu), rank.graph_bytes * float(captured_graphs(requests))
    layer = model.layer_params() * model.weight_bytes / start.tp + rank.layer_bytes
    table = model.embedding_params * model.embedding_bytes / start.tp
    ends = {
        True: (model.vision_params * model.embedding_bytes) / start.tp
        + model.prefix_layers * (model.dense_layer_params() * model.weight_bytes / start.tp - layer),
        False: model.draft_params() * model.embedding_bytes / start.tp,  # as published, in 16 bits
    }
    rooms = list[Room]()
    for is_first, is_last in {(number == 0, number == start.stages - 1) for number in (0, start.stages - 1)}:
        weights = layer * model.num_layers / start.stages + ends[True] * is_first + ends[False] * is_last
        weights += table * (1 if model.tie_embeddings else is_first + is_last)
        batch = rank.token_bytes * tokens
        batch += float(rank.sampling_bytes(tokens, requests, requests)) if is_last else 0.0
        rooms.append(
            Room(
                reported_bytes=total,
                kept_bytes=total - rank.usable_bytes,
                fixed_bytes=rank.fixed_bytes,
                graph_bytes=graphs,
                weight_bytes=weights,
                batch_bytes=batch,
                kv_bytes=rank.usable_bytes - rank.fixed_bytes - graphs - weights - batch,
            )
        )
    return min(rooms, key=lambda room: room.kv_bytes)


def requests_in(room: Room, model: ModelSpec, gpu: GpuType, start: Start, context_tokens: int) -> float:
    """Return how many requests of this context the room for KV holds, which engines report times the context."""
    each = kv_bytes_of_request(
        model, context_tokens, start.rules, tp=start.tp, batched_tokens=start.batched_tokens, vendor=gpu.vendor
    )
    return max(0.0, room.kv_bytes) * start.stages / each


def longest_context(room: Room, model: ModelSpec, gpu: GpuType, start: Start) -> int:
    """Return the tokens of the longest request for which there is room, as vLLM estimates it; 0: for none."""
    low, high = 0, model.max_position
    while low < high:
        middle = (low + high + 1) // 2
        fits = requests_in(room, model, gpu, start, middle) >= 1.0
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
