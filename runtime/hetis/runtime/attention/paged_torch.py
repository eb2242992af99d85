"""Attention over pages in plain torch: any device, any dtype. Long and short sequences are computed apart.

Gathers each sequence's pages into a rectangle that is as wide as the longest of its bucket. Buckets end at powers of
two of pages, so that padding less than doubles what is gathered. A chunk's queries are computed in pieces: keys and
values are stored before, so that a piece is a sequence of its own, and masks stay small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from hetis.runtime.kv.pool import IntArray, PagePool

PIECE_TOKENS = 128  # queries of a piece
MOST_SCORES = 1 << 24  # of one bucket and query head: the mask has so many bytes


class Bucket(NamedTuple):
    """Pieces that are computed together, n of at most c queries each, all layers of a step alike; on the pool's device.

    Attributes:
        members: their rows of the step, int64 [n, c]; a piece of fewer repeats its last.
        table: their pages, int64 [n, pages of the longest].
        seen: by window, which slots each attends to, bool [n, c, slots].
    """

    members: torch.Tensor
    table: torch.Tensor
    seen: Mapping[int, torch.Tensor]


class _Pieces(NamedTuple):
    """Queries of one sequence each: ``rows`` of the pool's table, first positions, counts, first rows; each [n]."""

    rows: IntArray
    positions: IntArray
    counts: IntArray
    starts: IntArray

    def of(self, which: IntArray) -> _Pieces:
        return _Pieces(*(column[which] for column in self))


def plan_buckets(pool: PagePool, rows: IntArray, positions: IntArray, counts: IntArray) -> list[Bucket]:
    """For sequences in ``rows`` of the pool's table that write ``counts`` positions from ``positions`` on, all [N]."""
    pieces = _cut(rows, positions, counts)
    pages = (pieces.positions + pieces.counts - 1) // pool.shape.page_tokens + 1
    # Pieces of very different width, and of one query or many, are computed apart.
    kinds = 64 * np.ceil(np.log2(pages)).astype(np.int64) + np.ceil(np.log2(pieces.counts)).astype(np.int64)
    found = []
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        widest, longest = int(pages[members].max()), int(pieces.counts[members].max())
        most = max(1, MOST_SCORES // (widest * pool.shape.page_tokens * longest))
        found += [
            _bucket(pool, pieces.of(members[i : i + most]), widest=widest, longest=longest)
            for i in range(0, len(members), most)
        ]
    return found


def attend_paged(pool: PagePool, layer: int, q: torch.Tensor, buckets: Sequence[Bucket]) -> torch.Tensor:
    """Outputs [T, r, d] for queries of the same shape."""
    shape = pool.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for members, table, seen in buckets:
        k = pool.k[layer][table].flatten(1, 2)[:, None]  # [n, 1, slots, d]
        v = pool.v[layer][table].flatten(1, 2)[:, None]
        mask = seen[shape.windows[layer]][:, None]
        queries = q[members].transpose(1, 2)  # [n, r, c, d]
        if members.shape[1] == 1:
            # All query heads see the same slots: as many queries of one head, which reads K and V once.
            queries = queries.transpose(1, 2)
            outputs = _attend(queries, k, v, mask, shape.scale, shape.soft_cap)
        else:
            k, v = (x.expand(-1, queries.shape[1], -1, -1) for x in (k, v))
            outputs = _attend(queries, k, v, mask, shape.scale, shape.soft_cap).transpose(1, 2)
        out[members] = outputs
    return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, soft_cap: float
) -> torch.Tensor:
    """Attention of q [n, heads, c, d] over k and v [n, heads, slots, d]."""
    if not soft_cap:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = soft_cap * torch.tanh(q.to(wide) @ k.to(wide).mT * (scale / soft_cap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ v.to(wide)).to(q.dtype)


def _cut(rows: IntArray, positions: IntArray, counts: IntArray) -> _Pieces:
    """The sequences' chunks in pieces."""
    starts = np.cumsum(counts) - counts
    if not len(counts) or int(counts.max()) <= PIECE_TOKENS:
        return _Pieces(rows, positions, counts, starts)
    cuts = -(-counts // PIECE_TOKENS)
    within = PIECE_TOKENS * (np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts))
    left = np.repeat(counts, cuts) - within
    return _Pieces(
        np.repeat(rows, cuts),
        np.repeat(positions, cuts) + within,
        np.minimum(left, PIECE_TOKENS),
        np.repeat(starts, cuts) + within,
    )


def _bucket(pool: PagePool, pieces: _Pieces, *, widest: int, longest: int) -> Bucket:
    shape, device = pool.shape, pool.k.device
    within = np.minimum(np.arange(longest), pieces.counts[:, None] - 1)  # [n, c]
    at = torch.from_numpy(pieces.positions[:, None] + within).to(device)[..., None]
    slots = torch.arange(widest * shape.page_tokens, device=device)
    before = slots <= at
    return Bucket(
        members=torch.from_numpy(pieces.starts[:, None] + within).to(device),
        table=torch.from_numpy(pool.table[pieces.rows, :widest].astype(np.int64)).to(device),
        seen={w: before & (slots > at - w) if w else before for w in set(shape.windows)},
    )
