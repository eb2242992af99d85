"""The rank of this process: vLLM makes attention layers and connector apart, and both need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetis.runtime.vllm.rank import Rank

_rank: Rank | None = None


def current_rank() -> Rank:
    """The rank that the connector has made. Raises RuntimeError where vLLM was started without it."""
    if _rank is None:
        raise RuntimeError("hetis needs its connector: start vLLM with --kv-transfer-config as docs/vllm.md says")
    return _rank


def set_current_rank(rank: Rank | None) -> None:
    """Called by the connector."""
    global _rank
    _rank = rank
