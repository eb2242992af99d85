"""The kinds of attention: values that say what a layer's attention holds, reads, computes and demands.

A new kind is a class like these; nothing else depends on the kind of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model.mixer import Indexer, Kernel, Mixer


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

    def copied_params(self, hidden: int) -> float:
        return 0.0 if self.indexer is None else self.indexer.params(hidden, hidden)

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

    def copied_params(self, hidden: int) -> float:
        """Return those of the projections to what all heads share (vLLM 0.32, ``DeepseekV2MLAAttention``)."""
        return hidden * ((self.q_lora_rank or 0) + self._latent) + self._indexer_params(hidden)

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
