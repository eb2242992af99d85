"""The rank of this process: vLLM creates attention layers and connector separately, and both need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetis.runtime.vllm.rank import Rank

_rank: Rank | None = None


def current_rank() -> Rank:
    """Return the rank that the connector has made. Raises RuntimeError if vLLM was started without it."""
    if _rank is None:
        raise RuntimeError("hetis needs its connector: start vLLM with --kv-transfer-config as docs/vllm.md says")
    return _rank


def set_current_rank(rank: Rank | None) -> None:
    """Set the rank. Called by the connector."""
    global _rank
    _rank = rank
