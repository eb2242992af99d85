"""The KV cache spec of vLLM under which every block belongs to one head group of one request."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class HeadGroupSpec(FullAttentionSpec):  # type: ignore[misc]
    """KV of *one* head group in one layer: ``num_kv_heads`` is 1, and a request takes blocks for each of its groups.

    All layers of a model share this spec, including those with sliding windows: windows are masked, and their blocks
    are not freed.

    Attributes:
        head_groups: G, KV heads of the layer on each tensor parallel rank.
    """

    head_groups: int

    @classmethod
    def of(cls, spec: AttentionSpec) -> HeadGroupSpec:
        """Return the head group spec of the same layer."""
        if isinstance(spec, cls):
            return spec
        return cls(
            block_size=spec.block_size,
            num_kv_heads=1,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            head_groups=spec.num_kv_heads,
        )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Return the bytes of a request of maximum length: the blocks of all groups, and its anchor."""
        blocks = cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.head_groups + 1
        return int(blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[HeadGroupSpec]) -> HeadGroupSpec:
        """Return the spec that all layers of a group share. Raises AssertionError if they differ."""
        assert all(spec == specs[0] for spec in specs[1:]), "layers of different head groups share no KV cache group"
        return copy.deepcopy(specs[0])
