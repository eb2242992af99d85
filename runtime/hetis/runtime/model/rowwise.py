"""What happens to each row by itself: norms and rotation; in torch, and compiled for CPUs where torch is slow at it.

A decode step of sixteen requests spends more time on starting these small operations than on doing them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from hetis.runtime.model.rope import rotate


class Rowwise(Protocol):
    """Norms and rotation for one device and dtype."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of a contiguous x."""

    def rotate(self, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The first ``heads`` of x [T, all heads, d] rotated by cos and sin [T, d / 2]; x may be overwritten."""


class TorchRowwise:
    """Plain torch: any device, any dtype."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # In float32 or finer, and rounded before the weight is applied, as the models were trained.
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return normed.to(x.dtype) * weight

    def rotate(self, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.cat((rotate(x[:, :heads], cos, sin), x[:, heads:]), dim=1)


class CompiledRowwise:
    """Compiled by numba: float32 and float64 on CPUs."""

    def __init__(self) -> None:
        from hetis.runtime.model import rowwise_compiled

        self._kernels = rowwise_compiled

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._kernels.rms_norm(x.numpy().reshape(-1, size), weight.numpy(), eps, out.numpy().reshape(-1, size))
        return out

    def rotate(self, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        self._kernels.rotate(x.numpy(), heads, cos.numpy(), sin.numpy())
        return x


def choose_rowwise(device: str, dtype: torch.dtype) -> Rowwise:
    """The faster of the two that works."""
    from importlib.util import find_spec

    if torch.device(device).type == "cpu" and dtype in (torch.float32, torch.float64) and find_spec("numba"):
        return CompiledRowwise()
    return TorchRowwise()


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension; torch has it in one pass."""
    out: torch.Tensor = functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return out
