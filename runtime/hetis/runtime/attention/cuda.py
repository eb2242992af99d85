"""The CUDA GPUs of this machine."""

from __future__ import annotations

import torch


def cuda_count() -> int:
    """Return the number of GPUs that torch finds among those in CUDA_VISIBLE_DEVICES."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
