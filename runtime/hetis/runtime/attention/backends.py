"""The backends of paged attention, and the choice of one for a device; plain torch is here, the others beside it.

Plain torch gathers each sequence's pages into a rectangle as wide as the longest sequence of its bucket. Bucket limits
are powers of two of pages, so padding less than doubles what is gathered. A chunk's queries are computed in pieces:
keys and values are stored first, so each piece is a sequence of its own, and masks stay small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional

from hetis.runtime.attention.kv import Array, IntArray, PagePool

PIECE_TOKENS = 128  # queries per piece
MOST_SCORES = 1 << 24  # limit per bucket and query head: the mask has this many bytes
LEAST_CHUNK = 16  # positions of a sequence in a step; torch's matrix products are faster from this number on
TRITON_CAPABILITY = (7, 5)  # minimum that Triton compiles for; older devices compute in plain torch


class View(NamedTuple):
    """The reads of a bucket's pieces under one window: page numbers [n, pages], and the slots seen [n, c, slots]."""

    table: torch.Tensor
    seen: torch.Tensor


class Bucket(NamedTuple):
    """Pieces computed together, n with at most c queries each, in the same way for all layers; on the pool's device."""

    members: torch.Tensor  # row in the step of each query, int64 [n, c]; a piece with fewer queries repeats its last
    views: Mapping[int, View]  # keyed by window


class _Pieces(NamedTuple):
    """Queries of one sequence each: ``rows`` of the pool's table, first positions, first rows, counts; each [n]."""

    rows: IntArray
    positions: IntArray
    starts: IntArray
    counts: IntArray

    def of(self, which: IntArray) -> _Pieces:
        return _Pieces(*(column[which] for column in self))


def plan_buckets(
    pool: PagePool, rows: IntArray, positions: IntArray, starts: IntArray, counts: IntArray
) -> list[Bucket]:
    """Plan buckets for sequences whose rows of the step begin at ``starts``.

    Args:
        rows: rows of the pool's table, shape [N].
        positions: first position that each sequence writes, shape [N].
        starts: first row of each sequence in the step, shape [N].
        counts: how many positions each sequence writes, shape [N].
    """
    pieces = _cut(_Pieces(rows, positions, starts, counts))
    pages = (pieces.positions + pieces.counts - 1) // pool.shape.page_tokens + 1
    # Pieces of very different width, and pieces with one query or many, are computed separately.
    kinds = 64 * np.ceil(np.log2(pages)).astype(np.int64) + np.ceil(np.log2(pieces.counts)).astype(np.int64)
    found = []
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        slots = int(pages[members].max()) * pool.shape.page_tokens
        most = max(1, MOST_SCORES // (slots * int(pieces.counts[members].max())))
        found += [_bucket(pool, pieces.of(members[i : i + most])) for i in range(0, len(members), most)]
    return found


def each_position(rows: IntArray, positions: IntArray, counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return, for every written position, the entry of ``rows`` of its sequence and the position itself; each [T]."""
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(rows, counts), np.repeat(positions, counts) + within


def attend_paged(pool: PagePool, layer: int, q: torch.Tensor, buckets: Sequence[Bucket], out: torch.Tensor) -> None:
    """Write the outputs of the buckets' members to out [T, r, d], for queries of the same shape."""
    shape = pool.shape
    for members, views in buckets:
        table, seen = views[shape.windows[layer]]
        k = pool.k[layer][table].flatten(1, 2)[:, None]  # [n, 1, slots, d]
        v = pool.v[layer][table].flatten(1, 2)[:, None]
        queries = q[members]  # [n, c, r, d]
        if members.shape[1] == 1:
            # All query heads see the same slots: treat them as queries of one head, which reads K and V once.
            outputs = _attend(queries, k, v, seen[:, None], shape.scale, shape.soft_cap)
        else:
            k, v = (x.expand(-1, shape.queries_per_group, -1, -1) for x in (k, v))
            queries = queries.transpose(1, 2)
            outputs = _attend(queries, k, v, seen[:, None], shape.scale, shape.soft_cap).transpose(1, 2)
        out[members] = outputs


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, soft_cap: float
) -> torch.Tensor:
    """Return attention of q [n, heads, c, d] over k and v [n, heads, slots, d]."""
    if not soft_cap:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = soft_cap * torch.tanh(q.to(wide) @ k.to(wide).mT * (scale / soft_cap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ v.to(wide)).to(q.dtype)


def _cut(whole: _Pieces) -> _Pieces:
    """Cut chunks into pieces."""
    if int(whole.counts.max(initial=0)) <= PIECE_TOKENS:
        return whole
    cuts = -(-whole.counts // PIECE_TOKENS)
    number, within = each_position(np.arange(len(cuts)), np.zeros_like(cuts), cuts)
    pieces, begins = whole.of(number), PIECE_TOKENS * within
    return _Pieces(
        pieces.rows,
        pieces.positions + begins,
        pieces.starts + begins,
        np.minimum(pieces.counts - begins, PIECE_TOKENS),
    )


def _bucket(pool: PagePool, pieces: _Pieces) -> Bucket:
    shape, device = pool.shape, pool.k.device
    within = np.minimum(np.arange(pieces.counts.max()), pieces.counts[:, None] - 1)  # [n, c]
    return Bucket(
        members=torch.from_numpy(pieces.starts[:, None] + within).to(device),
        views={w: _view(pool, pieces, pieces.positions[:, None] + within, w) for w in set(shape.windows)},
    )


def _view(pool: PagePool, pieces: _Pieces, at: IntArray, window: int) -> View:
    """Return what queries at positions ``at`` [n, c] see under a window, from the first page that any of them sees."""
    size, device = pool.shape.page_tokens, pool.k.device
    first = np.maximum(at[:, 0] + 1 - window, 0) // size if window else np.zeros(len(at), np.int64)
    last = at[:, -1] // size
    pages = first[:, None] + np.arange((last - first).max() + 1)
    # Pages beyond a piece's last are masked; they repeat its own last page, so that no NaN of another sequence gets in.
    table = pool.table[pieces.rows[:, None], np.minimum(pages, last[:, None])].astype(np.int64)
    begins, places = (torch.from_numpy(x).to(device) for x in ((first * size)[:, None, None], at[..., None]))
    slots = begins + torch.arange(pages.shape[1] * size, device=device)
    seen = slots <= places
    if window:
        seen &= slots > places - window
    return View(torch.from_numpy(table).to(device), seen)


class Backend(Protocol):
    """Stores new positions and attends over the pages of one pool."""

    name: str

    def plan(self, rows: IntArray, positions: IntArray, counts: IntArray | None = None) -> None:
        """Set the sequences of the next calls and the positions that they write. The arrays may be kept until then.

        Args:
            rows: rows of the pool's table, shape [N].
            positions: first position that each sequence writes, shape [N].
            counts: how many positions each sequence writes, shape [N]. None: 1 each.
        """

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Store keys and values of qkv [T, r + 2, d] as `AttentionDevice.attend` does, and return outputs [T, r, d]."""

    def attend_array(self, layer: int, qkv: Array) -> Array | torch.Tensor:
        """Like `attend`, for an array as a channel receives it. Outputs are in CPU memory."""


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

    def attend_array(self, layer: int, qkv: Array) -> torch.Tensor:
        own = torch.from_numpy(qkv).view(self._pool.shape.torch_dtype)
        return self.attend(layer, own.to(self._pool.k.device)).cpu()


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
            from hetis.runtime.attention.decode_graphs import GraphBackend

            return GraphBackend(pool, capability=capability)
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
