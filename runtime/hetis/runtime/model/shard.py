"""How one tensor-parallel rank's share of a layer is cut out of it."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.runtime.model.config import ModelConfig
from hetis.runtime.model.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One tensor-parallel rank: an even part of the heads, of the MLP and of the vocabulary.

    A vocabulary that the ranks do not divide is the first rank's alone.

    Attributes:
        rank: from 0.
        size: ranks; a divisor or a multiple of the KV heads, and a divisor of query heads and intermediate size.
    """

    rank: int = 0
    size: int = 1

    def part(self, total: int) -> slice:
        """This rank's share of ``total``."""
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def vocabulary(self, config: ModelConfig) -> slice | None:
        """Tokens of this rank; None: it has none."""
        if config.vocab % self.size == 0:
            return self.part(config.vocab)
        return slice(0, config.vocab) if self.rank == 0 else None

    def kv_heads(self, config: ModelConfig) -> range:
        """KV heads of this rank; where ranks outnumber them several hold the same one."""
        if self.size <= config.kv_heads:
            return range(config.kv_heads)[self.part(config.kv_heads)]
        head = self.rank * config.kv_heads // self.size
        return range(head, head + 1)

    def check(self, config: ModelConfig) -> None:
        groups = config.kv_heads
        if config.q_heads % self.size or config.intermediate % self.size or (groups % self.size and self.size % groups):
            raise ModelError(
                f"tensor parallelism of {self.size} does not divide {config.q_heads} query heads, {groups} KV heads "
                f"and an intermediate size of {config.intermediate}"
            )
