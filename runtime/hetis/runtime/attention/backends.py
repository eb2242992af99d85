"""Backends of paged attention, and which one a device uses."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch

from hetis.runtime.attention.paged_flashinfer import FlashInferBackend, flashinfer_runs
from hetis.runtime.attention.paged_torch import Bucket, attend_paged, plan_buckets
from hetis.runtime.kv.pool import IntArray, PagePool


class Backend(Protocol):
    """Stores new positions and attends over the pages of one pool."""

    name: str

    def plan(self, rows: IntArray, positions: IntArray) -> None:
        """Says which sequences (rows of the pool's table) the next calls are about, and where they write, both [N]."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `AttentionDevice.attend`: stores k and v [N, d], returns outputs [N, r, d] for q [N, r, d]."""


class TorchBackend:
    """Plain torch: any device, any dtype."""

    name = "torch"

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._buckets: list[Bucket] = []

    def plan(self, rows: IntArray, positions: IntArray) -> None:
        size = self._pool.shape.page_tokens
        slots = self._pool.table[rows, positions // size].astype(np.int64) * size + positions % size
        self._slots = torch.from_numpy(slots).to(self._pool.k.device)
        self._buckets = plan_buckets(self._pool, rows, positions)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self._pool.k[layer].flatten(0, 1)[self._slots] = k
        self._pool.v[layer].flatten(0, 1)[self._slots] = v
        return attend_paged(self._pool, layer, q, self._buckets)


class CompiledBackend:
    """Compiled by numba: CPU memory; float32, float64 and bfloat16."""

    name = "compiled"

    def __init__(self, pool: PagePool) -> None:
        from hetis.runtime.attention import paged_compiled

        self._kernels = paged_compiled
        self._pool, self._is_narrow = pool, pool.shape.dtype == "bfloat16"
        # numpy has no bfloat16: its words are handed over instead.
        k, v = (x.view(torch.uint16) if self._is_narrow else x for x in (pool.k, pool.v))
        self._k, self._v = list(k.numpy()), list(v.numpy())
        self._rows = self._positions = np.zeros(0, np.int64)

    def plan(self, rows: IntArray, positions: IntArray) -> None:
        self._rows, self._positions = rows, positions

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kernels, shape = self._kernels, self._pool.shape
        q = q.contiguous()
        k, v = k.contiguous(), v.contiguous()
        where = self._pool.table, self._rows, self._positions
        if not self._is_narrow:
            out = torch.empty_like(q)
            kernels.store(self._k[layer], self._v[layer], k.numpy(), v.numpy(), *where)
            window, scale = shape.windows[layer], shape.scale
            kernels.attend(q.numpy(), self._k[layer], self._v[layer], *where, window, scale, out.numpy())
            return out
        words = (x.view(torch.uint16).numpy() for x in (k, v))
        kernels.store(self._k[layer], self._v[layer], *words, *where)
        queries = q.float()
        wide = torch.empty_like(queries)
        window, scale = shape.windows[layer], shape.scale
        kernels.attend_bfloat16(queries.numpy(), self._k[layer], self._v[layer], *where, window, scale, wide.numpy())
        return wide.to(q.dtype)


def choose_backend(pool: PagePool) -> Backend:
    """The fastest that the pool's device and dtype allow."""
    if pool.k.device.type == "cpu" and pool.shape.dtype != "float16" and find_spec("numba"):
        return CompiledBackend(pool)
    if flashinfer_runs(pool):
        return FlashInferBackend(pool)
    return TorchBackend(pool)
