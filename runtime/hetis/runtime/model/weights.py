"""The weights of some layers of a model, or one tensor-parallel rank's share of them, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hetis.runtime.model.checkpoint import Checkpoint
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.model.errors import ModelError
from hetis.runtime.model.linear import Linear, PackedLinear, make_linear
from hetis.runtime.model.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMSNorm without a bias, LayerNorm with one."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer. ``qkv`` makes queries, keys and values in one product; ``up`` makes gate and up (OPT: up alone)."""

    norm1: Norm
    qkv: Linear | PackedLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear | PackedLinear
    norm2: Norm
    up: Linear | PackedLinear
    down: Linear | PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of a stage. Those of the first stage have an embedding, those of the last a norm and an output.

    Embedding and output are of the rank's tokens, from ``first_token`` on; a rank without tokens has neither.
    """

    layers: tuple[LayerWeights, ...]
    embedding: torch.Tensor | None
    positions: torch.Tensor | None
    norm: Norm | None
    output: Linear | PackedLinear | None
    first_token: int
    bytes_read: int


def load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    layers: range | None = None,
    shard: Shard | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Weights:
    """Reads ``layers`` (all), one rank's ``shard`` of them, as ``dtype`` (the checkpoint's).

    Raises:
        ModelError: a tensor is missing or has another shape than config.json says.
    """
    layers = range(config.layers) if layers is None else layers
    shard = shard or Shard()
    shard.check(config)
    if len(layers) == 0 or layers.start < 0 or layers.stop > config.layers:
        raise ModelError(f"layers {layers.start} to {layers.stop - 1} are not of the model's {config.layers}")
    with Checkpoint(folder) as checkpoint:
        reader = _Reader(checkpoint, config, shard, dtype or getattr(torch, config.dtype), device)
        read_layer = reader.opt_layer if config.family == "opt" else reader.llama_layer
        read = tuple(read_layer(i) for i in layers)
        tokens = shard.vocabulary(config)
        is_first, is_last = layers.start == 0, layers.stop == config.layers
        embedding = reader.embedding(tokens) if tokens and (is_first or (is_last and config.tied)) else None
        has_positions = is_first and config.rope is None and shard.rank == 0  # ranks are summed: one adds them
        return Weights(
            layers=read,
            embedding=embedding if is_first else None,
            positions=reader.positions() if has_positions else None,
            norm=reader.last_norm() if is_last else None,
            output=reader.output(embedding, tokens) if is_last and tokens else None,
            first_token=tokens.start if tokens else 0,
            bytes_read=checkpoint.bytes_read,
        )


class _Reader:
    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, shard: Shard, dtype: torch.dtype, device: str
    ) -> None:
        self.checkpoint, self.config, self.shard, self.dtype, self.device = checkpoint, config, shard, dtype, device
        prefixes = ("model.decoder.", "decoder.") if config.family == "opt" else ("model.", "")
        # A folder that was saved without its head has no "model." before its names.
        self.prefix = next((p for p in prefixes if p + "embed_tokens.weight" in checkpoint), prefixes[0])

    def llama_layer(self, i: int) -> LayerWeights:
        config, name = self.config, f"layers.{i}."
        hidden, middle = config.hidden, self.shard.part(config.intermediate)
        gate_up = [f"{name}mlp.{part}_proj" for part in ("gate", "up")]
        sizes = [config.intermediate] * 2
        return LayerWeights(
            norm1=Norm(weight=self.get(f"{name}input_layernorm.weight", hidden)),
            qkv=self.qkv(name + "self_attn."),
            q_norm=self.get(f"{name}self_attn.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm=self.get(f"{name}self_attn.k_norm.weight", config.head_dim) if config.qk_norm else None,
            o=self.columns(f"{name}self_attn.o_proj", self.queries(), config.q_heads * config.head_dim, config.o_bias),
            norm2=Norm(weight=self.get(f"{name}post_attention_layernorm.weight", hidden)),
            up=self.rows(gate_up, [middle, middle], sizes, config.mlp_bias),
            down=self.columns(f"{name}mlp.down_proj", middle, config.intermediate, config.mlp_bias),
        )

    def opt_layer(self, i: int) -> LayerWeights:
        config, name = self.config, f"layers.{i}."
        middle = self.shard.part(config.intermediate)
        return LayerWeights(
            norm1=self.layer_norm(name + "self_attn_layer_norm"),
            qkv=self.qkv(name + "self_attn."),
            q_norm=None,
            k_norm=None,
            o=self.columns(f"{name}self_attn.out_proj", self.queries(), config.hidden, config.o_bias),
            norm2=self.layer_norm(name + "final_layer_norm"),
            up=self.rows([name + "fc1"], [middle], [config.intermediate], config.mlp_bias),
            down=self.columns(name + "fc2", middle, config.intermediate, config.mlp_bias),
        )

    def embedding(self, tokens: slice) -> torch.Tensor:
        shape = (self.config.vocab, self.config.hidden)
        name = f"{self.prefix}embed_tokens.weight"
        return self.checkpoint.read(name, shape, self.dtype, rows=tokens).to(self.device)

    def positions(self) -> torch.Tensor:
        """Where positions are learned (OPT): the table begins with two rows that nothing uses."""
        config = self.config
        return self.get("embed_positions.weight", config.max_tokens + 2, config.hidden)[2:]

    def last_norm(self) -> Norm:
        if self.config.family == "opt":
            return self.layer_norm("final_layer_norm")
        return Norm(weight=self.get("norm.weight", self.config.hidden))

    def output(self, embedding: torch.Tensor | None, tokens: slice) -> Linear | PackedLinear:
        if self.config.tied and embedding is not None:
            return make_linear(embedding)
        shape = (self.config.vocab, self.config.hidden)
        return make_linear(self.checkpoint.read("lm_head.weight", shape, self.dtype, rows=tokens).to(self.device))

    # --- parts

    def qkv(self, name: str) -> Linear | PackedLinear:
        config, groups = self.config, self.shard.kv_heads(self.config)
        keys = slice(groups.start * config.head_dim, groups.stop * config.head_dim)
        names = [f"{name}{part}_proj" for part in "qkv"]
        of_queries, of_keys = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        return self.rows(names, [self.queries(), keys, keys], [of_queries, of_keys, of_keys], config.qkv_bias)

    def queries(self) -> slice:
        return self.shard.part(self.config.q_heads * self.config.head_dim)

    def rows(self, names: list[str], parts: list[slice], sizes: list[int], bias: bool) -> Linear | PackedLinear:
        """Linears side by side, of each the outputs in its part."""
        weights, biases = [], []
        for name, part, size in zip(names, parts, sizes, strict=True):
            shape = (size, self.config.hidden)
            weights.append(self.checkpoint.read(f"{self.prefix}{name}.weight", shape, self.dtype, rows=part))
            if bias:
                biases.append(self.checkpoint.read(f"{self.prefix}{name}.bias", (size,), self.dtype, rows=part))
        joined = torch.cat(biases).to(self.device) if bias else None
        return make_linear(torch.cat(weights).to(self.device), joined)

    def columns(self, name: str, part: slice, size: int, bias: bool) -> Linear | PackedLinear:
        """A linear of the inputs in ``part``; its bias is added by the first rank alone, since ranks are summed."""
        hidden = self.config.hidden
        weight = self.checkpoint.read(f"{self.prefix}{name}.weight", (hidden, size), self.dtype, columns=part)
        has_bias = bias and self.shard.rank == 0
        return make_linear(weight.to(self.device), self.get(f"{name}.bias", hidden) if has_bias else None)

    def layer_norm(self, name: str) -> Norm:
        hidden = self.config.hidden
        return Norm(weight=self.get(f"{name}.weight", hidden), bias=self.get(f"{name}.bias", hidden))

    def get(self, name: str, *shape: int) -> torch.Tensor:
        return self.checkpoint.read(self.prefix + name, shape, self.dtype).to(self.device)
