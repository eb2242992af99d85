"""The shape of the KV of one stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """The common shape of one stage's virtual sequences. A device is made for one shape.

    Attributes:
        layers: of the stage.
        head_dim: d, numbers per head.
        queries_per_group: r, query heads that share a KV head.
        page_tokens: token slots of a page, which belongs to one virtual sequence and spans all layers.
        dtype: of K, V, queries and outputs: float32, float64, bfloat16 or float16.
        scale: factor of the scores before the softmax.
        windows: for each layer, the number of positions that attention reaches back, including the own one; 0: all.
        soft_cap: cap of the scaled scores, ``cap * tanh(score / cap)``, as in Gemma 2; 0: none.
    """

    layers: int
    head_dim: int
    queries_per_group: int
    page_tokens: int
    dtype: str
    scale: float
    windows: tuple[int, ...]
    soft_cap: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy type; for bfloat16, which numpy lacks, the type of its words."""
        return _NUMPY_DTYPES[self.dtype]

    @property
    def item_bytes(self) -> int:
        """The bytes of one number."""
        return _NUMPY_DTYPES[self.dtype].itemsize

    @property
    def page_bytes(self) -> int:
        """The bytes of K and V of one page, all layers."""
        return 2 * self.layers * self.page_tokens * self.head_dim * self.item_bytes

    def pages(self, tokens: int) -> int:
        """Return the number of pages that a virtual sequence with this many positions takes."""
        return -(-tokens // self.page_tokens)


class SequenceKey(NamedTuple):
    """The key of a virtual sequence. ``incarnation`` counts how often its request lost its KV: older ones are void."""

    request: int
    incarnation: int
    head: int


_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype({"bfloat16": "uint16"}.get(name, name)) for name in ("float32", "float64", "bfloat16", "float16")
}
