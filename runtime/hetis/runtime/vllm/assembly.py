"""Assembles a rank from vLLM's description of the model and the settings of the workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hetis.formats.endpoints import split_address
from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.kv import DeviceError, KvShape
from hetis.runtime.measured.calibration import Calibration, calibrate
from hetis.runtime.transport.channel import ChannelKind
from hetis.runtime.vllm.backend import HeadGroupImpl, UnsupportedModelError
from hetis.runtime.vllm.costs import head_shape
from hetis.runtime.vllm.rank import Rank
from hetis.runtime.vllm.scheduler import EngineShape
from hetis.runtime.vllm.settings import PluginSettings
from hetis.runtime.vllm.steps import LOCAL
from hetis.runtime.vllm.store import BlockStore
from hetis.runtime.vllm.workers import Workers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from hetis.runtime.vllm.specs import HeadGroupSpec
    from hetis.solver.dispatch.problem import HeadShape


def rank_number() -> int:
    """Return this rank's index among a worker's addresses: by pipeline stage, then by tensor parallel rank."""
    from vllm.distributed import get_pp_group, get_tp_group

    tensor = get_tp_group()
    return int(get_pp_group().rank_in_group * tensor.world_size + tensor.rank_in_group)


def make_rank(vllm_config: VllmConfig, cache: KVCacheConfig, settings: PluginSettings, number: int) -> Rank:
    """Return the rank of this process, connected to its workers."""
    [group] = cache.kv_cache_groups
    spec = group.kv_cache_spec
    context = vllm_config.compilation_config.static_forward_context
    layers = [context[name] for name in group.layer_names]
    shape = shape_of(spec, [layer.impl for layer in layers], settings.page_tokens)
    epoch = time.time_ns() // 1_000_000
    calibrations: dict[int, Calibration] = {}

    def join(worker: int) -> AttentionDevice:
        from hetis.runtime.transport.keys import read_key
        from hetis.runtime.worker.remote import join_at

        one = settings.workers[worker - 1]
        key = read_key(one.key_file, {})
        assert key is not None, "a file was named"
        host, port = split_address(one.addresses[number])
        device = join_at(
            one.name,
            host,
            port,
            key,
            shape,
            epoch=epoch,
            kind=ChannelKind(settings.transport),
            timeout_s=settings.timeout_s,
        )
        if settings.calibrate:
            try:
                found = calibrate([device], groups=spec.head_groups, exchange_bytes_per_head=exchange, primaries=0)
            except DeviceError:
                device.close()
                raise
            if (measured := found.get(device.name)) is not None:
                calibrations[worker] = measured
        return device

    exchange = heads_of(spec, shape.queries_per_group).exchange_bytes_per_head
    if settings.calibrate and settings.workers:
        from hetis.runtime.vllm.calibrating import calibrate_here

        calibrations[LOCAL] = calibrate_here(layers, list(group.layer_names), spec, cache.num_blocks, vllm_config)
    return Rank(
        shape,
        {name: i for i, name in enumerate(group.layer_names)},
        spec.head_groups,
        cache.num_blocks,
        spec.block_size,
        Workers([worker.name for worker in settings.workers], join, epoch=epoch),
        BlockStore(layers, spec.block_size),
        copy_bytes_per_step=settings.redispatch.copy_bytes_per_step,
        calibrations=calibrations,
    )


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
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    queries = max(model.get_num_attention_heads(parallel) // spec.head_groups, 1)
    return EngineShape(
        heads=heads_of(spec, queries),
        num_layers=model.get_total_num_hidden_layers(),
        tensor_parallel=parallel.tensor_parallel_size,
        most_running=vllm_config.scheduler_config.max_num_seqs,
    )


def shape_of(spec: HeadGroupSpec, impls: Sequence[Any], page_tokens: int) -> KvShape:
    """Return the shape of a stage's virtual sequences, as workers need it. Raises UnsupportedModelError."""
    first = impls[0]
    for impl in impls:
        if not isinstance(impl, HeadGroupImpl):
            raise UnsupportedModelError(f"hetis cannot place head groups of layers of {type(impl).__name__}")
        if (impl.num_heads, impl.head_size, impl.scale, impl.logits_soft_cap) != (
            first.num_heads,
            first.head_size,
            first.scale,
            first.logits_soft_cap,
        ):
            raise UnsupportedModelError("hetis cannot place head groups of a model whose layers have different heads")
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
