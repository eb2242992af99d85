"""Compressed attention, a kind of attention (DeepSeek-V4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model.mixer import Indexer, Kernel, Mixer


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
        width = self.query_heads * self.head_dim
        output = width * self.o_lora_rank + self.o_groups * self.o_lora_rank * hidden
        return self.copied_params(hidden) + self.q_lora_rank * width + output

    def copied_params(self, hidden: int) -> float:
        """Return those of what all heads share: low-rank queries, the vector, compressors and the indexer."""
        every = hidden * (self.q_lora_rank + self.head_dim)
        if self.indexer is not None:
            index = self.indexer
            of_indexer = self.q_lora_rank * index.heads * index.head_dim + hidden * index.heads
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
