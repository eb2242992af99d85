"""The kernels of `hetis.runtime.model.rowwise`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hetis.runtime.model.compiled import kernel

Floats = npt.NDArray[np.floating[Any]]


@kernel
def rms_norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """Rows of x and out [T, size]."""
    for t in range(x.shape[0]):
        total = x.dtype.type(0)
        for i in range(x.shape[1]):
            total += x[t, i] * x[t, i]
        factor = x.dtype.type(1 / np.sqrt(total / x.dtype.type(x.shape[1]) + x.dtype.type(eps)))
        for i in range(x.shape[1]):
            out[t, i] = x[t, i] * factor * weight[i]


@kernel
def rotate(x: Floats, heads: int, cos: Floats, sin: Floats) -> None:
    """Rotates the first ``heads`` of x [T, all heads, d] in place; cos and sin [T, d / 2]."""
    half = cos.shape[1]
    for t in range(x.shape[0]):
        for h in range(heads):
            for i in range(half):
                first, second = x[t, h, i], x[t, h, half + i]
                x[t, h, i] = first * cos[t, i] - second * sin[t, i]
                x[t, h, half + i] = second * cos[t, i] + first * sin[t, i]
