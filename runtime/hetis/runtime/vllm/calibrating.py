"""Measures the cost of attention on a rank itself, with vLLM's own backend over the blocks of an idle pool."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from hetis.runtime.measured.calibration import Calibration, Coefficients, TimedCall, fit_calls
from hetis.runtime.vllm.batch import StepRequests, part_of, slots_of
from hetis.runtime.vllm.store import BlockStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hetis.runtime.vllm.specs import HeadGroupSpec

_CONTEXTS = (16, 128, 512)
_ROUNDS, _LAYERS = 3, 4  # calls per point: rounds over layers


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
        spec: of their KV.
        num_blocks: of the pool; block 0 belongs to nobody.
    """
    device = layers[0].kv_cache.device
    builder = layers[0].impl.builder_cls(spec, names, vllm_config, device)
    calls = []
    for sequences in (1, spec.head_groups, 4 * spec.head_groups):
        for context in _CONTEXTS:
            width = -(-context // spec.block_size)
            if sequences * width < num_blocks:
                calls.append(_measured(layers[:_LAYERS], builder, sequences, context, width, spec.block_size, clock))
    return Calibration(
        coefficients=Coefficients(pieces=(fit_calls(calls),)),
        copy_byte_s=_copy_byte_s(BlockStore(layers, spec.block_size), spec, len(layers), num_blocks, clock),
        read_s=0.0,
    )


def _measured(
    layers: list[Any],
    builder: Any,
    sequences: int,
    context: int,
    width: int,
    block_tokens: int,
    clock: Callable[[], float],
) -> TimedCall:
    """Return the median call of one layer with this many virtual sequences, each of its own request."""
    impl = layers[0].impl
    counts = np.ones(sequences, np.int64)
    lasts = np.full(sequences, context, np.int64)
    requests = StepRequests(rows=np.arange(sequences, dtype=np.int64), counts=counts, lasts=lasts)
    part = part_of(requests, np.ones((sequences, 1), np.bool_))
    tables = 1 + np.arange(sequences * width, dtype=np.int32).reshape(sequences, width)
    device, dtype = layers[0].kv_cache.device, layers[0].kv_cache.dtype
    slots = torch.from_numpy(slots_of(part, tables, block_tokens)).to(device)
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    ends = torch.full((sequences,), context, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=ends.to(device),
        num_reqs=sequences,
        num_actual_tokens=sequences,
        max_query_len=1,
        max_seq_len=context,
        block_table_tensor=torch.from_numpy(tables).to(device),
        slot_mapping=slots,
        is_prefilling=torch.zeros(sequences, dtype=torch.bool),
        seq_lens_cpu_upper_bound=ends,
    )
    metadata = builder.build_base(part, common.block_table_tensor, slots, common)
    q = torch.zeros(sequences, impl.num_heads, impl.head_size, dtype=dtype, device=device)
    kv = torch.zeros(sequences, 1, impl.head_size, dtype=dtype, device=device)
    out = torch.empty_like(q)
    taken_s = []
    with torch.inference_mode():
        for _ in range(1 + _ROUNDS):
            for layer in layers:
                begun_s = clock()
                layer.impl.attend_here(layer, q, kv, kv, layer.kv_cache, slots, metadata, out)
                _wait(device)
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
    store.read(blocks, 0, tokens)  # finds the layout
    begun_s = clock()
    for _ in range(_ROUNDS):
        store.read(blocks, 0, tokens)
    num_bytes: int = _ROUNDS * tokens * num_layers * 2 * spec.head_size * spec.dtype.itemsize
    return (clock() - begun_s) / num_bytes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
