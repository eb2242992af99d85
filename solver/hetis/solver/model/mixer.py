"""What every kind of attention says of itself, and the indexer that some have.

Figures are of one layer, of all heads together; the model around it passes its hidden size, or bytes per element of KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


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

    def copied_params(self, hidden: int) -> float:
        """Return the parameters of which every tensor-parallel rank has a copy."""
        return 0.0

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
