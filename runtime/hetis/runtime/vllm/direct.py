"""Attention of a sequence over its own tokens alone: for prompts that lose their worker in the middle of a step."""

from __future__ import annotations

import torch

from hetis.runtime.kv.shape import KvShape


def attend_directly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: KvShape, layer: int) -> torch.Tensor:
    """Causal attention of a whole sequence, computed in float32.

    Args:
        q: queries of one head group, shape [tokens, r, d].
        k, v: its keys and values, shape [tokens, d].
        shape: has the scale, the soft cap, and the window of ``layer``.

    Returns:
        Outputs, shape [tokens, r, d], float32.
    """
    tokens = len(k)
    scores = torch.einsum("trd,sd->rts", q.float(), k.float()) * shape.scale
    if shape.soft_cap:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    at = torch.arange(tokens, device=q.device)
    distance = at[:, None] - at[None, :]
    seen = distance >= 0
    if window := shape.windows[layer]:
        seen &= distance < window
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.einsum("rts,sd->trd", weights, v.float())
