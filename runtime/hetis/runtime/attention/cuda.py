"""The GPUs that there are."""

from __future__ import annotations

import torch


def cuda_count() -> int:
    """GPUs that torch finds, of those that CUDA_VISIBLE_DEVICES leaves."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
