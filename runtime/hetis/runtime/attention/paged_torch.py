"""Attention over pages in plain torch: any device, any dtype. Long and short sequences are computed apart.

Gathers each sequence's pages into a rectangle that is as wide as the longest of its bucket. Buckets end at powers of
two of pages, so that padding less than doubles what is gathered.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from hetis.runtime.kv.pool import IntArray, PagePool


def attend_paged(pool: PagePool, layer: int, q: torch.Tensor, rows: IntArray, positions: IntArray) -> torch.Tensor:
    """Outputs of N virtual sequences, shape [N, r, d], for queries of the same shape at ``positions``."""
    shape = pool.shape
    out = torch.empty_like(q)
    pages = positions // shape.page_tokens + 1
    buckets = np.ceil(np.log2(pages)).astype(np.int64)
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        index = torch.from_numpy(members).to(q.device)
        out[index] = _attend_bucket(pool, layer, q[index], rows[members], positions[members])
    return out


def _attend_bucket(pool: PagePool, layer: int, q: torch.Tensor, rows: IntArray, positions: IntArray) -> torch.Tensor:
    shape, device = pool.shape, q.device
    widest = int(positions.max()) // shape.page_tokens + 1
    table = torch.from_numpy(pool.table[rows, :widest].astype(np.int64)).to(device)
    k = pool.k[layer][table].flatten(1, 2)  # [n, widest * page_tokens, d]
    v = pool.v[layer][table].flatten(1, 2)
    at = torch.from_numpy(positions).to(device)[:, None]
    slots = torch.arange(k.shape[1], device=device)
    seen = slots <= at
    window = shape.windows[layer]
    if window:
        seen &= slots > at - window
    out: torch.Tensor = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=shape.scale)
    return out
