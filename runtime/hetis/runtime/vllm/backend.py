"""The attention backend: vLLM's own for local head groups, with one KV head and a block table for each.

It is composed, not copied: a base backend of vLLM stores and attends over *virtual sequences* (request, head group) as
if they were requests of a model with one KV head. `hetis.runtime.vllm.ranks.rank` selects them, and has workers compute
the others. vLLM's compiled graphs see one opaque operation, as with every backend.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.v1.attention.backend import AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

from hetis.runtime.vllm.blocks import HeadGroupSpec
from hetis.runtime.vllm.plugin import CONNECTOR, vllm_version
from hetis.runtime.vllm.ranks.head_map import LayerCall
from hetis.runtime.vllm.ranks.rank import current_rank, has_rank
from hetis.runtime.vllm.settings import VARIABLE, SettingsError, read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from hetis.runtime.vllm.ranks.rank import Rank
    from hetis.runtime.vllm.ranks.step_tensors import LocalSequences, Step


WHOLE_STEPS = "0.32."  # the version of vLLM whose order of calls `veto_replay` was tried with


class UnsupportedModelError(ValueError):
    """The heads of this model cannot be computed separately. The message says why."""


@dataclass(slots=True, eq=False)
class HeadGroupMetadata:
    """A step as the layers of one builder compute it."""

    rank: Rank
    step: Step
    base: Any  # the base backend's metadata of what is computed here; None: nothing is


class HeadGroupBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Has the rank find out where a step's head groups are, and the base backend describe those that are here."""

    base_backend: ClassVar[type[AttentionBackend]]

    def __init__(
        self, kv_cache_spec: HeadGroupSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        require_connector(vllm_config)
        self._whole_steps = self.get_cudagraph_support(vllm_config, kv_cache_spec) is not AttentionCGSupport.NEVER
        described = _of_virtual_sequences(vllm_config, kv_cache_spec.head_groups, whole_steps=self._whole_steps)
        self._base = self.base_backend.get_builder_cls()(kv_cache_spec, layer_names, described, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: HeadGroupSpec) -> AttentionCGSupport:
        """Return what the base backend supports of decode steps as one graph, if that is wanted; see `veto_replay`."""
        settings = read_settings()
        if settings is None or settings.graphs != "full" or not vllm_version().startswith(WHOLE_STEPS):
            return AttentionCGSupport.NEVER
        base = cls.base_backend.get_builder_cls().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(base, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda one: one.value)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HeadGroupMetadata | None:
        if self._is_profiling():
            return None
        rank = current_rank()
        step = rank.begin(common_attn_metadata)
        base = None if step.local is None else self.build_base(step.local, common_attn_metadata)
        return HeadGroupMetadata(rank, step, base)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> HeadGroupMetadata | None:
        if self._is_profiling():
            return None
        rank = current_rank()
        step = rank.begin(common_attn_metadata)
        assert step.local is not None, "graphs are captured before any request comes"
        rank.capturing()
        base = self._base.build_for_cudagraph_capture(_described(step.local, common_attn_metadata))
        return HeadGroupMetadata(rank, step, base)

    def _is_profiling(self) -> bool:
        """Return whether vLLM measures the memory of graphs of whole steps, before there is KV and a connector."""
        return self._whole_steps and not has_rank()

    def build_base(self, local: LocalSequences, common: CommonAttentionMetadata) -> Any:
        """Return the base backend's metadata for virtual sequences."""
        return self._base.build(0, _described(local, common))


def _described(local: LocalSequences, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """Return vLLM's description of a step as if the virtual sequences were its requests."""
    return replace(
        common,
        query_start_loc=local.starts,
        query_start_loc_cpu=local.starts_cpu,
        seq_lens=local.lasts,
        num_reqs=len(local),
        num_actual_tokens=local.num_tokens,
        max_query_len=local.max_query_len,
        max_seq_len=local.max_seq_len,
        block_table_tensor=local.tables,
        slot_mapping=local.slots,
        positions=None,
        is_prefilling=local.of_requests(common.is_prefilling),
        seq_lens_cpu_upper_bound=local.lasts_cpu,
        req_idx=None,
        _num_computed_tokens_cache=None,  # both caches are per request
        _token_to_req_indices_cache=None,
    )


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
            attn_metadata.rank.attend(self, LayerCall(layer, query, key, value, kv_cache, output), attn_metadata)
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


def _of_virtual_sequences(vllm_config: VllmConfig, head_groups: int, *, whole_steps: bool) -> VllmConfig:
    """Return the configuration as a base builder should see it, which sizes its buffers by sequences and tokens.

    Each request is ``head_groups`` sequences with one KV head, by which TRITON_ATTN chooses its kernel, and each token
    as many rows, also in graphs of whole steps, if there are any.
    """
    described = copy(vllm_config)
    described.compilation_config = compiled = copy(vllm_config.compilation_config)
    if whole_steps:
        sizes = compiled.cudagraph_capture_sizes
        compiled.cudagraph_capture_sizes = sizes and [size * head_groups for size in sizes]
        compiled.max_cudagraph_capture_size = (compiled.max_cudagraph_capture_size or 0) * head_groups
    else:
        compiled.cudagraph_mode = CUDAGraphMode.NONE
    described.model_config = copy(vllm_config.model_config)
    described.model_config.get_num_kv_heads = lambda *_, **__: 1
    described.scheduler_config = copy(vllm_config.scheduler_config)
    described.scheduler_config.max_num_seqs *= head_groups
    described.scheduler_config.max_num_batched_tokens *= head_groups
    return described


def veto_replay(rank: Rank, vllm_config: VllmConfig) -> None:
    """Have vLLM compute a step between its attentions that it would replay as one graph, unless that graph is right.

    vLLM chooses by the shape of a step alone, before the connector is told of it. It calls this within the step's
    forward context, of which its wrappers of graphs read the choice afterwards.
    """
    if not is_forward_context_available():
        return
    context = get_forward_context()
    if context.cudagraph_runtime_mode is not CUDAGraphMode.FULL or rank.can_replay:
        return
    rank.must_attend()
    if vllm_config.compilation_config.cudagraph_mode.mixed_mode() is CUDAGraphMode.PIECEWISE:
        # Of every size that has a graph of the whole step, there are graphs of its pieces.
        context.cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
        context.batch_descriptor = replace(context.batch_descriptor, num_reqs=None, uniform=False)
    else:
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE


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
