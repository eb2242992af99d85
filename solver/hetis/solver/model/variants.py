"""How engines may be configured to run a model: with drafted tokens, and in a precision of each GPU type."""

from __future__ import annotations

from dataclasses import dataclass


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
