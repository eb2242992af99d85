"""The head group backend for GPUs, over the backend that the settings name, or FLASH_ATTN.

Start vLLM with ``--attention-backend CUSTOM``. docs/vllm.md states what has run on a GPU, and what has not yet.
"""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from hetis.runtime.vllm.backend import composed
from hetis.runtime.vllm.settings import read_settings

_settings = read_settings()
_base = (_settings.base_backend if _settings is not None else None) or "FLASH_ATTN"
GpuHeadGroups = composed(AttentionBackendEnum[_base].get_class(), "CUSTOM", f"{__name__}.GpuHeadGroups")
