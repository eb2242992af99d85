"""Attention over pages by FlashInfer: CUDA devices of compute capability 7.5 and above.

A virtual sequence is a request with one KV head to FlashInfer, so that its layouts fit ours as they are, and heads of
one request may be anywhere. The plan is host work done once per step; all layers of one window share it. Its plain
decode kernel knows group sizes 1, 2, 3, 4, 6, 8 and 16: others, as 5 (40/8 heads) and 7 (28/4), take the kernel for
prefills, which uses tensor cores.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from hetis.runtime.kv.pool import IntArray, PagePool

PLAIN_GROUPS = (1, 2, 3, 4, 6, 8, 16)
HEAD_DIMS = (64, 128, 256)
LEAST_CAPABILITY = (7, 5)
LEAST_CAPABILITY_BFLOAT16 = (8, 0)
WORKSPACE_BYTES = 128 * 2**20  # as FlashInfer's own examples


class FlashInferBackend:
    """FlashInfer's paged decode; float16 and bfloat16."""

    name = "flashinfer"

    def __init__(self, pool: PagePool, *, is_reproducible: bool = False) -> None:
        """``is_reproducible`` never splits a sequence, so that its result does not depend on who else is there."""
        import flashinfer

        shape, device = pool.shape, pool.k.device
        self._pool, self._is_reproducible = pool, is_reproducible
        self._slots = torch.zeros(0, dtype=torch.int64, device=device)
        self._wrappers: dict[int, Any] = {
            window: flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
                "NHD",
                use_tensor_cores=shape.queries_per_group not in PLAIN_GROUPS,
            )
            for window in set(shape.windows)
        }

    def plan(self, rows: IntArray, positions: IntArray) -> None:
        pool, shape, device = self._pool, self._pool.shape, self._pool.k.device
        size = shape.page_tokens
        self._slots = pool.slots(rows, positions)
        counts = positions // size + 1
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        is_page = np.arange(counts.max())[None, :] < counts[:, None]
        indices = pool.table[rows, : counts.max()][is_page]
        last = (positions % size + 1).astype(np.int32)
        # FlashInfer copies the ends to the host to plan: it gets them there, and the pages where the kernel reads them.
        for window, wrapper in self._wrappers.items():
            wrapper.plan(
                torch.from_numpy(indptr),
                torch.from_numpy(indices).to(device),
                torch.from_numpy(last),
                shape.queries_per_group,
                1,
                shape.head_dim,
                size,
                window_left=window - 1 if window else -1,
                q_data_type=shape.torch_dtype,
                kv_data_type=shape.torch_dtype,
                sm_scale=shape.scale,
                disable_split_kv=self._is_reproducible,
            )

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        self._pool.store(layer, self._slots, qkv[:, -2], qkv[:, -1])
        pages_k, pages_v = self._pool.k[layer], self._pool.v[layer]
        wrapper = self._wrappers[self._pool.shape.windows[layer]]
        out: torch.Tensor = wrapper.run(qkv[:, :-2].contiguous(), (pages_k[:, :, None], pages_v[:, :, None]))
        return out


def flashinfer_runs(pool: PagePool) -> bool:
    """Whether FlashInfer is installed and has kernels for the pool's device, dtype and head size."""
    shape, device = pool.shape, pool.k.device
    if device.type != "cuda" or shape.head_dim not in HEAD_DIMS or not find_spec("flashinfer"):
        return False
    least = {"float16": LEAST_CAPABILITY, "bfloat16": LEAST_CAPABILITY_BFLOAT16}.get(shape.dtype)
    return least is not None and torch.cuda.get_device_capability(device) >= least
