"""KV of head groups in vLLM's blocks, read and written as plain tensors whatever the base backend's layout.

Backends store K and V of a block as suits their kernels (transposed, or packed for matrix units). Writes go through
the backend itself. For reads, the place of every number in a block is determined once: numbers that encode their own
place are written to a scratch block, and looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hetis.runtime.vllm.batch import IntArray

if TYPE_CHECKING:
    from hetis.runtime.vllm.backend import HeadGroupImpl

_BASE = 128  # a base whose digits every dtype holds exactly


class BlockStore:
    """The KV of one rank: all layers of its stage."""

    def __init__(self, layers: Sequence[Any], block_tokens: int) -> None:
        """Initialise with vLLM's attention layers, in order, with their caches bound."""
        self._layers, self._block_tokens = tuple(layers), block_tokens
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, blocks: IntArray, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of K and V at positions ``first`` to ``last - 1`` of one head group, each [layers, positions,
        d].
        """
        k_places, v_places = self._found_places()
        positions = np.arange(first, last)
        numbers = torch.from_numpy(blocks[positions // self._block_tokens])
        within = torch.from_numpy(positions % self._block_tokens)
        rows = [layer.kv_cache.flatten(1) for layer in self._layers]
        k, v = (
            torch.stack([row[numbers[:, None].to(row.device), places[within].to(row.device)] for row in rows])
            for places in (k_places, v_places)
        )
        return k, v

    def write(self, blocks: IntArray, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K and V, each [layers, positions, d], to the positions from ``first`` on."""
        positions = np.arange(first, first + k.shape[1])
        slots = blocks[positions // self._block_tokens] * self._block_tokens + positions % self._block_tokens
        for number, layer in enumerate(self._layers):
            cache = layer.kv_cache
            keys, values = (x[number].unsqueeze(1).to(cache).contiguous() for x in (k, v))
            _impl(layer).store(layer, keys, values, cache, torch.from_numpy(slots).to(cache.device))

    # --- inside

    def _found_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the place of each number of K and V in a block, each [block tokens, d]."""
        if self._places is None:
            layer = self._layers[0]
            head_dim, size = _impl(layer).head_size, self._block_tokens
            cache = torch.zeros_like(layer.kv_cache[:1])
            here = torch.arange(size * head_dim).view(size, 1, head_dim)
            slots = torch.arange(size, device=cache.device)
            digits = []
            for power in (1, _BASE, _BASE**2):
                k = ((here // power) % _BASE + 1).to(cache)  # 0 means no place
                v = -k
                _impl(layer).store(layer, k.contiguous(), v.contiguous(), cache, slots)
                digits.append(cache.flatten().float().round().long().cpu())
            value = sum((digit.abs() - 1) * _BASE**i for i, digit in enumerate(digits))
            self._places = (
                _inverse(value, digits[0] > 0, size, head_dim),
                _inverse(value, digits[0] < 0, size, head_dim),
            )
        return self._places


def _inverse(value: torch.Tensor | int, chosen: torch.Tensor, size: int, head_dim: int) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    places = torch.full((size * head_dim,), -1, dtype=torch.int64)
    at = torch.nonzero(chosen).flatten()
    places[value[at]] = at
    assert int(places.min()) >= 0, "the backend does not keep every number of a block"
    return places.view(size, head_dim)


def _impl(layer: Any) -> HeadGroupImpl:
    impl: HeadGroupImpl = layer.impl
    return impl
