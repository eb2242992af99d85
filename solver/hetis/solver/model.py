"""The model to serve: the shape of its layers, and the FLOPs and bytes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from hetis.solver.errors import InvalidProblemError

_AT_LEAST_ONE = (
    "num_layers", "hidden", "q_heads", "kv_heads", "head_dim", "vocab", "max_position", "residual_streams",
)  # fmt: skip


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
class CompressedShape:
    """Compressed attention (DeepSeek-V4): one vector per token is key and value of all heads, and runs of tokens are
    compressed into entries of that size.

    All layers attend to the vectors of the last tokens. Sparse layers (CSA) attend to entries that an indexer chooses,
    heavy ones (HCA) to all of their few entries, and any other layers to nothing else. Queries and the output have
    projections of low rank.

    Attributes:
        window: the tokens whose vectors a layer keeps and attends to, whole.
        sparse_layers, sparse_ratio: the number of layers with an indexer, and their tokens per entry.
        heavy_layers, heavy_ratio: the number of layers that attend to all entries, and their tokens per entry.
        top_entries: the number of entries that an indexer chooses.
        index_heads, index_head_dim: number and size of an indexer's queries, which share one key per entry.
        index_key_bytes: bytes of one entry's key in an indexer's cache.
        rope_head_dim: numbers of a vector or entry that keep 16 bits where others have 8.
        q_lora_rank: size of the compressed queries.
        o_groups, o_lora_rank: groups of heads in the output projection, and the size to which it first reduces each.
    """

    window: int
    sparse_layers: int
    sparse_ratio: int
    heavy_layers: int
    heavy_ratio: int
    top_entries: int
    index_heads: int
    index_head_dim: int
    index_key_bytes: float
    rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int


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
        residual_streams: copies of the residual that layers mix (hyper-connections, DeepSeek-V4); 1: a plain residual.
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
    residual_streams: int = 1
    vision_params: int = 0
    float16: bool = True  # False: engines refuse to compute it in float16, whose range is too small (Gemma 2)
    mla: MlaShape | None = None
    moe: MoeShape | None = None
    linear: LinearShape | None = None
    indexer: IndexerShape | None = None
    compressed: CompressedShape | None = None
    draft: DraftShape | None = None
    forbidden_cuts: frozenset[int] = frozenset()
    precisions: tuple[GpuPrecision, ...] = ()

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
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
        if self.compressed is not None:
            self._check_compressed(self.compressed)
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

    def _check_compressed(self, shape: CompressedShape) -> None:
        others = ("mla", "indexer", "linear", "sliding_window")
        if found := [name for name in others if getattr(self, name) is not None]:
            raise InvalidProblemError(f"{self.name}: compressed attention and {found[0]} exclude each other")
        if self.kv_heads != 1:
            raise InvalidProblemError(f"{self.name}: kv_heads is {self.kv_heads}, must be 1 with compressed attention")
        for name in ("window", "sparse_ratio", "heavy_ratio", "top_entries", "q_lora_rank", "o_groups", "o_lora_rank"):
            if getattr(shape, name) < 1:
                raise InvalidProblemError(f"{self.name}: compressed.{name} is {getattr(shape, name)}, must be >= 1")
        layers = shape.sparse_layers + shape.heavy_layers
        if min(shape.sparse_layers, shape.heavy_layers) < 0 or not 1 <= layers <= self.num_layers:
            counts, limit = f"{shape.sparse_layers} sparse and {shape.heavy_layers} heavy", f"1 to {self.num_layers}"
            raise InvalidProblemError(f"{self.name}: compressed has {counts} layers, must have {limit} together")
        if not 0 <= shape.rope_head_dim <= self.head_dim:
            limit = f"must be 0 to head_dim ({self.head_dim})"
            raise InvalidProblemError(f"{self.name}: compressed.rope_head_dim is {shape.rope_head_dim}, {limit}")
        if self.q_heads % shape.o_groups:
            limit = f"must divide q_heads ({self.q_heads})"
            raise InvalidProblemError(f"{self.name}: compressed.o_groups is {shape.o_groups}, {limit}")

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

    def divides(self, ranks: int) -> bool:
        """Return whether so many tensor-parallel ranks can share what is neither a head nor a head group.

        A rank holds whole groups of the low-rank output projection (vLLM 0.32, ``DeepseekV4Attention``).
        """
        return self.compressed is None or self.compressed.o_groups % ranks == 0

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

        States, indexers and compressors serve all heads together, KV that windows free is not kept alike in all layers,
        and the plugin does not verify drafts.
        """
        frees_some = self.windows_free_kv and 0.0 < self.sliding_share < 1.0
        serves_all = self.linear is not None or self.indexer is not None or self.compressed is not None
        return not serves_all and self.draft is None and not frees_some

    def attention_params(self) -> float:
        """Return the mean parameters of a layer's attention projections, and of what mixes its residual streams."""
        if self.linear is None:
            return self._full_attention_params() + self.mixing_params()
        full, linear = self.num_layers - self.linear.layers, self.linear.layers
        mean = (full * self._full_attention_params() + linear * self.linear.params) / self.num_layers
        return mean + self.mixing_params()

    def _full_attention_params(self) -> float:
        """Return the mean parameters of the attention projections of layers with KV."""
        if self.compressed is not None:
            return self._compressed_attention_params(self.compressed)
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

    def _compressed_attention_params(self, shape: CompressedShape) -> float:
        """Return the mean parameters of compressed attention: queries, the vector, the output, and compressors.

        A compressor projects to numbers and their weights, in sparse layers (whose runs overlap) twice; the indexer has
        one of its own (transformers 5.23, ``DeepseekV4Attention`` and ``DeepseekV4Indexer``).
        """
        width, size, index = self.q_heads * self.head_dim, self.head_dim, shape.index_head_dim
        output = width * shape.o_lora_rank + shape.o_groups * shape.o_lora_rank * self.hidden
        every = shape.q_lora_rank * (self.hidden + width) + self.hidden * size + output
        indexer = shape.q_lora_rank * shape.index_heads * index + self.hidden * shape.index_heads
        sparse = 4 * self.hidden * (size + index) + indexer
        heavy = 2 * self.hidden * size
        return every + self.sparse_share * sparse + self.heavy_share * heavy

    @property
    def sparse_share(self) -> float:
        """Return the share of layers that attend to the compressed entries that an indexer chooses."""
        return 0.0 if self.compressed is None else self.compressed.sparse_layers / self.num_layers

    @property
    def heavy_share(self) -> float:
        """Return the share of layers that attend to all of their compressed entries."""
        return 0.0 if self.compressed is None else self.compressed.heavy_layers / self.num_layers

    @property
    def residual_width(self) -> int:
        """Return the numbers of a token's residual, in all of its streams; stages send each other these."""
        return self.residual_streams * self.hidden

    def mixing_params(self) -> int:
        """Return a layer's parameters for mixing residual streams; 0 for a plain residual.

        Before attention and before the MLP, a token's streams determine how they are joined, divided and mixed: n, n
        and n^2 numbers (``DeepseekV4HyperConnection``).
        """
        n = self.residual_streams
        return 0 if n == 1 else 2 * (2 + n) * n * self.residual_width

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
        if self.compressed is not None:
            shape, entry = self.compressed, self._entry_bytes(self.compressed)
            sparse, heavy = (entry + shape.index_key_bytes) / shape.sparse_ratio, entry / shape.heavy_ratio
            return self.sparse_share * sparse + self.heavy_share * heavy
        return self.kv_share * 2 * self.head_dim * self.kv_bytes

    def _entry_bytes(self, shape: CompressedShape) -> float:
        """Return the bytes of a compressed entry, or of one token's vector in a window.

        In FP8 the numbers with rotary embedding keep 16 bits, and 64 numbers share a scale of a byte: 584 bytes of 512
        numbers (vLLM 0.32, ``DeepseekV4Attention.get_kv_cache_spec``).
        """
        if self.kv_bytes >= 2.0:
            return self.head_dim * self.kv_bytes
        return (self.head_dim - shape.rope_head_dim) * self.kv_bytes + 2.0 * shape.rope_head_dim + self.head_dim / 64

    @property
    def _index_bytes(self) -> float:
        """Return the bytes of one token's key in an indexer, averaged over the layers with KV."""
        return 0.0 if self.indexer is None else self._indexer_share * self.indexer.key_bytes

    def state_bytes(self) -> float:
        """Return the mean bytes that one request keeps in one layer, for all heads, independently of its context.

        With compressed attention these are the window's vectors, and what compressors keep in 32 bits: a token's
        numbers and their weights, of the run that is not complete yet, and in sparse layers, whose tokens have both
        twice, of the run before it (vLLM 0.32, ``CompressorStateCache``).
        """
        if self.compressed is not None:
            shape = self.compressed
            sparse = 2 * shape.sparse_ratio * self._sparse_inputs(shape)
            heavy = shape.heavy_ratio * self._heavy_inputs()
            return shape.window * self._entry_bytes(shape) + self.sparse_share * sparse + self.heavy_share * heavy
        return 0.0 if self.linear is None else self.linear.layers / self.num_layers * self.linear.state_bytes

    def chunk_state_bytes(self) -> float:
        """Return the mean bytes that a layer keeps of each token of a chunk while it is computed, beside its KV.

        vLLM 0.32 treats windows and compressors' inputs as KV of sliding windows, and allocates it for the whole chunk
        (``SlidingWindowSpec.max_admission_blocks_per_request``).
        """
        if self.compressed is None:
            return 0.0
        inputs = self.sparse_share * self._sparse_inputs(self.compressed) + self.heavy_share * self._heavy_inputs()
        return self._entry_bytes(self.compressed) + inputs

    def _sparse_inputs(self, shape: CompressedShape) -> float:
        """Return the bytes that the compressors of a sparse layer, the indexer's among them, keep of one token."""
        return 4.0 * 4 * (self.head_dim + shape.index_head_dim)

    def _heavy_inputs(self) -> float:
        """Return the bytes that the compressor of a heavy layer keeps of one token."""
        return 4.0 * 2 * self.head_dim

    @property
    def kept_states(self) -> int:
        """Return the states that engines keep for a request: one for every token of an iteration, as drafts may be
        rejected. What compressed attention keeps belongs to single tokens, so a rejected one takes nothing with it.
        """
        return 1 if self.compressed is not None else self.step_tokens

    def state_ranks(self, tp: int) -> int:
        """Return among how many of ``tp`` ranks a state is divided: by heads, of which compressed attention has one."""
        return 1 if self.compressed is not None else tp

    def state_traffic_bytes(self, queries: float) -> float:
        """Return the mean bytes of states that one request's ``queries`` tokens read and write in a layer.

        A state of linear attention is read once, and written for every token, since any may be the last accepted one.
        A compressor writes its inputs for every token, and reads them all when a run is complete. The window is read as
        KV is (`read_tokens`).
        """
        if self.compressed is not None:
            sparse, heavy = 3 * self._sparse_inputs(self.compressed), 2 * self._heavy_inputs()
            return queries * (self.sparse_share * sparse + self.heavy_share * heavy)
        return (1.0 + queries) * self.state_bytes()

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
        Layers without an indexer of their own read the chosen tokens only. With compressed attention, these are the
        window's tokens and the entries of each layer; keys that are scored count as `scan_flops`.
        """
        if self.compressed is not None:
            shape = self.compressed
            sparse = min(context_tokens / shape.sparse_ratio, float(shape.top_entries))
            heavy = context_tokens / shape.heavy_ratio
            return min(context_tokens, float(shape.window)) + self.sparse_share * sparse + self.heavy_share * heavy
        if self.indexer is not None:
            scanned = self.kv_share * self._index_bytes / self.kv_bytes_per_token_group()
            return (1.0 - scanned) * min(context_tokens, float(self.indexer.top_tokens)) + scanned * context_tokens
        if self.sliding_window is None:
            return context_tokens
        share = self.sliding_share
        return min(context_tokens, float(self.sliding_window)) * share + context_tokens * (1.0 - share)

    def read_tokens(self, context_tokens: float) -> float:
        """Return the tokens of KV with as many bytes as a query reads; those it attends to but in compressed attention,
        where it reads whole vectors and entries, and an indexer's keys of all entries.
        """
        if self.compressed is None:
            return self.attended_tokens(context_tokens)
        entries = self.attended_tokens(context_tokens) * self._entry_bytes(self.compressed)
        keys = self._scanned_keys(context_tokens) * self.compressed.index_key_bytes
        return (entries + keys) / self.kv_bytes_per_token_group()

    def window_read_tokens(self) -> float:
        """Return the part of `read_tokens` for a window of compressed attention that is full."""
        if self.compressed is None:
            return 0.0
        return self.compressed.window * self._entry_bytes(self.compressed) / self.kv_bytes_per_token_group()

    def _scanned_keys(self, context_tokens: float) -> float:
        """Return the keys that a query is compared with to choose entries, averaged over all layers."""
        return 0.0 if self.compressed is None else self.sparse_share * context_tokens / self.compressed.sparse_ratio

    def scan_flops(self, context_tokens: float) -> float:
        """Return the mean FLOPs of a layer for scoring the keys of compressed entries for one token, on every rank.

        Ranks do not divide the indexer's heads (vLLM 0.32, ``DeepseekV4Indexer``).
        """
        if self.compressed is None:
            return 0.0
        return 2.0 * self._scanned_keys(context_tokens) * self.compressed.index_heads * self.compressed.index_head_dim

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
