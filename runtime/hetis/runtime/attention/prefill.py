"""Attention of prompt chunks, on the primary for all heads: weak cards prefill badly.

The KV of a prompt under way is kept in one piece per request, all heads together, until the last chunk is through;
chunk by chunk it is shipped to the devices where the heads will live.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from hetis.runtime.kv.shape import KvShape


class PromptKv:
    """K and V of one prompt while it is prefilled, all KV heads.

    Attributes:
        k: shape [layers, heads, tokens, d].
        v: the same.
    """

    def __init__(self, shape: KvShape, heads: int, tokens: int, device: str) -> None:
        self.shape = shape
        size = (shape.layers, heads, tokens, shape.head_dim)
        self.k = torch.empty(size, dtype=shape.torch_dtype, device=device)
        self.v = torch.empty(size, dtype=shape.torch_dtype, device=device)

    def attend(self, layer: int, first: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores a chunk's keys and values at positions ``first`` on, and attends to all up to each query.

        Args:
            q: shape [T, heads * r, d].
            k, v: shape [T, heads, d].

        Returns:
            Outputs of shape [T, heads * r * d].
        """
        shape, tokens, heads = self.shape, len(q), k.shape[1]
        last = first + tokens
        self.k[layer, :, first:last] = k.transpose(0, 1)
        self.v[layer, :, first:last] = v.transpose(0, 1)
        window = shape.windows[layer]
        begin = max(first + 1 - window, 0) if window else 0
        r = shape.queries_per_group
        queries = q.view(tokens, heads, r, shape.head_dim).permute(1, 2, 0, 3)
        keys, values = (
            x[layer, :, None, begin:last].expand(heads, r, last - begin, shape.head_dim) for x in (self.k, self.v)
        )
        mask = None
        if first or (window and tokens > window):
            at = torch.arange(first, last, device=q.device)[:, None]
            slots = torch.arange(begin, last, device=q.device)
            mask = slots <= at
            if window:
                mask &= slots > at - window
        out = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=shape.scale
        )
        return out.permute(2, 0, 1, 3).reshape(tokens, -1)
