"""The kinds of attention: values that say what a layer's attention holds, reads, computes and demands.

A kind is independent of the model around it, which passes its hidden size, or the bytes of an element of KV. Figures
are of one layer, of all heads together. A new kind is a class here; nothing else asks which kind a layer has.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from hetis.solver.errors import InvalidProblemError


class Kernel(StrEnum):
    """The kernels that engines run for a kind of attention, whose support differs between GPUs."""

    GROUPED = "grouped"
    LATENT = "latent"
    SPARSE = "sparse"
    COMPRESSED = "compressed"
    RECURRENT = "recurrent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """Sparse attention (DeepSeek-V3.2): an indexer chooses the tokens that a query attends to.

    Attributes:
        top_tokens: the number of chosen tokens.
        heads, head_dim: number and size of the indexer's queries, which share one key per token.
        key_bytes: bytes of one token's key in the indexer's cache.
    """

    top_tokens: int
    heads: int
    head_dim: int
    key_bytes: float

    def params(self, hidden: int, query: int) -> int:
        """Return the parameters of queries, which are projected from ``query`` numbers, the key and heads' weights."""
        return query * self.heads * self.head_dim + hidden * (self.head_dim + self.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """What a layer computes from several tokens. The defaults are those of a kind without KV, states and demands.

    Attributes:
        kernel: the kernels that engines run for it.
        divides_states: a rank holds its heads' part of what is kept for a request; otherwise every rank holds all.
        immovable: why attention workers cannot serve its heads; empty: they can.
        all_heads_share: what all heads share, so that none of them can move; empty: nothing.
    """

    kernel: ClassVar[Kernel]
    divides_states: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The kind in one word."""
        return self.kernel.value

    @property
    def q_heads(self) -> int:
        """Query heads, which ranks divide; 0 if it has none."""
        return 0

    @property
    def groups(self) -> int:
        """Head groups, the smallest parts of its KV; 0 if it keeps none."""
        return 0

    @property
    def num_kv_heads(self) -> int:
        """KV heads, as engines number them; 0 if it has none."""
        return 0

    @property
    def key_dim(self) -> int:
        """Numbers of a query and key of one head."""
        return 0

    @property
    def is_gated(self) -> bool:
        """Whether the heads' outputs are multiplied by a gate with a projection of its own."""
        return False

    @property
    def token_indexer(self) -> Indexer | None:
        """What chooses among all tokens those to which it attends, whether the layer has it or an earlier one does."""
        return None

    @property
    def owns_indexer(self) -> bool:
        return True

    @property
    def immovable(self) -> str:
        return ""

    @property
    def all_heads_share(self) -> str:
        return ""

    @property
    def limit(self) -> int | None:
        """The context beyond which it attends to no more tokens, or None."""
        return None

    @property
    def what_ranks_divide(self) -> str:
        """What tensor-parallel ranks share evenly beside its heads, in words."""
        return "the heads of all its layers"

    def divides(self, ranks: int) -> bool:
        """Return whether so many tensor-parallel ranks can share its heads."""
        return True

    def params(self, hidden: int) -> float:
        """Return its parameters."""
        raise NotImplementedError

    def kv_bytes(self, element: float) -> float:
        """Return the KV bytes of one token."""
        return 0.0

    def kept_tokens(self, context: float) -> float:
        """Return the tokens of a context whose KV is needed later on."""
        return context

    def attended(self, context: float, element: float) -> float:
        """Return the tokens to which a query with this context attends."""
        return context

    def read_bytes(self, context: float, element: float) -> float:
        """Return the bytes of KV that a query with this context reads."""
        return self.kv_bytes(element) * self.attended(context, element)

    def window_read_bytes(self, element: float) -> float:
        """Return the part of `read_bytes` that is read even from a short context."""
        return 0.0

    def decode_flops(self) -> float:
        """Return the FLOPs of decode attention for each token attended to."""
        return 0.0

    def prefill_flops(self) -> float:
        """Return the FLOPs of prefill attention for each token attended to."""
        return self.decode_flops()

    def scan_flops(self, context: float) -> float:
        """Return the FLOPs for choosing what a query attends to, on every rank."""
        return 0.0

    def token_flops(self) -> float:
        """Return the FLOPs of updating and reading states for one token."""
        return 0.0

    def state_bytes(self, element: float) -> float:
        """Return the bytes that one request keeps, independently of its context."""
        return 0.0

    def chunk_state_bytes(self, element: float) -> float:
        """Return the bytes kept of each token of a chunk while it is computed, beside its KV."""
        return 0.0

    def state_traffic_bytes(self, queries: float, element: float) -> float:
        """Return the bytes of states that one request's ``queries`` tokens read and write.

        A state is read once, and written for every token, since any may be the last accepted one.
        """
        return (1.0 + queries) * self.state_bytes(element)

    def exchange_elements_per_head(self) -> float:
        """Return the numbers per token and query head that a primary and an attention worker exchange."""
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped(Mixer):
    """Softmax attention whose query heads share KV heads, evenly; over the whole context or over a window.

    Attributes:
        query_heads, kv_heads: numbers of heads.
        head_dim: numbers of a query and key.
        value_dim: numbers of a value; None: as many as of a key.
        window: the last tokens to which it attends; None: all.
        gated: the heads' outputs are multiplied by a gate with a projection of its own (Qwen3.5).
        key_is_value: keys and values have one projection (Gemma 4); both are cached all the same.
        has_own_kv: it has KV of its own; otherwise it attends to that of an earlier layer (Gemma 3n).
        indexer: chooses the tokens to attend to (MiniMax-M3); None: it attends to all.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    window: int | None = None
    gated: bool = False
    key_is_value: bool = False
    has_own_kv: bool = True
    indexer: Indexer | None = None

    kernel: ClassVar[Kernel] = Kernel.GROUPED

    def __post_init__(self) -> None:
        for name in ("query_heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InvalidProblemError(f"{name} is {getattr(self, name)}, must be >= 1")
        if self.query_heads % self.kv_heads:
            raise InvalidProblemError(
                f"q_heads is {self.query_heads}, must be a multiple of kv_heads ({self.kv_heads})"
            )

    @property
    def name(self) -> str:
        return "mha" if self.query_heads == self.kv_heads else "gqa"

    @property
    def q_heads(self) -> int:
        return self.query_heads

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads

    @property
    def key_dim(self) -> int:
        return self.head_dim

    @property
    def is_gated(self) -> bool:
        return self.gated

    @property
    def token_indexer(self) -> Indexer | None:
        return self.indexer

    @property
    def values(self) -> int:
        """Numbers of a value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def immovable(self) -> str:
        if self.indexer is not None:
            return "attention is sparse, and all heads share its choice of tokens"
        return "" if self.has_own_kv else "layers attend to the KV of others"

    @property
    def all_heads_share(self) -> str:
        return "" if self.indexer is None else "a choice of tokens"

    @property
    def limit(self) -> int | None:
        return self.window if self.indexer is None else self.indexer.top_tokens

    def divides(self, ranks: int) -> bool:
        return not (self.query_heads % ranks or (self.kv_heads % ranks and ranks % self.kv_heads))

    def params(self, hidden: int) -> float:
        keys_and_values = self.head_dim + (0 if self.key_is_value else self.values)
        gate = self.values if self.gated else 0
        heads = self.query_heads * (self.head_dim + self.values + gate)
        index = 0 if self.indexer is None else self.indexer.params(hidden, hidden)
        return hidden * (heads + (self.kv_heads * keys_and_values if self.has_own_kv else 0)) + index

    def kv_bytes(self, element: float) -> float:
        if not self.has_own_kv:
            return 0.0
        key = 0.0 if self.indexer is None else self.indexer.key_bytes
        return self._token_bytes(element) + key

    def _token_bytes(self, element: float) -> float:
        return self.kv_heads * (self.head_dim + self.values) * element

    def kept_tokens(self, context: float) -> float:
        return context if self.window is None else min(context, float(self.window))

    def attended(self, context: float, element: float) -> float:
        if self.indexer is not None:
            return _chosen(context, self.indexer, self._token_bytes(element))
        return self.kept_tokens(context)

    def read_bytes(self, context: float, element: float) -> float:
        key = 0.0 if self.indexer is None else self.indexer.key_bytes
        return (self._token_bytes(element) + key) * self.attended(context, element)

    def decode_flops(self) -> float:
        return 2.0 * self.query_heads * (self.head_dim + self.values)

    def exchange_elements_per_head(self) -> float:
        return (self.head_dim + self.values) * (1.0 + self.kv_heads / self.query_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent(Mixer):
    """Multi-head latent attention (DeepSeek-V2): one compressed latent per token serves all heads.

    Attributes:
        q_lora_rank: size of the compressed queries; None: queries are projected directly.
        gated: the heads' outputs are multiplied by a gate with a projection of its own (Kimi K3).
        indexer: chooses the tokens to attend to (DeepSeek-V3.2); None: it attends to all.
        has_own_indexer: the layer has the indexer; otherwise it attends to what an earlier layer chose (GLM-5.2).
    """

    query_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    gated: bool = False
    indexer: Indexer | None = None
    has_own_indexer: bool = True

    kernel: ClassVar[Kernel] = Kernel.LATENT

    def __post_init__(self) -> None:
        if self.indexer is not None and self.q_lora_rank is None:
            raise InvalidProblemError("an indexer needs latent attention with compressed queries")

    @property
    def name(self) -> str:
        return "mla"

    @property
    def q_heads(self) -> int:
        return self.query_heads

    @property
    def groups(self) -> int:
        return 1

    @property
    def num_kv_heads(self) -> int:
        """Those that the latent expands to."""
        return self.query_heads

    @property
    def key_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def is_gated(self) -> bool:
        return self.gated

    @property
    def token_indexer(self) -> Indexer | None:
        return self.indexer

    @property
    def owns_indexer(self) -> bool:
        return self.has_own_indexer

    @property
    def immovable(self) -> str:
        if self.indexer is not None:
            return "attention is sparse, and all heads share its choice of tokens"
        return ""

    @property
    def all_heads_share(self) -> str:
        return "" if self.indexer is None else "a choice of tokens"

    @property
    def limit(self) -> int | None:
        return None if self.indexer is None else self.indexer.top_tokens

    def divides(self, ranks: int) -> bool:
        return self.query_heads % ranks == 0

    def params(self, hidden: int) -> float:
        qk, heads = self.key_dim, self.query_heads
        query = hidden * heads * qk if self.q_lora_rank is None else self.q_lora_rank * (hidden + heads * qk)
        latent = hidden * self._latent
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        output = heads * self.v_head_dim * hidden * (2 if self.gated else 1)
        return query + latent + expand + output + self._indexer_params(hidden)

    def _indexer_params(self, hidden: int) -> int:
        if self.indexer is None or self.q_lora_rank is None or not self.has_own_indexer:
            return 0
        return self.indexer.params(hidden, self.q_lora_rank)

    @property
    def _latent(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def _key_bytes(self) -> float:
        return 0.0 if self.indexer is None or not self.has_own_indexer else self.indexer.key_bytes

    def kv_bytes(self, element: float) -> float:
        return self._latent * element + self._key_bytes

    def attended(self, context: float, element: float) -> float:
        if self.indexer is None:
            return context
        if not self.has_own_indexer:
            return min(context, float(self.indexer.top_tokens))
        return _chosen(context, self.indexer, self._latent * element)

    def decode_flops(self) -> float:
        """Return those of the absorbed form, where scores and values are in the latent space."""
        return 2.0 * self.query_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)

    def prefill_flops(self) -> float:
        """Return those of expanded heads; chosen tokens are read from the latent space, so in the absorbed form."""
        if self.indexer is not None:
            return self.decode_flops()
        return 2.0 * self.query_heads * (self.key_dim + self.v_head_dim)

    def exchange_elements_per_head(self) -> float:
        return self._latent + self.kv_lora_rank + self._latent / self.query_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed(Mixer):
    """Compressed attention (DeepSeek-V4): one vector per token is key and value of all heads, and runs of tokens are
    compressed into entries of that size.

    A layer attends to the vectors of the last tokens, and to entries: sparse layers (CSA) to those that an indexer
    chooses, heavy ones (HCA) to all of their few, and any other layer to none. Queries and the output have projections
    of low rank.

    Attributes:
        window: the tokens whose vectors a layer keeps and attends to, whole.
        ratio: tokens per entry; None: the layer has a window alone.
        indexer: chooses the entries to attend to, ``top_tokens`` of them; None: the layer attends to all.
        rope_head_dim: numbers of a vector or entry that keep 16 bits where others have 8.
        q_lora_rank: size of the compressed queries.
        o_groups, o_lora_rank: groups of heads in the output projection, and the size to which it first reduces each.
    """

    query_heads: int
    head_dim: int
    window: int
    ratio: int | None
    indexer: Indexer | None
    rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int

    kernel: ClassVar[Kernel] = Kernel.COMPRESSED
    divides_states: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("window", "q_lora_rank", "o_groups", "o_lora_rank", "query_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InvalidProblemError(f"compressed.{name} is {getattr(self, name)}, must be >= 1")
        if self.ratio is not None and self.ratio < 1:
            raise InvalidProblemError(f"a compressed ratio is {self.ratio}, must be >= 1")
        if not 0 <= self.rope_head_dim <= self.head_dim:
            limit = f"must be 0 to head_dim ({self.head_dim})"
            raise InvalidProblemError(f"compressed.rope_head_dim is {self.rope_head_dim}, {limit}")
        if self.query_heads % self.o_groups:
            limit = f"must divide q_heads ({self.query_heads})"
            raise InvalidProblemError(f"compressed.o_groups is {self.o_groups}, {limit}")

    @property
    def name(self) -> str:
        return "gqa"

    @property
    def q_heads(self) -> int:
        return self.query_heads

    @property
    def groups(self) -> int:
        return 1

    @property
    def num_kv_heads(self) -> int:
        return 1

    @property
    def key_dim(self) -> int:
        return self.head_dim

    @property
    def immovable(self) -> str:
        return "attention is compressed, and all heads share its entries and windows"

    @property
    def all_heads_share(self) -> str:
        return "compressors"

    @property
    def limit(self) -> int | None:
        if self.indexer is None or self.ratio is None:
            return None
        return max(self.window, self.indexer.top_tokens * self.ratio)

    @property
    def what_ranks_divide(self) -> str:
        return f"the {self.o_groups} groups of heads in its output projection"

    def divides(self, ranks: int) -> bool:
        """Return whether ranks hold whole groups of the output projection (vLLM 0.32, ``DeepseekV4Attention``)."""
        return self.query_heads % ranks == 0 and self.o_groups % ranks == 0

    def params(self, hidden: int) -> float:
        """Return the parameters of queries, the vector, the output, and compressors.

        A compressor projects to numbers and their weights, in sparse layers (whose runs overlap) twice; the indexer has
        one of its own (transformers 5.23, ``DeepseekV4Attention`` and ``DeepseekV4Indexer``).
        """
        width, rank = self.query_heads * self.head_dim, self.q_lora_rank
        output = width * self.o_lora_rank + self.o_groups * self.o_lora_rank * hidden
        every = rank * (hidden + width) + hidden * self.head_dim + output
        if self.indexer is not None:
            index = self.indexer
            of_indexer = rank * index.heads * index.head_dim + hidden * index.heads
            return every + 4 * hidden * (self.head_dim + index.head_dim) + of_indexer
        return every + (0 if self.ratio is None else 2 * hidden * self.head_dim)

    def entry_bytes(self, element: float) -> float:
        """Return the bytes of a compressed entry, or of one token's vector in a window.

        In FP8 the numbers with rotary embedding keep 16 bits, and 64 numbers share a scale of a byte: 584 bytes of 512
        numbers (vLLM 0.32, ``DeepseekV4Attention.get_kv_cache_spec``).
        """
        if element >= 2.0:
            return self.head_dim * element
        return (self.head_dim - self.rope_head_dim) * element + 2.0 * self.rope_head_dim + self.head_dim / 64

    def kv_bytes(self, element: float) -> float:
        if self.ratio is None:
            return 0.0
        key = 0.0 if self.indexer is None else self.indexer.key_bytes
        return (self.entry_bytes(element) + key) / self.ratio

    def attended(self, context: float, element: float) -> float:
        """Return the window's tokens and the entries; keys that are scored count as `scan_flops`."""
        return min(context, float(self.window)) + self._entries(context)

    def _entries(self, context: float) -> float:
        if self.ratio is None:
            return 0.0
        entries = context / self.ratio
        return entries if self.indexer is None else min(entries, float(self.indexer.top_tokens))

    def read_bytes(self, context: float, element: float) -> float:
        keys = 0.0 if self.indexer is None or self.ratio is None else context / self.ratio * self.indexer.key_bytes
        return self.attended(context, element) * self.entry_bytes(element) + keys

    def window_read_bytes(self, element: float) -> float:
        return self.window * self.entry_bytes(element)

    def decode_flops(self) -> float:
        return 4.0 * self.query_heads * self.head_dim

    def scan_flops(self, context: float) -> float:
        """Return those of scoring keys. Ranks do not divide the indexer's heads (vLLM 0.32, ``DeepseekV4Indexer``)."""
        if self.indexer is None or self.ratio is None:
            return 0.0
        return 2.0 * context / self.ratio * self.indexer.heads * self.indexer.head_dim

    @property
    def _input_bytes(self) -> float:
        """The bytes that compressors, the indexer's among them, keep of one token, in 32 bits."""
        if self.indexer is not None:
            return 4.0 * 4 * (self.head_dim + self.indexer.head_dim)
        return 0.0 if self.ratio is None else 4.0 * 2 * self.head_dim

    def state_bytes(self, element: float) -> float:
        """Return those of the window's vectors, and of what compressors keep: a token's numbers and their weights, of
        the run that is not complete yet, and in sparse layers, whose tokens have both twice, of the run before it
        (vLLM 0.32, ``CompressorStateCache``).
        """
        runs = 1 if self.indexer is None else 2
        return self.window * self.entry_bytes(element) + runs * (self.ratio or 0) * self._input_bytes

    def chunk_state_bytes(self, element: float) -> float:
        """Return those of windows and compressors' inputs, which vLLM 0.32 treats as KV of sliding windows, and
        allocates for the whole chunk (``SlidingWindowSpec.max_admission_blocks_per_request``).
        """
        return self.entry_bytes(element) + self._input_bytes

    def state_traffic_bytes(self, queries: float, element: float) -> float:
        """Return those of compressors' inputs, written for every token, and all read when a run is complete.

        The window is read as KV is (`read_bytes`).
        """
        return queries * (2 if self.indexer is None else 3) * self._input_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrent(Mixer):
    """Linear attention (gated delta rule) or a state space (Mamba-2), which keeps a state for each request, not KV.

    Attributes:
        weights: parameters of its projections and convolutions.
        request_bytes: bytes of one request's state, in all heads.
        flops: FLOPs of the recurrence for one token, without the projections.
        heads: its heads, which ranks divide; None: any number of ranks can.
    """

    weights: int
    request_bytes: float
    flops: float = 0.0
    heads: int | None = None

    kernel: ClassVar[Kernel] = Kernel.RECURRENT

    @property
    def name(self) -> str:
        return "linear"

    @property
    def immovable(self) -> str:
        return "layers keep states, which cannot be divided among workers"

    @property
    def all_heads_share(self) -> str:
        return "states"

    def divides(self, ranks: int) -> bool:
        return self.heads is None or self.heads % ranks == 0

    def params(self, hidden: int) -> float:
        return self.weights

    def attended(self, context: float, element: float) -> float:
        return 0.0

    def token_flops(self) -> float:
        return self.flops

    def state_bytes(self, element: float) -> float:
        return self.request_bytes


def _chosen(context: float, indexer: Indexer, token_bytes: float) -> float:
    """Return the tokens that a query attends to where an indexer chooses them.

    It reads the keys of the whole context to choose ``top_tokens``; it counts by the bytes that it reads.
    """
    scanned = indexer.key_bytes / (token_bytes + indexer.key_bytes)
    return (1.0 - scanned) * min(context, float(indexer.top_tokens)) + scanned * context
