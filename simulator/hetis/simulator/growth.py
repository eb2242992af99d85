"""The KV that a request holds and the tokens it attends to, as its context grows."""

from __future__ import annotations

from hetis.solver.model import ModelSpec


class KvGrowth:
    """Growth of KV and attended tokens with the context of a request: linear on both sides of a window.

    The window is a sliding one or, with an indexer, the tokens that it chooses. All figures are the mean over layers.

    Attributes:
        block_tokens: tokens of a KV block.
        window: context from which on some layers attend to no more tokens; beyond any context if there is none.
        first_slope, slope: tokens attended to more for each further token of the context, up to the window and beyond.
        late_block_tokens: further tokens of the context for each further block beyond the window: more than
            ``block_tokens`` where windows free KV; 0 if KV grows no more.
    """

    __slots__ = ("block_tokens", "first_slope", "late_block_tokens", "slope", "window")

    def __init__(self, model: ModelSpec, block_tokens: int) -> None:
        self.block_tokens = self.late_block_tokens = block_tokens
        limits = [model.sliding_window, model.indexer.top_tokens if model.indexer is not None else None]
        self.window = min((limit for limit in limits if limit is not None), default=1 << 60)
        self.first_slope = self.slope = 1.0
        if self.window < 1 << 60:
            at_window = model.attended_tokens(float(self.window))
            self.first_slope = at_window / self.window
            self.slope = model.attended_tokens(self.window + 1.0) - at_window
            growth = model.cached_growth(float(self.window))
            self.late_block_tokens = round(block_tokens / growth) if growth else 0

    @property
    def frees(self) -> bool:
        """Return whether KV beyond the window is freed in some layers."""
        return self.late_block_tokens != self.block_tokens

    def blocks(self, tokens: int) -> int:
        """Return the KV blocks of a request with this number of tokens."""
        if tokens <= self.window or not self.frees:
            return -(-tokens // self.block_tokens)
        late = -(-(tokens - self.window) // self.late_block_tokens) if self.late_block_tokens else 0
        return -(-self.window // self.block_tokens) + late

    def cached(self, tokens: int) -> int:
        """Return the tokens whose KV a request with this context keeps, in whole tokens of all layers."""
        if tokens <= self.window or not self.frees:
            return tokens
        late = (tokens - self.window) * self.block_tokens // self.late_block_tokens if self.late_block_tokens else 0
        return self.window + late

    def attended(self, tokens: float) -> float:
        """Return the tokens to which a request with this context attends."""
        if tokens <= self.window:
            return self.first_slope * tokens
        return self.first_slope * self.window + (tokens - self.window) * self.slope
