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
    """Mixture of experts in every ``every``-th layer after the first ``first_dense_layers``; the others are dense."""

    num_experts: int
    active_experts: int
    expert_intermediate: int
    shared_experts: int = 0
    first_dense_layers: int = 0
    every: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """Layers of linear attention (gated delta rule, state space), which keep a state for each request instead of KV.

    Attributes:
        layers: the number of such layers, evenly spread over the model.
        params: parameters of the projections and convolutions of one of them.
        state_bytes: bytes of one request's state in one of them, in all heads.
        token_flops: FLOPs of the recurrence for one token in one of them, without the projections.
    """

    layers: int
    params: int
    state_bytes: float
    token_flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerShape:
    """Sparse attention (DeepSeek-V3.2): an indexer chooses the tokens that a query attends to.

    Attributes:
        top_tokens: the number of chosen tokens.
        heads, head_dim: number and size of the indexer's queries, which share one key per token.
        key_bytes: bytes of one token's key in the indexer's cache.
        layers: the number of layers that have an indexer of their own; the others attend to the tokens that an earlier
            one chose (GLM-5.2). None: all layers have one.
    """

    top_tokens: int
    heads: int
    head_dim: int
    key_bytes: float
    layers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape:
    """Multi-token prediction (DeepSeek-V3): one more layer drafts tokens that the next iteration verifies.

    Attributes:
        tokens: the number of tokens drafted for each request in an iteration.
        acceptance: the probability that a draft is accepted if all before it were.
    """

    tokens: int
    acceptance: float

    def emitted(self) -> float:
        """Return the mean tokens that an iteration adds to a request, ``1 + a + ... + a^k``."""
        return sum(self.acceptance**i for i in range(self.tokens + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPrecision:
    """The precision in which one GPU type holds weights and KV; the fields mean the same as in `ModelSpec`."""

    gpu: str
    weights: str
    weight_bytes: float
    kv_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Parameter counts omit norms and biases (well under 1% of the weights of any model in the catalogue). Where layers
    are of several kinds (windows, linear attention, experts in some), the figures of a layer are the mean over all
    repeated layers. ``forbidden_cuts`` are layer numbers i before which no pipeline stage may start. GPU types in
    ``precisions`` compute layers in a precision of their own (`on`).

    Attributes:
        sliding_layers: the layers whose attention reaches back ``sliding_window`` tokens; None: all, if there is a
            window.
        windows_free_kv: engines free the KV that windows have passed although other layers keep theirs, as vLLM's
            hybrid KV cache manager does. Where all layers slide, they always do.
        gated_attention: the heads' outputs are multiplied by a gate that has a projection of its own (Qwen3.5).
        vision_params: parameters of vision towers, which the first stage holds in 16 bits.
        draft: how engines are configured to draft tokens; None: they do not draft.
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
    weights: str = ""  # name of the layers' precision, such as fp8 or awq-int4; empty if not specified
    weight_bytes: float = 2.0  # bytes per parameter of the layers; 1 for fp8, about 0.53 for 4-bit with scales
    kv_bytes: float = 2.0  # bytes per element of the KV cache
    activation_bytes: float = 2.0  # bytes per element sent between devices
    embedding_bytes: float = 2.0  # bytes per parameter of embedding and LM head, which are seldom quantised
    gated_mlp: bool = True
    tie_embeddings: bool = False
    max_position: int = 4096
    sliding_window: int | None = None
    sliding_layers: int | None = None
    windows_free_kv: bool = True
    gated_attention: bool = False
    vision_params: int = 0
    float16: bool = True  # False: engines refuse to compute it in float16, whose range is too small (Gemma 2)
    mla: MlaShape | None = None
    moe: MoeShape | None = None
    linear: LinearShape | None = None
    indexer: IndexerShape | None = None
    draft: DraftShape | None = None
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
        if self.indexer is not None and (self.mla is None or self.mla.q_lora_rank is None):
            raise InvalidProblemError(f"{self.name}: an indexer needs latent attention with compressed queries")
        if self.draft is not None and not (self.draft.tokens >= 1 and 0.0 <= self.draft.acceptance <= 1.0):
            raise InvalidProblemError(f"{self.name}: {self.draft} needs a token at least and an acceptance of 0 to 1")
        if self.indexer is not None and self.sliding_window is not None:
            raise InvalidProblemError(f"{self.name}: an indexer and a sliding_window exclude each other")
        if not 0 <= self._linear_layers < self.num_layers:
            limit = f"must be 0 to num_layers ({self.num_layers}) - 1"
            raise InvalidProblemError(f"{self.name}: linear.layers is {self._linear_layers}, {limit}")
        indexers = None if self.indexer is None else self.indexer.layers
        if indexers is not None and not 1 <= indexers <= self._layers_with_kv:
            limit = f"must be 1 to the layers with KV ({self._layers_with_kv})"
            raise InvalidProblemError(f"{self.name}: indexer.layers is {indexers}, {limit}")
        if self.sliding_layers is not None and not 0 <= self.sliding_layers <= self._layers_with_kv:
            limit = f"must be 0 to the layers with KV ({self._layers_with_kv})"
            raise InvalidProblemError(f"{self.name}: sliding_layers is {self.sliding_layers}, {limit}")
        if self.moe is not None:
            dense, every = self.moe.first_dense_layers, self.moe.every
            if not 0 <= dense < self.num_layers:
                limit = f"must be 0 to num_layers ({self.num_layers}) - 1"
                raise InvalidProblemError(f"{self.name}: moe.first_dense_layers is {dense}, {limit}")
            if not 1 <= every <= self.num_layers - dense:
                limit = f"must be 1 to the {self.num_layers - dense} layers after the dense ones"
                raise InvalidProblemError(f"{self.name}: moe.every is {every}, {limit}")

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

    @property
    def _linear_layers(self) -> int:
        return 0 if self.linear is None else self.linear.layers

    @property
    def _layers_with_kv(self) -> int:
        return self.num_layers - self._linear_layers

    @property
    def kv_share(self) -> float:
        """Return the share of layers that keep KV; the others keep a state for each request."""
        return 1.0 - self._linear_layers / self.num_layers

    @property
    def sliding_share(self) -> float:
        """Return the share of the layers with KV that have a sliding window."""
        if self.sliding_window is None:
            return 0.0
        return 1.0 if self.sliding_layers is None else self.sliding_layers / self._layers_with_kv

    @property
    def _indexer_share(self) -> float:
        """Return the share of the layers with KV that have an indexer of their own."""
        if self.indexer is None:
            return 0.0
        return 1.0 if self.indexer.layers is None else self.indexer.layers / self._layers_with_kv

    @property
    def expert_share(self) -> float:
        """Return the share of repeated layers that have experts; 0 for a model without."""
        return 0.0 if self.moe is None else 1.0 / self.moe.every

    @property
    def heads_can_move(self) -> bool:
        """Return whether attention workers may compute head groups: those of all layers, with the KV of all tokens.

        States and indexers serve all heads together, KV that windows free is not kept alike in all layers, and the
        plugin does not verify drafts.
        """
        frees_some = self.windows_free_kv and 0.0 < self.sliding_share < 1.0
        return self.linear is None and self.indexer is None and self.draft is None and not frees_some

    def attention_params(self) -> float:
        """Return the mean parameters of a layer's attention projections."""
        if self.linear is None:
            return self._full_attention_params()
        full, linear = self.num_layers - self.linear.layers, self.linear.layers
        return (full * self._full_attention_params() + linear * self.linear.params) / self.num_layers

    def _full_attention_params(self) -> float:
        """Return the mean parameters of the attention projections of layers with KV."""
        if self.mla is not None:
            mla, qk = self.mla, self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
            query = (
                self.hidden * self.q_heads * qk
                if mla.q_lora_rank is None
                else mla.q_lora_rank * (self.hidden + self.q_heads * qk)
            )
            latent = self.hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
            expand = mla.kv_lora_rank * self.q_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            return query + latent + expand + self.q_heads * mla.v_head_dim * self.hidden + self._indexer_params()
        gate = self.q_heads if self.gated_attention else 0
        return self.hidden * self.head_dim * (2 * self.q_heads + 2 * self.kv_heads + gate)

    def _indexer_params(self) -> float:
        """Return the mean parameters of queries, the key and the heads' weights of an indexer."""
        if self.indexer is None or self.mla is None or self.mla.q_lora_rank is None:
            return 0
        heads, size = self.indexer.heads, self.indexer.head_dim
        return self._indexer_share * (self.mla.q_lora_rank * heads * size + self.hidden * (size + heads))

    def _ffn_params(self, intermediate: int) -> int:
        return (3 if self.gated_mlp else 2) * self.hidden * intermediate

    def dense_layer_params(self) -> float:
        """Return the parameters of a layer without experts."""
        return self.attention_params() + self._ffn_params(self.intermediate)

    def layer_params(self) -> float:
        """Return the mean parameters of a repeated layer."""
        if self.moe is None:
            return self.dense_layer_params()
        experts = self.moe.num_experts + self.moe.shared_experts
        return self._with_experts(self._router_params() + experts * self.expert_params())

    def active_layer_params(self) -> float:
        """Return the mean parameters of a repeated layer that one token touches."""
        if self.moe is None:
            return self.dense_layer_params()
        experts = self.moe.active_experts + self.moe.shared_experts
        return self._with_experts(self._router_params() + experts * self.expert_params())

    def touched_layer_params(self, tokens: float) -> float:
        """Return the mean parameters of a repeated layer that a batch of ``tokens`` reads, without untouched experts.

        The expected number of experts touched under even routing is ``E (1 - (1 - k/E)^tokens)``.
        """
        if self.moe is None:
            return float(self.dense_layer_params())
        moe, per_expert = self.moe, self.expert_params()
        fixed = self._with_experts(self._router_params() + moe.shared_experts * per_expert)
        return fixed + self.expert_share * self.touched_experts(tokens) * per_expert

    def _router_params(self) -> int:
        return 0 if self.moe is None else self.hidden * self.moe.num_experts

    def _with_experts(self, experts: float) -> float:
        """Return the mean parameters of repeated layers, of which those with experts have ``experts`` in their MLP."""
        assert self.moe is not None, "dense models are dealt with before"
        if self.moe.every == 1:
            return self.attention_params() + experts
        dense = (self.moe.every - 1) * self._ffn_params(self.intermediate)
        return self.attention_params() + (experts + dense) / self.moe.every

    def expert_params(self) -> int:
        """Return the parameters of one routed expert; 0 for a model without experts."""
        return 0 if self.moe is None else self._ffn_params(self.moe.expert_intermediate)

    def touched_experts(self, tokens: float) -> float:
        """Return the expected routed experts of a layer with experts that ``tokens`` touch under even routing."""
        if self.moe is None:
            return 0.0
        missed: float = (1.0 - self.moe.active_experts / self.moe.num_experts) ** tokens
        return self.moe.num_experts * (1.0 - missed)

    def expert_activation_bytes(self, tokens: float, slices: int = 1) -> float:
        """Return the bytes of activations that the routed experts of a layer move for ``tokens`` tokens on one rank.

        Every token's row of the hidden size, and its row between an expert's products, are read and written by each of
        its experts. ``slices`` ranks share each expert, and with it the rows between its products only.
        """
        if self.moe is None:
            return 0.0
        row = self.hidden + self.moe.expert_intermediate / slices
        return 4.0 * tokens * self.moe.active_experts * row * self.activation_bytes

    @property
    def prefix_layers(self) -> int:
        """Return the leading layers that differ from the repeated ones; they stay together on the first stage."""
        return self.moe.first_dense_layers if self.moe is not None else 0

    @property
    def draft_layers(self) -> int:
        """Return the layers after the last one that draft tokens; they are like the repeated ones."""
        return 0 if self.draft is None else 1

    @property
    def step_tokens(self) -> int:
        """Return the tokens of one decoding request in an iteration: its next one and the drafts."""
        return 1 if self.draft is None else 1 + self.draft.tokens

    @property
    def emitted_tokens(self) -> float:
        """Return the mean tokens that an iteration adds to a decoding request."""
        return 1.0 if self.draft is None else self.draft.emitted()

    def draft_params(self) -> float:
        """Return the parameters of the drafting layer, with the projection of the state and token it starts from."""
        return self.draft_layers * (self.layer_params() + 2 * self.hidden * self.hidden)

    @property
    def embedding_params(self) -> int:
        """Return the parameters of the embedding table; the LM head has as many (the same ones if tied)."""
        return self.vocab * self.hidden

    def params(self) -> int:
        """Return the number of all parameters, vision towers included."""
        return round(self._all_layers(self.layer_params())) + self._end_params() + self.vision_params

    def active_params(self) -> int:
        """Return the parameters that one token of text uses; like published counts, includes embedding and LM head."""
        return round(self._all_layers(self.active_layer_params())) + self._end_params()

    def _all_layers(self, repeated: float) -> float:
        prefix = self.prefix_layers
        return (self.num_layers - prefix) * repeated + prefix * self.dense_layer_params()

    def _end_params(self) -> int:
        return self.embedding_params * (1 if self.tie_embeddings else 2)

    def kv_bytes_per_token_group(self) -> float:
        """Return the mean KV bytes of one token in one layer and one head group, with the key of an indexer."""
        if self.mla is not None:
            latent = (self.mla.kv_lora_rank + self.mla.qk_rope_head_dim) * self.kv_bytes
            return self.kv_share * (latent + self._index_bytes)
        return self.kv_share * 2 * self.head_dim * self.kv_bytes

    @property
    def _index_bytes(self) -> float:
        """Return the bytes of one token's key in an indexer, averaged over the layers with KV."""
        return 0.0 if self.indexer is None else self._indexer_share * self.indexer.key_bytes

    def state_bytes(self) -> float:
        """Return the mean bytes that one request keeps in one layer, for all heads, independently of its context."""
        return 0.0 if self.linear is None else self.linear.layers / self.num_layers * self.linear.state_bytes

    def state_flops(self) -> float:
        """Return the mean FLOPs of updating and reading the state of a layer for one token."""
        return 0.0 if self.linear is None else self.linear.layers / self.num_layers * self.linear.token_flops

    def prompt_kv_bytes(self, prompt_tokens: float) -> float:
        """Return the bytes that a prompt leaves for its decoding: KV and states of all layers and heads."""
        return prompt_tokens * self.kv_bytes_per_token() + self.num_layers * self.state_bytes()

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
        """Return mean FLOPs of prefill attention over (query, key) ``pairs`` for ``heads`` query heads of a layer.

        Chosen tokens are read from the latent space, so sparse attention prefills in the absorbed form.
        """
        if self.indexer is not None:
            return self.decode_attention_flops(pairs, heads)
        if self.mla is not None:
            width = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim + self.mla.v_head_dim
            return 2.0 * self.kv_share * pairs * heads * width
        return 4.0 * self.kv_share * pairs * heads * self.head_dim

    def decode_attention_flops(self, context_tokens: float, heads: float) -> float:
        """Return FLOPs of one token's decode attention over ``context_tokens`` for ``heads`` query heads of a layer."""
        if self.mla is not None:  # absorbed form: scores and values are in the latent space
            latent = 2 * self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
            return 2.0 * self.kv_share * context_tokens * heads * latent
        return 4.0 * self.kv_share * context_tokens * heads * self.head_dim

    def attended_tokens(self, context_tokens: float) -> float:
        """Return the tokens a query attends to, averaged over the layers with KV; fewer than the context with a window.

        An indexer reads the keys of the whole context to choose ``top_tokens``; it counts by the bytes that it reads.
        Layers without an indexer of their own read the chosen tokens only.
        """
        if self.indexer is not None:
            scanned = self.kv_share * self._index_bytes / self.kv_bytes_per_token_group()
            return (1.0 - scanned) * min(context_tokens, float(self.indexer.top_tokens)) + scanned * context_tokens
        if self.sliding_window is None:
            return context_tokens
        share = self.sliding_share
        return min(context_tokens, float(self.sliding_window)) * share + context_tokens * (1.0 - share)

    def cached_tokens(self, context_tokens: float) -> float:
        """Return the tokens whose KV is kept, averaged over the layers with KV."""
        if self.sliding_window is None or not (self.windows_free_kv or self.sliding_share == 1.0):
            return context_tokens
        share = self.sliding_share
        return min(context_tokens, float(self.sliding_window)) * share + context_tokens * (1.0 - share)

    def cached_growth(self, context_tokens: float) -> float:
        """Return the tokens by which `cached_tokens` grows with each further token of the context."""
        if self.sliding_window is None or context_tokens < self.sliding_window:
            return 1.0
        return 1.0 - self.sliding_share if self.windows_free_kv or self.sliding_share == 1.0 else 1.0

    def allowed_cut(self, layer: int) -> bool:
        """Return whether a pipeline stage may start at ``layer``."""
        return not 0 < layer < self.num_layers or (layer >= self.prefix_layers and layer not in self.forbidden_cuts)
