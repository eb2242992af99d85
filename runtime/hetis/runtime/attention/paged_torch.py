"""Attention over pages in plain torch: any device, any dtype. Long and short sequences are computed apart.

Gathers each sequence's pages into a rectangle that is as wide as the longest of its bucket. Buckets end at powers of
two of pages, so that padding less than doubles what is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from hetis.runtime.kv.pool import IntArray, PagePool


class Bucket(NamedTuple):
    """Sequences that are computed together, n of N, all layers of a step alike; on the pool's device.

    Attributes:
        members: which they are, int64 [n].
        table: their pages, int64 [n, pages of the longest].
        seen: by window, which slots each attends to, bool [n, 1, slots].
    """

    members: torch.Tensor
    table: torch.Tensor
    seen: Mapping[int, torch.Tensor]


def plan_buckets(pool: PagePool, rows: IntArray, positions: IntArray) -> list[Bucket]:
    """For sequences in ``rows`` of the pool's table, at ``positions``, both [N]; moved to the device once per step."""
    pages = positions // pool.shape.page_tokens + 1
    buckets = np.ceil(np.log2(pages)).astype(np.int64)
    found = []
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        found.append(_bucket(pool, members, rows[members], positions[members], widest=int(pages[members].max())))
    return found


def attend_paged(pool: PagePool, layer: int, q: torch.Tensor, buckets: Sequence[Bucket]) -> torch.Tensor:
    """Outputs of N virtual sequences, shape [N, r, d], for queries of the same shape."""
    shape = pool.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for members, table, seen in buckets:
        k = pool.k[layer][table].flatten(1, 2)  # [n, slots, d]
        v = pool.v[layer][table].flatten(1, 2)
        mask = seen[shape.windows[layer]]
        out[members] = functional.scaled_dot_product_attention(q[members], k, v, attn_mask=mask, scale=shape.scale)
    return out


def _bucket(pool: PagePool, members: IntArray, rows: IntArray, positions: IntArray, *, widest: int) -> Bucket:
    shape, device = pool.shape, pool.k.device
    at = torch.from_numpy(positions).to(device)[:, None]
    slots = torch.arange(widest * shape.page_tokens, device=device)
    before = slots <= at
    return Bucket(
        members=torch.from_numpy(members).to(device),
        table=torch.from_numpy(pool.table[rows, :widest].astype(np.int64)).to(device),
        seen={w: (before & (slots > at - w) if w else before)[:, None] for w in set(shape.windows)},
    )
