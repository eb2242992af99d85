"""The layers of a stage without their attention: what the primary computes.

    hidden = embed(tokens, positions)
    for layer:  qkv = project(layer, hidden, positions);  hidden = finish(layer, hidden, attention(qkv))
    logits = output(hidden)

T tokens of any requests are T rows: nothing here knows which row belongs to whom.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from hetis.runtime.model.config import ModelConfig, read_config
from hetis.runtime.model.rope import rope_table
from hetis.runtime.model.rowwise import choose_rowwise, layer_norm
from hetis.runtime.model.shard import Shard
from hetis.runtime.model.weights import Norm, Weights, load_weights


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
    ) -> None:
        self.config, self.weights, self.layers, self.shard = config, weights, layers, shard
        self.dtype, self.device = dtype, device
        self.q_heads = config.q_heads // shard.size
        self.kv_heads = len(shard.kv_heads(config))
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
        )

    def positions(self, positions: torch.Tensor) -> Positions:
        """Looked up once per step for all layers; ``positions`` is int64 [T]."""
        if self._rope is None:
            return Positions(positions, None, None)
        return Positions(positions, self._rope[0][positions], self._rope[1][positions])

    def embed(self, tokens: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Hidden states [T, hidden] of token ids [T]; of the first stage.

        Of a shard of the vocabulary they are 0 for the other tokens, so that the ranks' sum is right.
        """
        table, first = self.weights.embedding, self.weights.first_token
        assert table is not None, "not the first stage"
        if len(table) == self.config.vocab:
            hidden = table[tokens]
        else:
            is_here = (tokens >= first) & (tokens < first + len(table))
            hidden = table[torch.where(is_here, tokens - first, 0)] * is_here[:, None]
        if self.weights.positions is not None:
            hidden = hidden + self.weights.positions[positions.tokens]
        return hidden

    def project(self, layer: int, hidden: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Heads of the layer's queries, then its keys, then its values: [T, q_heads + 2 kv_heads, d], rotated."""
        weights, d = self.weights.layers[layer], self.config.head_dim
        mixed = weights.qkv(self._norm(hidden, weights.norm1)).view(len(hidden), -1, d)
        both = self.q_heads + self.kv_heads
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k, v = mixed.split((self.q_heads, self.kv_heads, self.kv_heads), dim=1)
            q, k = self._rms(q.contiguous(), weights.q_norm), self._rms(k.contiguous(), weights.k_norm)
            mixed = torch.cat((q, k, v), dim=1)
        if positions.cos is not None and positions.sin is not None:
            mixed = self._rowwise.rotate(mixed, both, positions.cos, positions.sin)
        return mixed

    def finish(self, layer: int, hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer, from those before it and attention's outputs [T, q_heads * d].

        ``hidden`` may be overwritten. Of one rank alone; several need their sums in between (`attended`, `mlp`).
        """
        weights = self.weights.layers[layer]
        hidden = weights.o.plus(attention, hidden)
        return weights.down.plus(self._middle(layer, hidden), hidden)

    def attended(self, layer: int, attention: torch.Tensor) -> torch.Tensor:
        """This rank's part of what attention's outputs [T, q_heads * d] add to the hidden states [T, hidden]."""
        return self.weights.layers[layer].o(attention)

    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's part of what the MLP adds to the hidden states [T, hidden], attention's sum among them."""
        return self.weights.layers[layer].down(self._middle(layer, hidden))

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocab], or this rank's part of them, of hidden states [T, hidden]; of the last stage."""
        assert self.weights.norm is not None, "not the last stage"
        assert self.weights.output is not None, "not the last stage"
        return self.weights.output(self._norm(hidden, self.weights.norm))

    # --- inside

    def _middle(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        weights = self.weights.layers[layer]
        up = weights.up(self._norm(hidden, weights.norm2))
        if self.config.family == "opt":
            return functional.relu_(up)
        gate, up = up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        if norm.bias is not None:
            return layer_norm(x, norm.weight, norm.bias, self.config.eps)
        return self._rms(x, norm.weight)

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._rowwise.rms_norm(x, weight, self.config.eps)
