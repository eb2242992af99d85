"""The model to serve: the shape of its layers, and the FLOPs and bytes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from hetis.solver.errors import InvalidProblemError


class AttentionKind(StrEnum):
    MHA = "mha"
    GQA = "gqa"
    MLA = "mla"


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaShape:
    """Multi-head latent attention (DeepSeek-V2): one compressed latent per token serves all heads."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None  # None: queries are projected directly


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """Mixture of experts in every layer except the first ``first_dense_layers``."""

    num_experts: int
    active_experts: int
    expert_intermediate: int
    shared_experts: int = 0
    first_dense_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPrecision:
    """The precision in which one GPU type holds weights and KV; its fields mean what those of `ModelSpec` do."""

    gpu: str
    weights: str
    weight_bytes: float
    kv_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Parameter counts omit norms and biases (well under 1% of the weights of any model in the catalogue).
    ``forbidden_cuts`` are layer numbers i before which no pipeline stage may start. GPU types in ``precisions`` compute
    layers in a precision of their own (`on`).
    """

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    attention: AttentionKind
    weights: str = ""  # name of the layers' precision, such as fp8 or awq-int4; empty if not given
    weight_bytes: float = 2.0  # per parameter of the layers; 1 for fp8, about 0.53 for 4-bit with scales
    kv_bytes: float = 2.0  # per element of the KV cache
    activation_bytes: float = 2.0  # per element sent between devices
    embedding_bytes: float = 2.0  # per parameter of embedding and LM head, which are seldom quantised
    gated_mlp: bool = True
    tie_embeddings: bool = False
    max_position: int = 4096
    sliding_window: int | None = None
    sliding_window_every: int = 1  # 1: all layers slide; 2: every second one
    float16: bool = True  # False: engines refuse to compute it in float16, whose range is too small (Gemma 2)
    mla: MlaShape | None = None
    moe: MoeShape | None = None
    forbidden_cuts: frozenset[int] = frozenset()
    precisions: tuple[GpuPrecision, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden", "q_heads", "kv_heads", "head_dim", "vocab", "max_position"):
            if getattr(self, name) < 1:
                raise InvalidProblemError(f"{self.name}: {name} is {getattr(self, name)}, must be >= 1")
        if self.q_heads % self.kv_heads:
            raise InvalidProblemError(
                f"{self.name}: q_heads is {self.q_heads}, must be a multiple of kv_heads ({self.kv_heads})"
            )
        if (self.attention is AttentionKind.MLA) != (self.mla is not None):
            raise InvalidProblemError(f"{self.name}: attention mla and the mla shape must come together")

    def on(self, gpu: str) -> ModelSpec:
        """Return the model as GPUs of one type hold it, in a single precision."""
        if not self.precisions:
            return self
        own = next((one for one in self.precisions if one.gpu == gpu), None)
        if own is None:
            return replace(self, precisions=())
        return replace(
            self, weights=own.weights, weight_bytes=own.weight_bytes, kv_bytes=own.kv_bytes, precisions=()
        )  # fmt: skip

    @property
    def head_groups(self) -> int:
        """Return G, the KV head groups of a layer, the smallest things that are placed; MLA has one latent group."""
        return 1 if self.mla is not None else self.kv_heads

    @property
    def queries_per_group(self) -> int:
        """Return r, the query heads that share one head group."""
        return self.q_heads // self.head_groups

    def attention_params(self) -> int:
        """Return the parameters of the attention projections of one layer."""
        if self.mla is not None:
            mla, qk = self.mla, self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
            query = (
                self.hidden * self.q_heads * qk
                if mla.q_lora_rank is None
                else mla.q_lora_rank * (self.hidden + self.q_heads * qk)
            )
            latent = self.hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
            expand = mla.kv_lora_rank * self.q_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            return query + latent + expand + self.q_heads * mla.v_head_dim * self.hidden
        return self.hidden * self.head_dim * (2 * self.q_heads + 2 * self.kv_heads)

    def _ffn_params(self, intermediate: int) -> int:
        return (3 if self.gated_mlp else 2) * self.hidden * intermediate

    def dense_layer_params(self) -> int:
        """Return the parameters of a layer without experts."""
        return self.attention_params() + self._ffn_params(self.intermediate)

    def layer_params(self) -> int:
        """Return the parameters of one repeated layer (an expert layer if the model has experts)."""
        if self.moe is None:
            return self.dense_layer_params()
        experts = self.moe.num_experts + self.moe.shared_experts
        router = self.hidden * self.moe.num_experts
        return self.attention_params() + router + experts * self._ffn_params(self.moe.expert_intermediate)

    def active_layer_params(self) -> int:
        """Return the parameters of one repeated layer that one token touches."""
        if self.moe is None:
            return self.dense_layer_params()
        experts = self.moe.active_experts + self.moe.shared_experts
        router = self.hidden * self.moe.num_experts
        return self.attention_params() + router + experts * self._ffn_params(self.moe.expert_intermediate)

    def touched_layer_params(self, tokens: float) -> float:
        """Return the parameters of one repeated layer that a batch of ``tokens`` reads, without untouched experts.

        The expected number of experts touched under even routing is ``E (1 - (1 - k/E)^tokens)``.
        """
        if self.moe is None:
            return float(self.dense_layer_params())
        moe, per_expert = self.moe, self.expert_params()
        fixed = self.attention_params() + self.hidden * moe.num_experts + moe.shared_experts * per_expert
        return fixed + self.touched_experts(tokens) * per_expert

    def expert_params(self) -> int:
        """Return the parameters of one routed expert; 0 for a model without experts."""
        return 0 if self.moe is None else self._ffn_params(self.moe.expert_intermediate)

    def touched_experts(self, tokens: float) -> float:
        """Return the expected routed experts of one layer that ``tokens`` touch under even routing; 0 without any."""
        if self.moe is None:
            return 0.0
        missed: float = (1.0 - self.moe.active_experts / self.moe.num_experts) ** tokens
        return self.moe.num_experts * (1.0 - missed)

    @property
    def prefix_layers(self) -> int:
        """Return the leading layers that differ from the repeated ones; they stay together on the first stage."""
        return self.moe.first_dense_layers if self.moe is not None else 0

    @property
    def embedding_params(self) -> int:
        """Return the parameters of the embedding table; the LM head has as many (the same ones if tied)."""
        return self.vocab * self.hidden

    def params(self) -> int:
        """Return the number of all parameters."""
        repeated = self.num_layers - self.prefix_layers
        ends = self.embedding_params * (1 if self.tie_embeddings else 2)
        return repeated * self.layer_params() + self.prefix_layers * self.dense_layer_params() + ends

    def active_params(self) -> int:
        """Return the parameters that one token touches, including embedding and LM head as published counts do."""
        repeated = self.num_layers - self.prefix_layers
        ends = self.embedding_params * (1 if self.tie_embeddings else 2)
        return repeated * self.active_layer_params() + self.prefix_layers * self.dense_layer_params() + ends

    def kv_bytes_per_token_group(self) -> float:
        """Return the KV bytes of one token in one layer and one head group."""
        if self.mla is not None:
            return (self.mla.kv_lora_rank + self.mla.qk_rope_head_dim) * self.kv_bytes
        return 2 * self.head_dim * self.kv_bytes

    def kv_bytes_per_token(self) -> float:
        """Return the KV bytes of one token over all layers and head groups."""
        return self.num_layers * self.head_groups * self.kv_bytes_per_token_group()

    def exchange_bytes_per_head(self) -> float:
        """Return bytes per token, layer and query head between a primary and an attention worker.

        q goes out and the head output comes back, while k and v go out once per head group: ``(2 + 2/r) head_dim s``
        (Hetis, SC'25). With MLA the query and output are in the latent space.
        """
        r, size = self.queries_per_group, self.activation_bytes
        if self.mla is not None:
            latent = self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
            return (latent + self.mla.kv_lora_rank + latent / r) * size
        return (2.0 + 2.0 / r) * self.head_dim * size

    def attention_flops(self, pairs: float, heads: float) -> float:
        """Return FLOPs of prefill attention over (query, key) ``pairs`` for ``heads`` query heads of one layer."""
        if self.mla is not None:
            width = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim + self.mla.v_head_dim
            return 2.0 * pairs * heads * width
        return 4.0 * pairs * heads * self.head_dim

    def decode_attention_flops(self, context_tokens: float, heads: float) -> float:
        """Return FLOPs of one token's decode attention over ``context_tokens`` for ``heads`` query heads of a layer."""
        if self.mla is not None:  # absorbed form: scores and values are in the latent space
            latent = 2 * self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
            return 2.0 * context_tokens * heads * latent
        return 4.0 * context_tokens * heads * self.head_dim

    def attended_tokens(self, context_tokens: float) -> float:
        """Return the tokens a query attends to, averaged over layers; fewer than the context with a sliding window."""
        if self.sliding_window is None:
            return context_tokens
        window = min(context_tokens, float(self.sliding_window))
        return window / self.sliding_window_every + context_tokens * (1.0 - 1.0 / self.sliding_window_every)

    def cached_tokens(self, context_tokens: float) -> float:
        """Return the tokens whose KV is kept; a window frees memory only if every layer slides."""
        if self.sliding_window is None or self.sliding_window_every != 1:
            return context_tokens
        return min(context_tokens, float(self.sliding_window))

    def allowed_cut(self, layer: int) -> bool:
        """Return whether a pipeline stage may start at ``layer``."""
        return not 0 < layer < self.num_layers or (layer >= self.prefix_layers and layer not in self.forbidden_cuts)
