"""Puts the parts of a rank together from what vLLM says of the model and what the settings say of the workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.transport.connecting import ChannelKind
from hetis.runtime.vllm.backend import HeadGroupImpl, UnsupportedModelError
from hetis.runtime.vllm.rank import Rank
from hetis.runtime.vllm.settings import Settings
from hetis.runtime.vllm.store import BlockStore
from hetis.runtime.vllm.workers import Workers
from hetis.solver.dispatch.problem import HeadShape, Primary, Stage

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from hetis.runtime.vllm.specs import HeadGroupSpec


def rank_number() -> int:
    """This rank among the addresses of a worker: pipeline stages in order, in each the tensor-parallel ranks."""
    from vllm.distributed import get_pp_group, get_tp_group

    tensor = get_tp_group()
    return int(get_pp_group().rank_in_group * tensor.world_size + tensor.rank_in_group)


def make_rank(vllm_config: VllmConfig, cache: KVCacheConfig, settings: Settings, number: int) -> Rank:
    """The rank of this process, connected to its workers."""
    [group] = cache.kv_cache_groups
    spec = group.kv_cache_spec
    context = vllm_config.compilation_config.static_forward_context
    layers = [context[name] for name in group.layer_names]
    shape = shape_of(spec, [layer.impl for layer in layers], settings.page_tokens)
    epoch = time.time_ns() // 1_000_000

    def join(worker: int) -> AttentionDevice:
        from hetis.runtime.transport.keys import read_key
        from hetis.runtime.worker.joining import join_at

        one = settings.workers[worker - 1]
        key = read_key(one.key_file, {})
        assert key is not None, "a file was named"
        host, _, port = one.addresses[number].rpartition(":")
        return join_at(
            one.name,
            host.strip("[]"),
            int(port),
            key,
            shape,
            epoch=epoch,
            kind=ChannelKind(settings.transport),
            timeout_s=settings.timeout_s,
        )

    return Rank(
        shape,
        {name: i for i, name in enumerate(group.layer_names)},
        spec.head_groups,
        cache.num_blocks,
        spec.block_size,
        Workers([worker.name for worker in settings.workers], join, epoch=epoch),
        BlockStore(layers, spec.block_size),
        copy_bytes_per_step=settings.redispatch.copy_bytes_per_step,
    )


def shape_of(spec: HeadGroupSpec, impls: Sequence[Any], page_tokens: int) -> KvShape:
    """What the virtual sequences of a stage look like to a worker. Raises UnsupportedModelError."""
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


def first_costs(spec: HeadGroupSpec, workers: Sequence[str]) -> Stage:
    """Devices of one speed until they are measured; workers cost a little to reach."""
    item = spec.dtype.itemsize
    num = 1 + len(workers)
    away = np.array([0.0] + [1.0] * len(workers))
    return Stage(
        heads=HeadShape(
            head_groups=spec.head_groups,
            queries_per_group=1,
            kv_bytes_per_token=2 * spec.head_size * item,
            exchange_bytes_per_head=4 * spec.head_size * item,
            block_tokens=spec.block_size,
        ),
        devices=("here", *workers),
        head_s=np.full((num, 1), 1e-7),
        kv_byte_s=np.full((num, 1), 1e-10),
        call_s=np.full((num, 1), 1e-5),
        transfer_byte_s=1e-10 * away,
        transfer_s=1e-5 * away,
        primary=Primary(device=0),
    )
