"""The backends of paged attention, and the choice of one for a device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hetis.runtime.attention.paged_torch import Bucket, attend_paged, each_position, plan_buckets
from hetis.runtime.kv.pool import IntArray, PagePool

Array = npt.NDArray[Any]
LEAST_CHUNK = 16  # positions of a sequence in a step; torch's matrix products are faster from this number on
TRITON_CAPABILITY = (7, 5)  # minimum that Triton compiles for; older devices compute in plain torch


class Backend(Protocol):
    """Stores new positions and attends over the pages of one pool."""

    name: str

    def plan(self, rows: IntArray, positions: IntArray, counts: IntArray | None = None) -> None:
        """Set the sequences of the next calls and the positions that they write.

        Args:
            rows: of the pool's table, shape [N].
            positions: first position that each sequence writes, shape [N].
            counts: how many positions each sequence writes, shape [N]. None: 1 each.
        """

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Store keys and values of qkv [T, r + 2, d] as `AttentionDevice.attend` does, and return outputs [T, r, d]."""


class TorchBackend:
    """Plain torch, for any device and dtype."""

    name = "torch"

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._buckets: list[Bucket] = []

    def plan(self, rows: IntArray, positions: IntArray, counts: IntArray | None = None) -> None:
        if counts is None:
            counts = np.ones_like(rows)
        self._slots = self._pool.slots(*each_position(rows, positions, counts))
        self._buckets = plan_buckets(self._pool, rows, positions, np.cumsum(counts) - counts, counts)

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        self._pool.store(layer, self._slots, qkv[:, -2], qkv[:, -1])
        out = torch.empty_like(qkv[:, :-2], memory_format=torch.contiguous_format)
        attend_paged(self._pool, layer, qkv[:, :-2], self._buckets, out)
        return out


class CompiledBackend:
    """Compiled by numba, for CPU memory with float32, float64 or bfloat16.

    Chunks of at least `LEAST_CHUNK` positions go to torch, whose matrix products are two to three times as fast there
    as computing row by row.
    """

    name = "compiled"

    def __init__(self, pool: PagePool) -> None:
        from hetis.runtime.attention import paged_compiled

        shape = pool.shape
        self._pool, self._dtype = pool, shape.torch_dtype
        self._is_bfloat16 = shape.dtype == "bfloat16"
        self._kernel = paged_compiled.attend_bfloat16 if self._is_bfloat16 else paged_compiled.attend
        self._k, self._v = list(self._array(pool.k)), list(self._array(pool.v))
        self._rows = self._positions = np.zeros(0, np.int64)
        self._starts = self._ends = self._rows
        self._chunks: _Chunks | None = None

    def plan(self, rows: IntArray, positions: IntArray, counts: IntArray | None = None) -> None:
        starts = np.arange(len(rows)) if counts is None else np.cumsum(counts) - counts
        self._chunks = None
        if counts is not None and int(counts.max(initial=0)) >= LEAST_CHUNK:
            many = counts >= LEAST_CHUNK
            self._chunks = _Chunks.of(self._pool, rows[many], positions[many], starts[many], counts[many])
            rows, positions, starts, counts = rows[~many], positions[~many], starts[~many], counts[~many]
        self._rows, self._positions, self._starts = rows, positions, starts
        self._ends = starts + (1 if counts is None else counts)

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.attend_array(layer, self._array(qkv.contiguous()))).view(self._dtype)

    def attend_array(self, layer: int, qkv: Array) -> Array:
        """Like `attend`, for a numpy array, with bfloat16 as its words, so that what a channel brings need not become a
        tensor.
        """
        count, heads, d = qkv.shape
        out = np.empty((count, heads - 2, d), qkv.dtype)
        shape = self._pool.shape
        where = self._pool.table, self._rows, self._positions, self._starts, self._ends
        self._kernel(
            qkv, self._k[layer], self._v[layer], *where, shape.windows[layer], shape.scale, shape.soft_cap, out
        )
        if self._chunks is not None:
            self._chunks.attend(self._pool, layer, *(torch.from_numpy(x).view(self._dtype) for x in (qkv, out)))
        return out

    def _array(self, tensor: torch.Tensor) -> Array:
        array: Array = (tensor.view(torch.uint16) if self._is_bfloat16 else tensor).numpy()
        return array


def choose_backend(pool: PagePool) -> Backend:
    """Return the fastest installed backend that supports the pool's device and dtype."""
    device, dtype = pool.k.device, pool.shape.dtype
    if device.type == "cpu" and dtype != "float16" and find_spec("numba"):
        return CompiledBackend(pool)
    if device.type == "cuda" and dtype != "float64" and find_spec("triton") and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability >= TRITON_CAPABILITY:
            from hetis.runtime.attention.paged_triton import TritonBackend

            return TritonBackend(pool, capability=capability)
    return TorchBackend(pool)


class _Chunks(NamedTuple):
    """The sequences of a step that torch computes: their rows, int64 [n], their slots, and how they are read."""

    members: torch.Tensor
    slots: torch.Tensor
    buckets: list[Bucket]

    @classmethod
    def of(cls, pool: PagePool, rows: IntArray, positions: IntArray, starts: IntArray, counts: IntArray) -> _Chunks:
        _, members = each_position(rows, starts, counts)
        slots = pool.slots(*each_position(rows, positions, counts))
        return cls(torch.from_numpy(members), slots, plan_buckets(pool, rows, positions, starts, counts))

    def attend(self, pool: PagePool, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        """Store keys and values of the members of qkv [T, r + 2, d], and write their outputs to out [T, r, d]."""
        own = qkv[self.members, -2:]
        pool.store(layer, self.slots, own[:, 0], own[:, 1])
        attend_paged(pool, layer, qkv[:, :-2], self.buckets, out)
