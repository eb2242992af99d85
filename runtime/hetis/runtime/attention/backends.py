"""Backends of paged attention, and which one a device uses."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from hetis.runtime.attention.paged_torch import attend_paged
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
        self._rows = self._positions = np.zeros(0, np.int64)
        self._slots = torch.zeros(0, dtype=torch.int64)

    def plan(self, rows: IntArray, positions: IntArray) -> None:
        size = self._pool.shape.page_tokens
        slots = self._pool.table[rows, positions // size].astype(np.int64) * size + positions % size
        self._slots = torch.from_numpy(slots).to(self._pool.k.device)
        self._rows, self._positions = rows, positions

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self._pool.k[layer].flatten(0, 1)[self._slots] = k
        self._pool.v[layer].flatten(0, 1)[self._slots] = v
        return attend_paged(self._pool, layer, q, self._rows, self._positions)


def choose_backend(pool: PagePool) -> Backend:
    """The fastest that the pool's device and dtype allow."""
    return TorchBackend(pool)
