"""What the KV of one stage looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """What the virtual sequences of one stage have in common; a device is made for one shape.

    Attributes:
        layers: of the stage.
        head_dim: d, numbers per head.
        queries_per_group: r, query heads that share a KV head.
        page_tokens: token slots of a page, which belongs to one virtual sequence and spans all layers.
        dtype: of K, V, queries and outputs: float32, float64, bfloat16 or float16.
        scale: what scores are multiplied by before the softmax.
        windows: of each layer, how many positions back attention reaches, itself counted; 0: all.
        soft_cap: cap of the scaled scores, ``cap * tanh(score / cap)``, as Gemma 2 has it; 0: none.
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
        """The type of the words of a bfloat16, which numpy does not have."""
        return _NUMPY_DTYPES[self.dtype]

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return _NUMPY_DTYPES[self.dtype].itemsize

    @property
    def page_bytes(self) -> int:
        """K and V of one page, all layers."""
        return 2 * self.layers * self.page_tokens * self.head_dim * self.item_bytes

    def pages(self, tokens: int) -> int:
        """Pages that a virtual sequence of so many positions takes."""
        return -(-tokens // self.page_tokens)


class SequenceKey(NamedTuple):
    """Names a virtual sequence. ``incarnation`` counts how often the request has lost its KV: older ones are void."""

    request: int
    incarnation: int
    head: int


_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype({"bfloat16": "uint16"}.get(name, name)) for name in ("float32", "float64", "bfloat16", "float16")
}
