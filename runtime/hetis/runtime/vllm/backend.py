"""The attention backend: vLLM's own for local head groups, with one KV head and a block table for each.

It is composed, not copied: a base backend of vLLM stores and attends over *virtual sequences* (request, head group) as
if they were requests of a model with one KV head. `hetis.runtime.vllm.rank` selects them and has workers compute the
others. vLLM's compiled graphs see one opaque operation, as with every backend.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

from hetis.runtime.vllm.blocks import HeadGroupSpec
from hetis.runtime.vllm.head_map import LayerCall, VirtualBatch
from hetis.runtime.vllm.plugin import CONNECTOR, vllm_version
from hetis.runtime.vllm.rank import current_rank
from hetis.runtime.vllm.settings import VARIABLE, SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec


class UnsupportedModelError(ValueError):
    """The heads of this model cannot be computed separately. The message says why."""


@dataclass(slots=True, eq=False)
class HeadGroupMetadata:
    """A step as vLLM describes it. The first layer works out what it means for head groups."""

    common: CommonAttentionMetadata
    builder: HeadGroupBuilder


class HeadGroupBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Keeps vLLM's description of a step, and has the base backend's builder describe the virtual sequences."""

    base_backend: ClassVar[type[AttentionBackend]]
    # The exchange differs from step to step, so graphs are captured only between attentions.
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: HeadGroupSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        require_connector(vllm_config)
        described = _of_virtual_sequences(vllm_config, kv_cache_spec.head_groups)
        self._base = self.base_backend.get_builder_cls()(kv_cache_spec, layer_names, described, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HeadGroupMetadata:
        return HeadGroupMetadata(common_attn_metadata, self)

    def build_base(
        self, part: VirtualBatch, tables: torch.Tensor, slots: torch.Tensor, common: CommonAttentionMetadata
    ) -> Any:
        """Return the base backend's metadata for the virtual sequences of ``part``, with block tables [N, width]."""
        starts = torch.from_numpy(part.starts.astype(np.int32))
        lasts = torch.from_numpy(part.lasts.astype(np.int32))
        device = common.query_start_loc.device
        described = replace(
            common,
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lasts.to(device),
            num_reqs=len(part),
            num_actual_tokens=part.num_tokens,
            max_query_len=int(part.counts.max()),
            max_seq_len=int(part.lasts.max()),
            block_table_tensor=tables,
            slot_mapping=slots,
            positions=None,
            is_prefilling=None if common.is_prefilling is None else common.is_prefilling[part.requests],
            seq_lens_cpu_upper_bound=lasts,
            req_idx=None,
            _num_computed_tokens_cache=None,  # both caches are per request
            _token_to_req_indices_cache=None,
        )
        return self._base.build(0, described)


class HeadGroupImpl(AttentionImpl):  # type: ignore[misc]
    """One attention layer. ``num_heads`` is r, of one head group, because base builders derive sizes from it."""

    base_backend: ClassVar[type[AttentionBackend]]
    builder_cls: ClassVar[type[HeadGroupBuilder]]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        reasons = {
            "ALiBi slopes": alibi_slopes is not None,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "layers that share KV": kv_sharing_target_layer_name is not None,
            "attention sinks": more.get("sinks") is not None,
            "windows (over FLASH_ATTN of vLLM 0.30)": sliding_window is not None and self._is_blind_to_windows(),
            f"KV of dtype {kv_cache_dtype}": kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
        }
        if found := [reason for reason, applies in reasons.items() if applies]:
            why = f"hetis cannot place head groups of a model with {', '.join(found)}"
            raise UnsupportedModelError(f"{why}; unset HETIS_VLLM_CONFIG")
        self.head_groups, self.num_heads = num_kv_heads, num_heads // num_kv_heads
        self.num_kv_heads, self.head_size, self.scale = 1, head_size, float(scale)
        self.sliding_window, self.logits_soft_cap = sliding_window, logits_soft_cap
        self.kv_cache_dtype = kv_cache_dtype
        self.base = self.base_backend.get_impl_cls()(
            self.num_heads, head_size, scale, 1, None, sliding_window, kv_cache_dtype, logits_soft_cap, attn_type
        )

    @classmethod
    def _is_blind_to_windows(cls) -> bool:
        """Return whether the base builder would plan for no windows, as it only looks at its own implementations."""
        return cls.base_backend.get_name() == "FLASH_ATTN" and vllm_version().startswith("0.30.")

    def get_impl_variants(self) -> tuple[AttentionImpl, ...]:
        """Return the base implementation: since vLLM 0.31 FLASH_ATTN's builder looks for layers' windows there."""
        return (self.base,)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.base.process_weights_after_loading(act_dtype)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HeadGroupMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the attention of one layer: query [T, H, d], key and value [T, G, d], into output [T, H, d]."""
        if attn_metadata is not None:  # otherwise vLLM is measuring memory
            current_rank().attend(self, LayerCall(layer, query, key, value, kv_cache, output), attn_metadata)
        return output

    def attend_here(self, call: LayerCall, slots: torch.Tensor, metadata: Any) -> None:
        """Store keys and values of virtual sequences at ``slots`` and attend, through the base backend."""
        if not self.base_backend.forward_includes_kv_cache_update:
            self.store(call.layer, call.k, call.v, call.kv_cache, slots)
        self.base.forward(call.layer, call.q, call.k, call.v, call.kv_cache, metadata, call.out)

    def store(self, layer: Any, k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Write k and v [V, 1, d] to slots of the cache, in the base backend's layout."""
        self.base.do_kv_cache_update(layer, k, v, kv_cache, slots)


def require_connector(vllm_config: VllmConfig) -> None:
    """Raise SettingsError unless hetis' connector is the only one: others would find no KV in requests' blocks."""
    transfer = vllm_config.kv_transfer_config
    found = None if transfer is None else transfer.kv_connector
    if found != CONNECTOR:
        how = f"start vLLM with it, as docs/vllm.md says, or unset {VARIABLE}"
        raise SettingsError(f"hetis: kv_connector in --kv-transfer-config is {found}, must be {CONNECTOR}: {how}")


def _of_virtual_sequences(vllm_config: VllmConfig, head_groups: int) -> VllmConfig:
    """Return the configuration as a base builder should see it, which sizes its buffers by sequences and tokens.

    Each request is ``head_groups`` sequences with one KV head, by which TRITON_ATTN chooses its kernel, and each token
    as many rows. No graph of a whole step is captured.
    """
    described = copy(vllm_config)
    described.compilation_config = copy(vllm_config.compilation_config)
    described.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    described.model_config = copy(vllm_config.model_config)
    described.model_config.get_num_kv_heads = lambda *_, **__: 1
    described.scheduler_config = copy(vllm_config.scheduler_config)
    described.scheduler_config.max_num_seqs *= head_groups
    described.scheduler_config.max_num_batched_tokens *= head_groups
    return described


def composed(base: type[AttentionBackend], name: str, path: str) -> type[AttentionBackend]:
    """Return a head group backend composed from a backend of vLLM, for ``name`` in vLLM's registry.

    Args:
        path: where the class can be imported, as ``module.Class``. vLLM's GPU platform finds a class by its own name.
    """
    builder = type(f"{base.__name__}HeadGroupBuilder", (HeadGroupBuilder,), {"base_backend": base})
    impl = type(f"{base.__name__}HeadGroupImpl", (HeadGroupImpl,), {"base_backend": base, "builder_cls": builder})

    class ComposedBackend(base):  # type: ignore[misc]
        """``base``, with one KV head and a block table for each head group."""

        forward_includes_kv_cache_update = True

        @staticmethod
        def get_name() -> str:
            return name

        @staticmethod
        def get_impl_cls() -> type[HeadGroupImpl]:
            return impl

        @staticmethod
        def get_builder_cls() -> type[HeadGroupBuilder]:
            return builder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> HeadGroupSpec:
            if isinstance(spec, ChunkedLocalAttentionSpec):  # vLLM makes sequences of its own for every chunk
                why = "hetis cannot place head groups of a model that attends to chunks of its context"
                raise UnsupportedModelError(f"{why}; unset HETIS_VLLM_CONFIG")
            return HeadGroupSpec.of(spec)

        @classmethod
        def supports_sink(cls) -> bool:
            return False

        @classmethod
        def supports_mm_prefix(cls) -> bool:
            return False

        @classmethod
        def supports_rswa(cls) -> bool:
            return False

    ComposedBackend.__module__, _, ComposedBackend.__qualname__ = path.rpartition(".")
    ComposedBackend.__name__ = ComposedBackend.__qualname__
    return ComposedBackend


CpuHeadGroups = composed(CPUAttentionBackend, "CPU_ATTN", f"{__name__}.CpuHeadGroups")
