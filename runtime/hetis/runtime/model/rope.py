"""Rotary positions, as the models were trained with them: in float32, halves of a head paired."""

from __future__ import annotations

import math

import torch

from hetis.runtime.model.config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, each of shape [tokens, head_dim / 2]."""
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), _frequencies(rope, head_dim))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates heads [T, heads, d] by the angles of their tokens, cos and sin [T, d / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per token of every pair, shape [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies: torch.Tensor = 1.0 / (rope.theta**exponents)
    if rope.factor == 1.0:
        return frequencies
    # Llama 3: waves longer than the first context are slowed, short ones are left, between them the two are mixed.
    waves = 2 * math.pi / frequencies
    longest, shortest = rope.original_tokens / rope.low_freq_factor, rope.original_tokens / rope.high_freq_factor
    share = (rope.original_tokens / waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed = (1 - share) * frequencies / rope.factor + share * frequencies
    slowed = torch.where(waves > longest, frequencies / rope.factor, frequencies)
    return torch.where((waves <= longest) & (waves >= shortest), mixed, slowed)
