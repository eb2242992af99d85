"""KV of requests: what they hold and attend to as their context grows, and how many blocks fit in a stage."""

from __future__ import annotations

from hetis.solver.check.memory import rank_fixed_bytes, rank_prompt_bytes, rank_state_bytes, usable_bytes
from hetis.solver.check.replica_shapes import PoolShape, StageShape
from hetis.solver.check.setting import Setting
from hetis.solver.model import ModelSpec
from hetis.solver.problem import PlacementProblem


class KvGrowth:
    """Growth of a request's KV and attended tokens with its context: linear below and above a window.

    The window is that of sliding-window attention or, with an indexer, the number of tokens it selects. All figures are
    means over layers. With compressed attention, attended tokens are those whose KV is read, and every context counts
    as having the whole window of uncompressed tokens.

    Attributes:
        block_tokens: tokens per KV block.
        window: context beyond which some layers attend to no more tokens; longer than any context if there is none.
        least: tokens that any context attends to beside the growing ones.
        first_slope, slope: further tokens attended to for each further token of context, up to the window and beyond.
        late_block_tokens: further tokens of context for each further block beyond the window: more than
            ``block_tokens`` if windows free KV; 0 if KV no longer grows.
    """

    __slots__ = ("block_tokens", "first_slope", "late_block_tokens", "least", "slope", "window")

    def __init__(self, model: ModelSpec, block_tokens: int) -> None:
        self.block_tokens = self.late_block_tokens = block_tokens
        self.least = model.window_read_tokens()
        self.window = 1 << 60 if model.attention_limit is None else model.attention_limit
        self.first_slope = self.slope = 1.0
        if self.window < 1 << 60:
            at_window = model.read_tokens(float(self.window))
            self.first_slope = (at_window - self.least) / self.window
            self.slope = model.read_tokens(self.window + 1.0) - at_window
            growth = model.cached_growth(float(self.window))
            self.late_block_tokens = round(block_tokens / growth) if growth else 0

    @property
    def frees(self) -> bool:
        """Return whether KV beyond the window is freed in some layers."""
        return self.late_block_tokens != self.block_tokens

    def blocks(self, tokens: int) -> int:
        """Return the number of KV blocks of a request with this context."""
        if tokens <= self.window or not self.frees:
            return -(-tokens // self.block_tokens)
        late = -(-(tokens - self.window) // self.late_block_tokens) if self.late_block_tokens else 0
        return -(-self.window // self.block_tokens) + late

    def cached(self, tokens: int) -> int:
        """Return how many tokens of KV a request with this context keeps, in whole tokens of all layers."""
        if tokens <= self.window or not self.frees:
            return tokens
        late = (tokens - self.window) * self.block_tokens // self.late_block_tokens if self.late_block_tokens else 0
        return self.window + late

    def attended(self, tokens: float) -> float:
        """Return how many tokens a request with this context attends to."""
        if tokens <= self.window:
            return self.least + self.first_slope * tokens
        return self.least + self.first_slope * self.window + (tokens - self.window) * self.slope


def rank_room_bytes(setting: Setting, shape: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return the bytes that a rank has for KV blocks, after weights, activations and the engine's reserve.

    If a pool holds some of the head groups, the rank still keeps those of the current prompts, for which it reserves
    memory as planned; likewise for the states that linear attention keeps per request.
    """
    taken = rank_fixed_bytes(setting, shape, is_first=is_first, is_last=is_last)
    taken += rank_prompt_bytes(setting, shape, is_first=is_first)
    taken += rank_state_bytes(setting, shape, is_first=is_first, is_last=is_last)
    return max(0.0, usable_bytes(setting, shape) - taken)


def card_room_bytes(problem: PlacementProblem, pool: PoolShape) -> float:
    """Return the bytes that an attention worker has for KV: all of its memory except the engine's reserve."""
    return float(problem.profile_of(pool.gpu, pool.reserved_bytes).room_bytes)


def group_blocks(room_bytes: float, model: ModelSpec, *, layers: int, groups: int, block_tokens: int) -> int:
    """Return how many KV blocks of ``groups`` head groups each fit in ``room_bytes``, per layer, in all ``layers``."""
    block_bytes = layers * groups * block_tokens * model.kv_bytes_per_token_group()
    return int(room_bytes / block_bytes * (1 + 1e-12)) if block_bytes > 0 else 1 << 40


class KvRoom:
    """KV blocks of one copy of a stage; a block holds ``block_tokens`` tokens of one request, for all its head groups.

    ``promised`` blocks are not in use yet: prompts that were admitted will fill them.
    """

    __slots__ = ("promised", "total", "used")

    def __init__(self, total: int) -> None:
        self.total, self.used, self.promised = total, 0, 0

    def admits(self, blocks: int, spare: int) -> bool:
        """Return whether a prompt of this size may start; ``spare`` blocks stay free unless the copy holds nothing."""
        taken = self.used + self.promised
        return taken + blocks + (spare if taken else 0) <= self.total
