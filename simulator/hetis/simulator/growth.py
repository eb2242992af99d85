"""The KV that a request holds and the tokens it attends to, as its context grows."""

from __future__ import annotations

from hetis.solver.model import ModelSpec


class KvGrowth:
    """Growth of KV and attended tokens with the context of a request: linear, except for a sliding window."""

    __slots__ = ("block_tokens", "cached_limit", "slope", "window")

    def __init__(self, model: ModelSpec, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        unlimited = 1 << 60
        self.window = unlimited if model.sliding_window is None else model.sliding_window
        every = model.sliding_window_every
        self.slope = 1.0 - 1.0 / every if model.sliding_window is not None else 1.0  # attended beyond the window
        self.cached_limit = self.window if every == 1 else unlimited

    def blocks(self, tokens: int) -> int:
        """Return the KV blocks of a request with this number of tokens."""
        return -(-min(tokens, self.cached_limit) // self.block_tokens)

    def attended(self, tokens: float) -> float:
        """Return the tokens to which a request with this context attends, averaged over layers."""
        return tokens if tokens <= self.window else self.window + (tokens - self.window) * self.slope
