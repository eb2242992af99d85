"""Linear layers: plain torch, or packed once by oneDNN where that is faster.

On AMD CPUs torch hands float32 to MKL, which is slow there; the same product over weights packed by oneDNN is up to
1.7 times as fast for 16 rows. The operations are private to torch: they are tried once, and plain torch is used where
they are missing or answer otherwise.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

PACKED_FOR_ROWS = 16  # a typical decode batch; packing for 2,048 rows instead changed no time by more than 5%


class Linear:
    """``x W^T + b`` for x of shape [T, in]; W is [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional.linear(x, self.weight, self.bias)
        return out

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``other + x W^T + b``; ``other`` may be overwritten."""
        return other.add_(functional.linear(x, self.weight, self.bias))


class PackedLinear:
    """The same over weights that oneDNN has packed; CPU only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return out


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear | PackedLinear:
    """The faster of the two that works for this weight."""
    if weight.device.type == "cpu" and packs(weight.dtype):
        return PackedLinear(weight, bias)
    return Linear(weight, bias)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product works here for ``dtype`` and gives what plain torch gives."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 32), (48, 32)))
    other, bias = torch.randn(3, 48, generator=generator).to(dtype), torch.randn(48, generator=generator).to(dtype)
    try:
        packed = PackedLinear(weight, bias)
        pairs = [
            (packed(x), functional.linear(x, weight, bias)),
            (packed.plus(x, other), other + functional.linear(x, weight, bias)),
        ]
    except (AttributeError, RuntimeError):
        return False
    tolerance = 1e-4 if dtype is torch.float32 else 0.2
    return all(torch.allclose(found, wanted, rtol=tolerance, atol=tolerance) for found, wanted in pairs)
