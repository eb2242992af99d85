"""Assembles a rank from vLLM's description of the model and the settings of the workers, and measures its attention."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from hetis.commands.endpoints import split_address
from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.kv import DeviceError, KvShape
from hetis.runtime.transport.channel import ChannelKind
from hetis.runtime.transport.frames import uptime_s
from hetis.runtime.vllm.backend import HeadGroupImpl, UnsupportedModelError
from hetis.runtime.vllm.blocks import HeadGroupSpec
from hetis.runtime.vllm.calibration import (
    CONTEXTS,
    Calibration,
    Coefficients,
    TimedCall,
    calibrate,
    fit_calls,
    head_shape,
)
from hetis.runtime.vllm.ranks.head_map import LayerCall
from hetis.runtime.vllm.ranks.rank import Rank
from hetis.runtime.vllm.ranks.step_tensors import LocalSequences, StepLimits
from hetis.runtime.vllm.ranks.workers import BlockStore, ConnectedWorkers
from hetis.runtime.vllm.scheduler import EngineShape
from hetis.runtime.vllm.settings import VARIABLE, PluginSettings, require_whole_pages
from hetis.runtime.vllm.steps import LOCAL

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from hetis.solver.dispatch.dispatch_problem import HeadShape


_ROUNDS, _LAYERS = 3, 4  # calls per point: rounds over layers
_DIFFERENT_HEADS = "hetis cannot place head groups of a model whose layers have different heads"
_HEADS = ("num_heads", "head_size", "scale", "logits_soft_cap")  # properties that all layers must share


def calibrate_here(
    layers: list[Any],
    names: list[str],
    spec: HeadGroupSpec,
    num_blocks: int,
    vllm_config: VllmConfig,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Time decode attention for a few numbers of head groups and context lengths. No request may hold a block yet.

    Args:
        layers: attention layers of this rank with their caches bound.
        names: vLLM's names for them.
        spec: the spec of their KV.
        num_blocks: number of blocks in the pool; block 0 belongs to no request.
    """
    builder, size = layers[0].impl.builder_cls(spec, names, vllm_config, layers[0].kv_cache.device), spec.block_size
    requests = min(4, vllm_config.scheduler_config.max_num_seqs)  # what the builder has room for
    most, counts = vllm_config.model_config.max_model_len, {1, spec.head_groups, requests * spec.head_groups}
    points = [(count, context) for count in sorted(counts) for context in CONTEXTS if context <= most]
    fitting = [(count, context) for count, context in points if count * -(-context // size) < num_blocks]
    calls = [_measured(layers[:_LAYERS], builder, count, context, size, clock) for count, context in fitting]
    return Calibration(
        coefficients=Coefficients(pieces=(fit_calls(calls),)),
        copy_byte_s=_copy_byte_s(BlockStore(layers, spec.block_size), spec, len(layers), num_blocks, clock),
        read_s=0.0,
    )


def _measured(
    layers: list[Any], builder: Any, sequences: int, context: int, block_tokens: int, clock: Callable[[], float]
) -> TimedCall:
    """Return the median call of one layer with this many virtual sequences, each of its own request."""
    impl, width = layers[0].impl, -(-context // block_tokens)
    device, dtype = layers[0].kv_cache.device, layers[0].kv_cache.dtype
    tables = 1 + torch.arange(sequences * width, dtype=torch.int32).view(sequences, width)
    slots = tables[:, (context - 1) // block_tokens].long() * block_tokens + (context - 1) % block_tokens
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    ends = torch.full((sequences,), context, dtype=torch.int32)
    local = LocalSequences(
        tables=tables.to(device),
        slots=slots.to(device),
        starts=starts.to(device),
        lasts=ends.to(device),
        starts_cpu=starts,
        lasts_cpu=ends,
        is_in_order=True,
        max_query_len=1,
        max_seq_len=context,
    )
    common = CommonAttentionMetadata(
        query_start_loc=local.starts,
        query_start_loc_cpu=starts,
        seq_lens=local.lasts,
        num_reqs=sequences,
        num_actual_tokens=sequences,
        max_query_len=1,
        max_seq_len=context,
        block_table_tensor=local.tables,
        slot_mapping=local.slots,
        is_prefilling=torch.zeros(sequences, dtype=torch.bool),
        seq_lens_cpu_upper_bound=ends,
    )
    metadata = builder.build_base(local, common)
    q = torch.zeros(sequences, impl.num_heads, impl.head_size, dtype=dtype, device=device)
    kv = torch.zeros(sequences, 1, impl.head_size, dtype=dtype, device=device)
    out = torch.empty_like(q)
    taken_s = []
    with torch.inference_mode():
        for _ in range(1 + _ROUNDS):
            for layer in layers:
                begun_s = clock()
                layer.impl.attend_here(LayerCall(layer, q, kv, kv, layer.kv_cache, out), local.slots, metadata)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken_s.append(clock() - begun_s)
    kv_bytes = float(sequences * context * 2 * impl.head_size * dtype.itemsize)
    # Ignore the first round, which allocates and meets cold caches.
    return TimedCall(heads=sequences * impl.num_heads, kv_bytes=kv_bytes, seconds=median(taken_s[len(layers) :]))


def _copy_byte_s(
    store: BlockStore, spec: HeadGroupSpec, num_layers: int, num_blocks: int, clock: Callable[[], float]
) -> float:
    """Return the seconds per byte of KV read out of the blocks of one head group."""
    blocks = np.arange(1, min(num_blocks, 1 + max(256 // spec.block_size, 1)), dtype=np.int64)
    if not len(blocks):
        return 0.0
    tokens = len(blocks) * spec.block_size
    store.read(blocks, 0, tokens)  # the first read determines the layout
    begun_s = clock()
    for _ in range(_ROUNDS):
        store.read(blocks, 0, tokens)
    num_bytes: int = _ROUNDS * tokens * num_layers * 2 * spec.head_size * spec.dtype.itemsize
    return (clock() - begun_s) / num_bytes


def rank_number() -> int:
    """Return this rank's index among a worker's addresses: by pipeline stage, then by tensor parallel rank."""
    from vllm.distributed import get_pp_group, get_tp_group

    tensor = get_tp_group()
    return int(get_pp_group().rank_in_group * tensor.world_size + tensor.rank_in_group)


def make_rank(vllm_config: VllmConfig, cache: KVCacheConfig, settings: PluginSettings, number: int) -> Rank:
    """Return the rank of this process, connected to its workers."""
    group = only_group(cache)
    spec = group.kv_cache_spec
    layers = [vllm_config.compilation_config.static_forward_context[name] for name in group.layer_names]
    shape = shape_of(spec, [layer.impl for layer in layers], settings.page_tokens)
    require_whole_pages(settings, spec.block_size)
    if settings.workers and spec.dtype != vllm_config.model_config.dtype:
        why = f"KV of {spec.dtype} under a model of {vllm_config.model_config.dtype}"
        raise UnsupportedModelError(f"hetis cannot place head groups with {why}: leave --kv-cache-dtype out")
    if layers and (blocks := layers[0].kv_cache.shape[0]) != cache.num_blocks:
        why = f"the backend's kernels see {blocks} blocks, vLLM {cache.num_blocks} of {spec.block_size} tokens"
        raise UnsupportedModelError(f"hetis cannot place head groups here: {why}; use a smaller --block-size")
    epoch, started_s = secrets.randbits(63), uptime_s()
    calibrations: dict[int, Calibration] = {}

    def join(worker: int) -> AttentionDevice:
        from hetis.runtime.transport.keys import read_key
        from hetis.runtime.worker.remote import join_at

        one = settings.workers[worker - 1]
        key = read_key(one.key_file, {})
        assert key is not None, "a file was named"
        host, port = split_address(one.addresses[number])
        kind, timeout_s = ChannelKind(settings.transport), settings.timeout_s
        age_s = uptime_s() - started_s
        device = join_at(
            one.name,
            host,
            port,
            key,
            shape,
            epoch=epoch,
            age_s=age_s,
            kind=kind,
            timeout_s=timeout_s,
            encrypts=settings.encrypt,
        )
        if settings.calibrate:
            try:
                measured = calibrate(device, groups=spec.head_groups, exchange_bytes_per_head=exchange)
            except DeviceError:
                device.close()
                raise
            if measured is not None:
                calibrations[worker] = measured
        return device

    exchange = heads_of(spec, shape.queries_per_group).exchange_bytes_per_head
    if settings.calibrate and settings.workers:
        calibrations[LOCAL] = calibrate_here(layers, list(group.layer_names), spec, cache.num_blocks, vllm_config)
    return Rank(
        shape,
        {name: i for i, name in enumerate(group.layer_names)},
        spec.head_groups,
        cache.num_blocks,
        spec.block_size,
        ConnectedWorkers([worker.name for worker in settings.workers], join, epoch=epoch),
        BlockStore(layers, spec.block_size),
        limits=limits_of(vllm_config, spec.block_size),
        copy_bytes_per_step=settings.redispatch.copy_bytes_per_step,
        calibrations=calibrations,
    )


def limits_of(vllm_config: VllmConfig, block_tokens: int) -> StepLimits:
    """Return the largest step that vLLM makes, graphs of padded ones included."""
    scheduler, padded = vllm_config.scheduler_config, vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return StepLimits(
        requests=scheduler.max_num_seqs,
        tokens=max(scheduler.max_num_batched_tokens, padded),
        blocks=-(-vllm_config.model_config.max_model_len // block_tokens),
    )


def only_group(cache: KVCacheConfig) -> KVCacheGroupSpec:
    """Return the group of all layers. Raises UnsupportedModelError if some keep states, or differ in their heads."""
    specs: list[Any] = []
    for group in cache.kv_cache_groups:
        specs += getattr(group.kv_cache_spec, "kv_cache_specs", {"all": group.kv_cache_spec}).values()
    if others := sorted({type(spec).__name__ for spec in specs if not isinstance(spec, HeadGroupSpec)}):
        why = f"some of whose layers keep something else than KV of heads ({', '.join(others)})"
        raise UnsupportedModelError(f"hetis cannot place head groups of a model {why}; unset {VARIABLE}")
    if any(spec != specs[0] for spec in specs):
        raise UnsupportedModelError(f"{_DIFFERENT_HEADS}; unset {VARIABLE}")
    return cache.kv_cache_groups[0]


def heads_of(spec: HeadGroupSpec, queries_per_group: int) -> HeadShape:
    """Return the heads of a layer on one rank."""
    return head_shape(
        groups=spec.head_groups,
        queries=queries_per_group,
        head_dim=spec.head_size,
        item_bytes=spec.dtype.itemsize,
        block_tokens=spec.block_size,
    )


def engine_shape(vllm_config: VllmConfig, spec: HeadGroupSpec) -> EngineShape:
    """Return the properties of the engine that placement needs."""
    from vllm.distributed.utils import get_pp_indices

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers, stages = model.get_total_num_hidden_layers(), parallel.pipeline_parallel_size
    ends = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    queries = max(model.get_num_attention_heads(parallel) // spec.head_groups, 1)
    return EngineShape(
        heads=heads_of(spec, queries),
        num_layers=layers,
        tensor_parallel=parallel.tensor_parallel_size,
        stage_layers=tuple(last - first for first, last in ends),
        most_running=vllm_config.scheduler_config.max_num_seqs,
    )


def shape_of(spec: HeadGroupSpec, impls: Sequence[Any], page_tokens: int) -> KvShape:
    """Return the shape of a stage's virtual sequences, as workers need it. Raises UnsupportedModelError."""
    first = impls[0]
    for impl in impls:
        if not isinstance(impl, HeadGroupImpl):
            raise UnsupportedModelError(f"hetis cannot place head groups of layers of {type(impl).__name__}")
        if any(getattr(impl, name) != getattr(first, name) for name in _HEADS):
            raise UnsupportedModelError(f"{_DIFFERENT_HEADS}; unset {VARIABLE}")
    return KvShape(
        layers=len(impls),
        head_dim=first.head_size,
        queries_per_group=first.num_heads,
        page_tokens=page_tokens,
        dtype=str(spec.dtype).removeprefix("torch."),
        scale=first.scale,
        windows=tuple(impl.sliding_window or 0 for impl in impls),
        soft_cap=float(first.logits_soft_cap or 0.0),
    )
