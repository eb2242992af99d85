"""Whether two devices hold the same KV, told without sending it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

# Any odd numbers do that are not small: a place's weight is its number times this, K's and V's differ.
PLACE, VALUES = 0x1E3779B97F4A7C15, 0x5DEECE66D

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(k: torch.Tensor, v: torch.Tensor) -> npt.NDArray[np.int64]:
    """One number per layer for K and V, each [layers, positions, d]; their bits and order count, not the device."""
    sums: npt.NDArray[np.int64] = (_sums(k) + VALUES * _sums(v)).cpu().numpy()
    return sums


def _sums(x: torch.Tensor) -> torch.Tensor:
    """Weighted sums of the bits as integers, modulo 2^64, in whatever order they are added, shape [layers]."""
    bits = x.contiguous().view(_INTEGERS[x.element_size()]).flatten(1).to(torch.int64)
    places = torch.arange(1, bits.shape[1] + 1, device=x.device) * PLACE | 1
    return (bits * places).sum(dim=1)
