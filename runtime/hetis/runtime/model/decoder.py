"""The layers of a stage without their attention: what the primary computes.

    hidden = embed(tokens, positions)
    for layer:  q, k, v = project(layer, hidden, positions);  hidden = finish(layer, hidden, attention(q, k, v))
    logits = output(hidden)

T tokens of any requests are T rows: nothing here knows which row belongs to whom.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from hetis.runtime.model.config import ModelConfig, read_config
from hetis.runtime.model.linear import Linear, PackedLinear
from hetis.runtime.model.rope import rope_table
from hetis.runtime.model.rowwise import choose_rowwise, layer_norm
from hetis.runtime.model.weights import Norm, Shard, Weights, load_weights

Reduce = Callable[[torch.Tensor], torch.Tensor]


class Positions(NamedTuple):
    """Positions of T tokens, and the angles they are rotated by (None where positions are learned)."""

    tokens: torch.Tensor  # int64 [T]
    cos: torch.Tensor | None  # [T, d / 2]
    sin: torch.Tensor | None


class Decoder:
    """Layers of one model on one device.

    Attributes:
        config: of the whole model.
        layers: which of them are here.
        shard: this rank's share of every layer.
        q_heads, kv_heads: of this rank.
        dtype, device: of weights and results.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        layers: range,
        shard: Shard,
        dtype: torch.dtype,
        device: str = "cpu",
        max_tokens: int | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        """``reduce`` sums a partial result over the ranks of ``shard``; it is needed where there are several."""
        self.config, self.weights, self.layers, self.shard = config, weights, layers, shard
        self.dtype, self.device = dtype, device
        self.q_heads = config.q_heads // shard.size
        self.kv_heads = len(shard.kv_heads(config))
        self._reduce = reduce
        self._rowwise = choose_rowwise(device, dtype)
        self._rope = None
        if config.rope is not None:
            cos, sin = rope_table(config.rope, config.head_dim, max_tokens or config.max_tokens, dtype)
            self._rope = cos.to(device), sin.to(device)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        layers: range | None = None,
        shard: Shard | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        max_tokens: int | None = None,
        reduce: Reduce | None = None,
    ) -> Decoder:
        """Reads config and weights; of the weights only those of ``layers`` and ``shard``. Raises ModelError."""
        config = read_config(folder)
        layers, shard = layers or range(config.layers), shard or Shard()
        torch_dtype = getattr(torch, dtype or config.dtype)
        weights = load_weights(folder, config, layers=layers, shard=shard, dtype=torch_dtype, device=device)
        return cls(
            config,
            weights,
            layers=layers,
            shard=shard,
            dtype=torch_dtype,
            device=device,
            max_tokens=max_tokens,
            reduce=reduce,
        )

    def positions(self, positions: torch.Tensor) -> Positions:
        """Looked up once per step for all layers; ``positions`` is int64 [T]."""
        if self._rope is None:
            return Positions(positions, None, None)
        return Positions(positions, self._rope[0][positions], self._rope[1][positions])

    def embed(self, tokens: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Hidden states [T, hidden] of token ids [T]; of the first stage."""
        assert self.weights.embedding is not None, "not the first stage"
        hidden: torch.Tensor = self.weights.embedding[tokens]
        if self.weights.positions is not None:
            hidden = hidden + self.weights.positions[positions.tokens]
        return hidden

    def project(
        self, layer: int, hidden: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, q_heads, d], keys and values [T, kv_heads, d] of the layer, rotated."""
        weights, d = self.weights.layers[layer], self.config.head_dim
        mixed = weights.qkv(self._norm(hidden, weights.norm1)).view(len(hidden), -1, d)
        both = self.q_heads + self.kv_heads
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k, v = mixed.split((self.q_heads, self.kv_heads, self.kv_heads), dim=1)
            q, k = self._rms(q.contiguous(), weights.q_norm), self._rms(k.contiguous(), weights.k_norm)
            mixed = torch.cat((q, k, v), dim=1)
        if positions.cos is not None and positions.sin is not None:
            mixed = self._rowwise.rotate(mixed, both, positions.cos, positions.sin)
        return mixed[:, : self.q_heads], mixed[:, self.q_heads : both], mixed[:, both:]

    def finish(self, layer: int, hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer, from those before it and attention's outputs [T, q_heads * d].

        ``hidden`` may be overwritten.
        """
        weights = self.weights.layers[layer]
        hidden = self._add(hidden, weights.o, attention)
        up = weights.up(self._norm(hidden, weights.norm2))
        if self.config.family == "opt":
            middle = functional.relu_(up)
        else:
            gate, up = up.chunk(2, dim=-1)
            middle = functional.silu(gate).mul_(up)
        return self._add(hidden, weights.down, middle)

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocab] of hidden states [T, hidden]; of the last stage."""
        assert self.weights.norm is not None, "not the last stage"
        assert self.weights.output is not None, "not the last stage"
        return self.weights.output(self._norm(hidden, self.weights.norm))

    # --- inside

    def _add(self, hidden: torch.Tensor, linear: Linear | PackedLinear, x: torch.Tensor) -> torch.Tensor:
        if self._reduce is None:
            return linear.plus(x, hidden)
        return hidden + self._reduce(linear(x))

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        if norm.bias is not None:
            return layer_norm(x, norm.weight, norm.bias, self.config.eps)
        return self._rms(x, norm.weight)

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._rowwise.rms_norm(x, weight, self.config.eps)
