"""Attention of prompt chunks, on the primary for all heads: weak cards prefill badly.

The KV of a prompt under way is kept in one piece per request, all heads together, until the last chunk is through;
chunk by chunk it is shipped to the devices where the heads will live.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from hetis.runtime.kv.shape import KvShape

PIECE_TOKENS = 256  # queries that share a mask; fewer are slower again


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

    def attend(self, layer: int, first: int, qkv: torch.Tensor) -> torch.Tensor:
        """Stores a chunk's keys and values at positions ``first`` on, and attends to all up to each query.

        Args:
            qkv: heads of T tokens' queries, then keys, then values, shape [T, heads * r + 2 heads, d].

        Returns:
            Outputs of shape [T, heads * r * d].
        """
        heads, tokens, window = self.k.shape[1], len(qkv), self.shape.windows[layer]
        q, k, v = qkv.split((heads * self.shape.queries_per_group, heads, heads), dim=1)
        self.k[layer, :, first : first + tokens] = k.transpose(0, 1)
        self.v[layer, :, first : first + tokens] = v.transpose(0, 1)
        # Masks are dense: what is masked is computed, so that a piece is not given the keys of those that follow.
        size = tokens if _is_causal(first, tokens, window) else PIECE_TOKENS
        pieces = [self._attend_piece(layer, first + i, q[i : i + size]) for i in range(0, tokens, size)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _attend_piece(self, layer: int, first: int, q: torch.Tensor) -> torch.Tensor:
        """Outputs [T, heads * r * d] of T queries."""
        shape, tokens = self.shape, len(q)
        heads, r, d = self.k.shape[1], shape.queries_per_group, shape.head_dim
        window, last = shape.windows[layer], first + tokens
        begin = max(first + 1 - window, 0) if window else 0
        mask = None
        if not _is_causal(first, tokens, window):
            at = torch.arange(first, last, device=q.device)[:, None]
            slots = torch.arange(begin, last, device=q.device)
            mask = slots <= at
            if window:
                mask &= slots > at - window
        keys, values = (x[layer, :, None, begin:last].expand(heads, r, last - begin, d) for x in (self.k, self.v))
        queries = q.view(tokens, heads, r, d).permute(1, 2, 0, 3)
        out = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=shape.scale
        )
        return out.permute(2, 0, 1, 3).reshape(tokens, -1)


def _is_causal(first: int, tokens: int, window: int) -> bool:
    """Whether queries attend to no other keys than those of their own piece, all up to their own."""
    return not first and not (window and tokens > window)
